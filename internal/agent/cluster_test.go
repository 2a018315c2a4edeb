package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/fake"
	"github.com/argon-cluster/argon/internal/placement"
)

// allInSync tells whether the volume has so many replicas, all in sync.
func allInSync(v *argonv1.Volume, n int) bool {
	return len(v.GetReplicas()) == n && !slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return !inSync(r) })
}

func TestMachineSurvivesItsServer(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	first := w.runs(0)
	if on := first.GetServerId(); on != "a" && on != "b" {
		t.Fatalf("runs on %s, which does not have its disk", on)
	}
	w.hosts[first.GetServerId()].kill()

	second := w.runs(first.GetPlacement())
	if second.GetServerId() == first.GetServerId() || second.GetStatus().GetStarts() != 2 {
		t.Fatalf("after the loss of %s: %v", first.GetServerId(), second)
	}
	if n := w.guests(); n != 1 {
		t.Fatalf("%d guests run", n)
	}

	// The lost server comes back: it starts nothing, and its replica is
	// brought up to date.
	back := w.hosts[first.GetServerId()]
	before := back.monitor.Starts()
	back.start()
	st := w.until("healthy again", func(st *catalog.State) bool { return allInSync(st.Volumes["v"], 2) })
	if got := st.Machines["m"]; got.GetServerId() != second.GetServerId() || w.guests() != 1 || back.monitor.Starts() != before {
		t.Errorf("after the return of %s: %v, %d guests", back.id, got, w.guests())
	}
	for _, reason := range []string{"machine-placed", "machine-started", "machine-lost"} {
		w.tells(reason)
	}
}

func TestMachineStopsStartsAndGoes(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	m := w.runs(0)
	stopped := func(st *catalog.State) bool {
		m, v := st.Machines["m"], st.Volumes["v"]
		return m.GetStatus().GetState() == stateStopped && m.GetServerId() == "" && v.GetAttachment() == nil && v.GetClean()
	}

	w.want(wantStopped)
	w.until("stopped, its disk clean, its server given back", stopped)
	w.want(wantRunning)
	m = w.runs(m.GetPlacement())

	w.hosts[m.GetServerId()].guest().PowerDown(t.Context())
	st := w.until("stopped from inside", stopped)
	if got := st.Machines["m"]; got.GetWanted() != wantStopped || got.GetStatus().GetReason() != "powered off from inside" {
		t.Fatalf("after it powered itself off: %v", got)
	}

	w.want(wantRunning)
	w.runs(m.GetPlacement())
	_, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
		m.Wanted = wantRemoved
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.store.Volumes.Update(t.Context(), "v", func(v *argonv1.Volume) error {
		v.Removing = true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.until("removed", func(st *catalog.State) bool {
		return len(st.Machines) == 0 && len(st.Volumes) == 0 && len(st.VolumeStatus) == 0
	})
	for _, h := range w.hosts {
		h.mu.Lock()
		if len(h.replicas) > 0 {
			t.Errorf("server %s still keeps %v", h.id, h.replicas)
		}
		h.mu.Unlock()
	}
	if n := w.guests(); n != 0 {
		t.Errorf("%d guests still run", n)
	}
}

// A guest whose process was stopped by a signal makes room for another; one that goes
// on in time stays.
func TestHaltedGuestIsStartedAgain(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	g := w.hosts["a"].guest()
	g.Set(hypervisor.Status{State: hypervisor.Halted, Detail: "stopped by a signal"})
	w.until("seen", func(st *catalog.State) bool {
		s := st.Machines["m"].GetStatus()
		return s.GetState() == statePaused && strings.Contains(s.GetReason(), "stopped by a signal")
	})
	g.Set(hypervisor.Status{State: hypervisor.Running})
	w.until("it goes on", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetState() == stateRunning })
	if n := w.view.State().Machines["m"].GetStatus().GetStarts(); n != 1 {
		t.Errorf("%d starts", n)
	}
	g.Set(hypervisor.Status{State: hypervisor.Halted, Detail: "stopped by a signal"})
	w.until("started again", func(st *catalog.State) bool {
		s := st.Machines["m"].GetStatus()
		return s.GetState() == stateRunning && s.GetStarts() == 2
	})
	w.tells("machine-restarted")
}

func TestCrashedGuestIsStartedAgain(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	m := w.runs(0)
	w.hosts["a"].guest().Exit()
	w.until("started again", func(st *catalog.State) bool {
		s := st.Machines["m"].GetStatus()
		return s.GetState() == stateRunning && s.GetStarts() == 2
	})
	if got := w.view.State().Machines["m"].GetPlacement(); got != m.GetPlacement() {
		t.Errorf("a crash of the guest moved the machine: placement %d", got)
	}
	w.tells("machine-crashed")
}

func TestGuestThatCannotStartIsTriedAgain(t *testing.T) {
	w := newWorld(t, "a")
	w.hosts["a"].monitor.Fail(errors.New("no such monitor"))
	w.create(1, "a")
	w.until("failed, with the reason", func(st *catalog.State) bool {
		s := st.Machines["m"].GetStatus()
		return s.GetState() == stateFailed && strings.Contains(s.GetReason(), "no such monitor")
	})
	w.hosts["a"].mu.Lock()
	w.hosts["a"].monitor.Fail(nil)
	w.hosts["a"].mu.Unlock()
	w.runs(0)
}

func TestGuestOutlivesItsDaemon(t *testing.T) {
	for _, how := range []string{"in order", "by a crash"} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t, "a", "b")
			w.create(2, "a", "b")
			m := w.runs(0)
			h := w.hosts[m.GetServerId()]
			guest := h.guest()
			if how == "in order" {
				h.end()
			} else {
				h.crash()
			}
			epoch := w.until("known", func(st *catalog.State) bool { return true }).Volumes["v"].GetEpoch()
			h.start()
			w.until("attached again", func(st *catalog.State) bool {
				v := st.Volumes["v"]
				return v.GetEpoch() > epoch && v.GetAttachment().GetMachineId() == "m"
			})
			// It is taken up beside its disks, in no order.
			w.untilHosts("it is taken up", func(*host) bool {
				_, err := h.agent.Guest("m")
				return err == nil
			})
			if h.guest() != guest || h.monitor.Starts() != 1 {
				t.Errorf("the guest was started anew (%d starts)", h.monitor.Starts())
			}
		})
	}
}

// A daemon is killed when it has started a guest and not told it to go on: the next
// one does.
func TestGuestThatWasNotLetGo(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	h := w.hosts["a"]
	g := h.guest()
	h.crash()
	g.Set(hypervisor.Status{State: hypervisor.Paused, Detail: "prelaunch"})
	h.start()
	w.untilHosts("it runs", func(*host) bool {
		s, _ := g.Status(t.Context())
		return s.State == hypervisor.Running
	})
	if h.guest() != g || h.monitor.Starts() != 1 {
		t.Error("the guest was started anew")
	}
}

// A guest whose monitor hangs is ended all the same: when told to, or in the end.
func TestGuestThatHangsIsStopped(t *testing.T) {
	stopsUnwilling(t, (*fake.Guest).Wedge, func(w *world) {
		a := w.hosts["a"].agent
		w.untilHosts("its button is pressed", func(*host) bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.jobs["machine/m"] != nil
		})
	})
}

// stopsUnwilling has a guest stopped that does not obey: by force when told to, and
// when its time is over. begun waits until its stop has begun.
func stopsUnwilling(t *testing.T, spoil func(*fake.Guest), begun func(*world)) {
	for name, change := range map[string]func(*argonv1.Machine){
		"when told to": func(m *argonv1.Machine) { m.ForceStop = true },
		"in the end":   func(m *argonv1.Machine) { m.StopTimeoutSeconds = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "a")
			w.create(1, "a")
			w.runs(0)
			spoil(w.hosts["a"].guest())
			w.want(wantStopped)
			begun(w)
			if _, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
				change(m)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			w.until("stopped", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetState() == stateStopped })
			if name == "in the end" {
				w.tells("machine-stop-forced")
			}
		})
	}
}

// What an agent records counts, and is told of, although the step is not planned
// any more that records it: the view may be faster than the answer.
func TestRecordedAlthoughTheStepEnds(t *testing.T) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for name, c := range map[string]struct {
		do     func(a *Agent, m *argonv1.Machine) error
		reason string
	}{
		"a migration is declined": {func(a *Agent, m *argonv1.Machine) error { return a.decline(ended, m, "no room") }, "machine-migration-failed"},
		"a checkpoint is refused": {func(a *Agent, m *argonv1.Machine) error { return a.refuse(ended, m, errors.New("damaged")) }, "machine-not-resumed"},
		"a memory is used up": {func(a *Agent, m *argonv1.Machine) error {
			handle, err := new(fake.Monitor).Start(ended, hypervisor.Spec{ID: "m-1"})
			if err != nil {
				return err
			}
			return a.consume(ended, m, &argonv1.Checkpoint{}, &guest{id: "m-1", handle: handle})
		}, "machine-woken"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newRecords(t)
			m := &argonv1.Machine{
				Meta: &argonv1.Meta{Id: "m", Name: "m"}, ServerId: "a", Placement: 1, Wanted: wantRunning, LastPlacement: 2,
				Migration: &argonv1.Migration{Id: "i", ToServerId: "b", Placement: 2}, Wake: &argonv1.Wake{CheckpointId: "c"},
			}
			if err := w.store.Machines.Create(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			w.until("known", func(st *catalog.State) bool { return st.Machines["m"] != nil })
			a := New(Options{ServerID: "a", Store: w.store, View: w.view, Ports: fakePorts{}, Dirs: fakeDirs{}, Now: time.Now, Log: quiet()})
			if err := c.do(a, m); err != nil {
				t.Fatal(err)
			}
			w.tells(c.reason)
		})
	}
}

// An observation of what the record was is not written over what it is: a machine
// that was stopped, and is being started since, is not stopped.
func TestReportOfThePast(t *testing.T) {
	w := newRecords(t)
	m := &argonv1.Machine{
		Meta: &argonv1.Meta{Id: "m", Name: "m"}, ServerId: "a", Placement: 1, Wanted: wantStopped,
		Status: &argonv1.MachineStatus{State: stateStopping, ServerId: "a", Placement: 1},
	}
	if err := w.store.Machines.Create(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	seen := proto.CloneOf(m)
	a := New(Options{ServerID: "a", Store: w.store, View: w.view, Now: time.Now, Log: quiet()})
	// It was wanted running, was started, and is wanted stopped again.
	if _, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
		m.Status.State = stateRunning
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := a.report(t.Context(), seen, "a", observation{state: stateStopped}); !errors.Is(err, ErrOvertaken) {
		t.Errorf("it is called stopped: %v", err)
	}
}

func TestForeignGuestIsKilled(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	m := w.runs(0)
	old := w.hosts[m.GetServerId()]
	guest := old.guest()
	// The daemon hangs, its guests go on; the lease ends. (The guard would
	// have killed them: this is the last line of defence.)
	old.crash()
	if _, err := w.cli.Revoke(t.Context(), old.lease); err != nil {
		t.Fatal(err)
	}
	old.lease = 0
	w.runs(m.GetPlacement())
	old.start()
	<-guest.Done()
	if w.guests() != 1 {
		t.Errorf("%d guests run", w.guests())
	}
}

func TestGuestOfADeposedHolderIsKilled(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	guest := w.hosts["a"].guest()
	w.mu.Lock()
	holder := w.holders["v"]
	w.mu.Unlock()
	holder.end(errors.New("deposed by a test"))
	<-guest.Done()
	w.until("started again", func(st *catalog.State) bool {
		s := st.Machines["m"].GetStatus()
		return s.GetState() == stateRunning && s.GetStarts() == 2
	})
}

func TestFullDiskPausesTheMachine(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	guest := w.hosts["a"].guest()
	w.mu.Lock()
	holder := w.holders["v"]
	w.mu.Unlock()
	holder.setFull(true)
	guest.Set(hypervisor.Status{State: hypervisor.Paused, Detail: "io-error"})
	w.until("paused, with the reason", func(st *catalog.State) bool {
		s := st.Machines["m"].GetStatus()
		return s.GetState() == statePaused && strings.Contains(s.GetReason(), "no room")
	})
	holder.setFull(false)
	w.until("running again", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetState() == stateRunning })
	if w.hosts["a"].guest() != guest {
		t.Error("the guest was started anew")
	}
}

func TestDeafGuestIsStoppedByForce(t *testing.T) {
	stopsUnwilling(t, (*fake.Guest).Deafen, func(w *world) {
		w.until("stopping", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetState() == stateStopping })
	})
}

// A guest sees that its disk has grown, and so does one that an earlier run of the
// daemon has told.
func TestGuestSeesItsDiskGrow(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	on := w.hosts[w.runs(0).GetServerId()]
	guest := on.guest()
	for _, size := range []uint64{2 << 30, 3 << 30} {
		if _, err := w.store.Volumes.Update(t.Context(), "v", func(v *argonv1.Volume) error {
			v.SizeBytes = size
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		w.untilHosts("the guest was told", func(*host) bool { return guest.Grown(0) == int64(size) })
		on.crash()
		on.start()
	}
	if on.guest() != guest || on.monitor.Starts() != 1 {
		t.Errorf("the guest was started anew (%d starts)", on.monitor.Starts())
	}
}

// A volume that nobody uses is healed by a server that has it in sync.
func TestUnattachedVolumeIsRepaired(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(3, "a", "b")
	w.runs(0)
	w.want(wantStopped)
	w.until("detached", func(st *catalog.State) bool { return st.Volumes["v"].GetAttachment() == nil })
	w.join("c")
	w.until("healed and at rest", func(st *catalog.State) bool {
		v := st.Volumes["v"]
		return allInSync(v, 3) && v.GetAttachment() == nil && v.GetClean()
	})
}

func TestConnect(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	m := w.runs(0)
	here := w.hosts[m.GetServerId()].agent
	if _, err := here.Connect(t.Context(), "v"); err == nil || !strings.Contains(err.Error(), "used by machine m") {
		t.Fatalf("connect a machine's disk: %v", err)
	}
	w.stops()
	for _, h := range w.hosts {
		h.catchUp()
	}
	c, err := w.hosts["a"].agent.Connect(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := w.hosts["a"].agent.Connect(t.Context(), "v"); err != nil {
		t.Error(err)
	} else {
		again.Close()
	}
	w.until("attached", func(st *catalog.State) bool { return st.Volumes["v"].GetAttachment().GetServerId() == "a" })
	// The other server has to know of it before it can refuse.
	w.hosts["b"].catchUp()
	if _, err := w.hosts["b"].agent.Connect(t.Context(), "v"); err == nil || !strings.Contains(err.Error(), "attached on server a") {
		t.Errorf("connect on two servers: %v", err)
	}
	c.Close()
	w.until("detached", func(st *catalog.State) bool {
		return st.Volumes["v"].GetAttachment() == nil && st.Volumes["v"].GetClean()
	})
}

// An attachment that failed once is tried again for who comes again.
func TestConnectAfterAFailure(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	w.stops()
	a := w.hosts["a"]
	a.catchUp()
	a.mu.Lock()
	a.attachFails, a.attachTakes = errors.New("the catalog is away"), 100*time.Millisecond
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for failed := 0; ; failed++ {
		c, err := a.agent.Connect(ctx, "v")
		if err == nil {
			c.Close()
			if failed == 0 {
				t.Error("it did not fail")
			}
			return
		}
		if ctx.Err() != nil || !strings.Contains(err.Error(), "the catalog is away") {
			t.Fatalf("after %d failures: %v", failed, err)
		}
		time.Sleep(overtakenPause) // as who waits for a checkpoint's memory does
	}
}

// Who connects a volume while it is being detached here does not get the
// attachment that ends, but the next one.
func TestConnectWhileDetaching(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	w.stops()
	w.hosts["a"].catchUp()
	a := w.hosts["a"].agent
	c, err := a.Connect(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	detach := &held{began: make(chan struct{}), goOn: make(chan struct{})}
	volumes := a.Volumes.(*fakeVolumes)
	volumes.holdDetach.Store(detach)
	c.Close()
	<-detach.began
	again := make(chan *Connection, 1)
	go func() {
		c, err := a.Connect(t.Context(), "v")
		if err != nil {
			t.Error(err)
		}
		again <- c
	}()
	for come := false; !come; { // the second user asks for a pass
		a.mu.Lock()
		passed := a.passed
		come = a.volumes["v"].connections == 1
		a.mu.Unlock()
		if !come {
			<-passed
		}
	}
	a.mu.Lock()
	ready, err := a.connected(&Connection{agent: a, id: "v"})
	a.mu.Unlock()
	if ready != nil || err != nil {
		t.Errorf("an attachment that ends is handed out (%v)", err)
	}
	volumes.holdDetach.Store(nil)
	close(detach.goOn)
	if c := <-again; closed(c.Done()) {
		t.Error("the connection is over at once")
	} else {
		c.Close()
	}
}

// A volume that is attached for upkeep only, however long that takes, is no
// reason to refuse a user on another server; the upkeep goes on afterwards.
func TestUpkeepMakesWay(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	w.stops()
	scrubbed := func(n uint64) {
		_, err := w.store.Volumes.Update(t.Context(), "v", func(v *argonv1.Volume) error {
			v.Scrub = &argonv1.Scrub{Wanted: 1, Finished: n}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	scrubbed(0)
	w.until("attached for upkeep", func(st *catalog.State) bool {
		at := st.Volumes["v"].GetAttachment()
		return at.GetServerId() == "a" && !at.GetConnected()
	})
	w.hosts["b"].catchUp()
	b := w.hosts["b"].agent
	c, err := b.Connect(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	w.until("connected on b", func(st *catalog.State) bool {
		at := st.Volumes["v"].GetAttachment()
		return at.GetServerId() == "b" && at.GetConnected()
	})
	c.Close()
	w.until("attached for upkeep again", func(st *catalog.State) bool {
		at := st.Volumes["v"].GetAttachment()
		return at != nil && !at.GetConnected()
	})
	scrubbed(1)
	w.until("at rest again", func(st *catalog.State) bool {
		return st.Volumes["v"].GetAttachment() == nil && st.Volumes["v"].GetClean()
	})
}

func TestReplicasAreMadeFromAnImage(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.hosts["a"].mu.Lock()
	w.hosts["a"].images["i"] = true
	w.hosts["a"].mu.Unlock()
	image := &argonv1.Image{
		Meta: &argonv1.Meta{Id: "i", Name: "i"}, SizeBytes: gib, Copies: []*argonv1.ImageCopy{{ServerId: "a", Ready: true}},
	}
	if err := w.store.Images.Create(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	v := &argonv1.Volume{
		Meta: &argonv1.Meta{Id: "v", Name: "v"}, SizeBytes: gib, ReplicasWanted: 2, NextReplicaId: 3, Base: &argonv1.Base{ImageId: "i"},
		Replicas: []*argonv1.Replica{
			{Id: 1, ServerId: "b", State: argonv1.ReplicaState_REPLICA_STATE_CREATING},
			{Id: 2, ServerId: "c", State: argonv1.ReplicaState_REPLICA_STATE_CREATING},
		},
	}
	if err := w.store.Volumes.Create(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	st := w.until("made, equal", func(st *catalog.State) bool { return allInSync(st.Volumes["v"], 2) })
	if v := st.Volumes["v"]; v.GetEpoch() != 0 || !v.GetReplicas()[0].GetBased() || v.GetBase() == nil {
		t.Errorf("somebody attached it, or it is not based on the image: %v", v)
	}
	st = w.until("copied", func(st *catalog.State) bool {
		copies := st.Images["i"].GetCopies()
		return len(copies) == 3 && !slices.ContainsFunc(copies, func(c *argonv1.ImageCopy) bool { return !c.GetReady() })
	})
	_, err := w.store.Volumes.Update(t.Context(), "v", func(v *argonv1.Volume) error {
		v.Removing = true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Images.Delete(t.Context(), st.Images["i"]); err != nil {
		t.Fatal(err)
	}
	w.untilHosts("without the image", func(h *host) bool { return len(h.images) == 0 })
}

// How far the fetching of an image is is written down now and then.
func TestFetchIsReported(t *testing.T) {
	w := newRecords(t)
	if err := w.store.Images.Create(t.Context(), &argonv1.Image{
		Meta: &argonv1.Meta{Id: "i", Name: "i"}, SizeBytes: gib, Copies: []*argonv1.ImageCopy{{ServerId: "b"}, {ServerId: "a"}},
	}); err != nil {
		t.Fatal(err)
	}
	now := noon
	a := New(Options{ServerID: "a", Store: w.store, View: w.view, Now: func() time.Time { return now }, Log: quiet()})
	tell := a.reportFetch(t.Context(), "i")
	for _, step := range []struct {
		after                        time.Duration
		copied, checked              int64
		recorded, checkedAsIsWritten uint64
	}{
		{time.Second, 1, 0, 0, 0},
		{progressEvery, 2, 0, 2, 0},
		{time.Second, 3, 0, 2, 0},
		{progressEvery, 4, 3, 4, 3},
	} {
		now = now.Add(step.after)
		tell(step.copied, step.checked)
		i, err := w.store.Images.Get(t.Context(), "i")
		if err != nil {
			t.Fatal(err)
		}
		if c := copyOn(i, "a"); c.GetCopiedBytes() != step.recorded || c.GetCheckedBytes() != step.checkedAsIsWritten {
			t.Errorf("after %d and %d bytes the record has %v", step.copied, step.checked, c)
		}
	}
	if err := a.setReady(t.Context(), "i", true); err != nil {
		t.Fatal(err)
	}
	if i, err := w.store.Images.Get(t.Context(), "i"); err != nil || copyOn(i, "a").GetCopiedBytes() != 0 || copyOn(i, "b").GetReady() {
		t.Errorf("in the end %v, %v", i, err)
	}
}

// evacuate asks for a server to be emptied, replicas too.
func (w *world) evacuate(server string) {
	w.t.Helper()
	_, err := w.store.Servers.Update(w.t.Context(), server, func(s *argonv1.Server) error {
		s.Drain = &argonv1.Drain{Evacuate: true}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// gone waits until nothing of the volume is on a server any more, neither in the
// record nor there, and as many replicas as are wanted are in sync elsewhere.
func (w *world) gone(server string) *catalog.State {
	w.t.Helper()
	st := w.until("gone from "+server, func(st *catalog.State) bool {
		v := st.Volumes["v"]
		return allInSync(v, int(v.GetReplicasWanted())) &&
			!slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return r.GetServerId() == server })
	})
	w.untilHosts("without what it keeps no more", func(h *host) bool { return h.id != server || len(h.replicas) == 0 })
	return st
}

// A server is emptied that keeps a replica of a running machine's disk: first of
// a machine elsewhere, which notices nothing, then of one that runs there.
func TestEvacuationOfADiskInUse(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	m := w.runs(0)
	home, other := m.GetServerId(), "a"
	if home == "a" {
		other = "b"
	}
	g := w.hosts[home].guest()
	w.evacuate(other)
	st := w.gone(other)
	if now := st.Machines["m"]; now.GetPlacement() != m.GetPlacement() || w.hosts[home].guest() != g || st.Volumes["v"].GetAttachment().GetServerId() != home {
		t.Errorf("the machine was %v, and is %v", m, now)
	}

	if _, err := w.store.Servers.Update(t.Context(), other, func(s *argonv1.Server) error {
		s.Drain = nil
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	w.evacuate(home)
	w.gone(home)
	w.untilHosts("left by the guest", func(h *host) bool { return h.id != home || h.guest() == nil })
	if now := w.runs(m.GetPlacement()); now.GetServerId() == home || w.guests() != 1 {
		t.Errorf("the machine runs on %s; %d guests run", now.GetServerId(), w.guests())
	}
}

// A volume that nobody uses learns that a replica is gone when its server is
// back, not when it is needed. The one that is left is never given up.
func TestMissingReplicaIsMadeAnew(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	w.want(wantStopped)
	w.until("at rest", func(st *catalog.State) bool {
		return st.Machines["m"].GetServerId() == "" && st.Volumes["v"].GetAttachment() == nil && allInSync(st.Volumes["v"], 2)
	})
	b := w.hosts["b"]
	b.kill()
	b.mu.Lock()
	clear(b.replicas)
	b.mu.Unlock()
	b.start()
	w.untilHosts("on b again", func(h *host) bool { return h != b || len(h.replicas["v"]) == 1 })
	w.until("in sync again", func(st *catalog.State) bool { return allInSync(st.Volumes["v"], 2) })
}

// The last replica in sync stays, whoever asks.
func TestEvacuationKeepsTheLastReplica(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(1, "a")
	m := w.runs(0)
	w.hosts["b"].kill()
	w.evacuate("a")
	w.tells("machine-stays")
	if st := w.view.State(); !allInSync(st.Volumes["v"], 1) || st.Machines["m"].GetPlacement() != m.GetPlacement() {
		t.Errorf("%v, %v", st.Volumes["v"], st.Machines["m"])
	}
	// Once there is another place, it goes there.
	w.hosts["b"].start()
	w.gone("a")
	w.runs(m.GetPlacement())
}

// Nobody waits for a disk that does not work: its server says so, its replicas are
// made elsewhere, what is to be deleted there goes from the records, and from the
// disk when it works again.
func TestBadDisk(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	w.runs(0)
	w.want(wantStopped)
	w.until("at rest", func(st *catalog.State) bool {
		return st.Machines["m"].GetServerId() == "" && st.Volumes["v"].GetAttachment() == nil && allInSync(st.Volumes["v"], 2)
	})
	b := w.hosts["b"]
	problem := func(text string) {
		b.mu.Lock()
		b.badDisk = text
		b.mu.Unlock()
		w.until("recorded", func(st *catalog.State) bool { return placement.BadDisk(st.Servers["b"]) == text })
	}
	problem("it burns")
	w.until("made elsewhere", func(st *catalog.State) bool {
		v := st.Volumes["v"]
		return allInSync(v, 2) && !slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return r.GetServerId() == "b" })
	})
	b.mu.Lock()
	if len(b.replicas["v"]) != 1 || len(b.leftovers["v"]) != 1 {
		t.Errorf("on the disk are %v, to be deleted %v", b.replicas, b.leftovers)
	}
	b.mu.Unlock()
	b.kill() // what is to be deleted is not forgotten
	b.start()
	problem("")
	w.untilHosts("deleted there", func(h *host) bool { return h != b || len(h.replicas) == 0 && len(h.leftovers) == 0 })
	for _, reason := range []string{"disk-failed", "disk-mended"} {
		w.tellsOf("server", "b", reason)
	}
}
