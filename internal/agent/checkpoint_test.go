package agent

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/fake"
	"github.com/argon-cluster/argon/internal/placement"
	device "github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/volumetest"
)

const manual = argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_MANUAL

func TestNextForCheckpoint(t *testing.T) {
	running := machineSeen{guests: []guestSeen{runningGuest()}, disks: disksSeen{ready: true, held: true}}
	wantedNow := &argonv1.Checkpoint{State: cpWanted, Purpose: manual}
	begun := &argonv1.Checkpoint{State: cpTaking, Purpose: manual, ServerId: "a", Placement: 3}
	toSuspend := &argonv1.Checkpoint{State: cpWanted, Purpose: forSuspend}
	for _, tt := range []struct {
		name   string
		c      *argonv1.Checkpoint
		m      *argonv1.Machine
		seen   machineSeen
		begun  bool
		barred bool
		want   checkpointStep
	}{
		{name: "wanted", c: wantedNow, m: placed(wantRunning), seen: running, want: take},
		{name: "wanted, no lease", c: wantedNow, m: placed(wantRunning), seen: running, barred: true, want: letBe},
		{name: "of a machine elsewhere", c: wantedNow, m: &argonv1.Machine{ServerId: "b", Wanted: wantRunning, Placement: 3}, seen: running, want: letBe},
		{name: "no guest", c: wantedNow, m: placed(wantRunning), seen: machineSeen{}, want: letBe},
		{name: "stops", c: wantedNow, m: placed(wantStopped), seen: running, want: letBe},
		{name: "leaves", c: wantedNow, m: on(wantRunning, func(m *argonv1.Machine) { m.Migration = &argonv1.Migration{} }), seen: running, want: letBe},
		{name: "goes on from one", c: wantedNow, m: on(wantRunning, wakes("x")), seen: running, want: letBe},
		{name: "under way", c: begun, m: placed(wantRunning), seen: running, begun: true, want: take},
		{name: "begun by an earlier run", c: begun, m: placed(wantRunning), seen: running, want: abandon},
		{name: "begun elsewhere", c: &argonv1.Checkpoint{State: cpTaking, ServerId: "b"}, m: placed(wantRunning), seen: running, want: letBe},
		{name: "taken meanwhile", c: &argonv1.Checkpoint{State: cpReady, ServerId: "a"}, m: placed(wantRunning), seen: running, begun: true, want: letBe},
		{name: "to be suspended", c: toSuspend, m: placed(wantSuspended), seen: running, want: take},
		{name: "to be suspended, not any more", c: toSuspend, m: placed(wantRunning), seen: running, want: letBe},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := nextForCheckpoint(tt.c, tt.m, "a", tt.seen, tt.begun, !tt.barred); got != tt.want {
				t.Errorf("next is %v, want %v", got, tt.want)
			}
		})
	}
}

// checkpoint asks for one, as the API does.
func (w *world) checkpoint(purpose argonv1.CheckpointPurpose) string {
	w.t.Helper()
	st := w.view.State()
	ids := placement.CheckpointIDs{Checkpoint: catalog.NewID(), Memory: catalog.NewID()}
	c, memory, err := placement.NewCheckpoint(st, st.Machines["m"], "then", purpose, ids, time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	txn := w.store.Txn().Create(c).Create(memory)
	if purpose == forSuspend {
		m := proto.CloneOf(st.Machines["m"])
		m.Wanted = wantSuspended
		txn.Put(m)
	}
	if err := txn.Commit(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return ids.Checkpoint
}

// wakeFrom lets the stopped machine go on from a checkpoint, as the API does.
func (w *world) wakeFrom(id string) {
	w.t.Helper()
	if _, err := w.store.Machines.Update(w.t.Context(), "m", func(m *argonv1.Machine) error {
		m.Wanted, m.Wake = wantRunning, &argonv1.Wake{CheckpointId: id}
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
}

func atRest(state argonv1.MachineState) func(*catalog.State) bool {
	return func(st *catalog.State) bool {
		m := st.Machines["m"]
		return m.GetServerId() == "" && m.GetStatus().GetState() == state
	}
}

// the guest of the machine, wherever it runs.
func (w *world) mind() string {
	w.t.Helper()
	return w.hosts[w.view.State().Machines["m"].GetServerId()].guest().Mind()
}

func TestCheckpointAndResume(t *testing.T) {
	for name, pausedOnly := range map[string]bool{"runs on": false, "stands still": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "a", "b")
			w.create(2, "a", "b")
			m := w.runs(0)
			g := w.hosts[m.GetServerId()].guest()
			g.Think("then")
			if pausedOnly {
				g.SavePausedOnly()
			}
			id := w.checkpoint(manual)
			c := w.until("taken", func(st *catalog.State) bool { return st.Checkpoints[id].GetState() == cpReady }).Checkpoints[id]
			if c.GetTaken() == nil || (c.GetPausedBecause() != "") != pausedOnly || c.GetSnapshots()["v"] == 0 {
				t.Errorf("taken: %v", c)
			}
			w.tells("checkpoint-taken")
			w.until("running", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetState() == stateRunning })
			g.Think("later")
			w.want(wantStopped)
			w.until("stopped", atRest(stateStopped))
			w.wakeFrom(id)
			w.runs(m.GetPlacement())
			if got := w.mind(); got != "then" || w.guests() != 1 {
				t.Errorf("it remembers %q; %d guests run", got, w.guests())
			}
			if st := w.view.State(); st.Machines["m"].GetWake() != nil || st.Checkpoints[id].GetState() != cpReady {
				t.Errorf("after it went on: %v, %v", st.Machines["m"], st.Checkpoints[id])
			}
		})
	}
}

// All disks of a machine are in its checkpoint, of one group, and all are what
// they were when it goes on from there.
func TestCheckpointOfSeveralDisks(t *testing.T) {
	w := newWorld(t, "a", "b")
	for _, id := range []string{"w", "x"} {
		v := &argonv1.Volume{Meta: &argonv1.Meta{Id: id, Name: id}, SizeBytes: gib, ReplicasWanted: 1, NextReplicaId: 2, Replicas: []*argonv1.Replica{
			{Id: 1, ServerId: "a", State: argonv1.ReplicaState_REPLICA_STATE_CREATING},
		}}
		if err := w.store.Volumes.Create(t.Context(), v); err != nil {
			t.Fatal(err)
		}
	}
	w.create(2, "a", "b")
	if _, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
		m.VolumeIds = []string{"v", "w", "x"}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	m := w.runs(0)
	id := w.checkpoint(manual)
	st := w.until("taken", func(st *catalog.State) bool { return st.Checkpoints[id].GetState() == cpReady })
	c := st.Checkpoints[id]
	for _, disk := range []string{"v", "w", "x"} {
		s := placement.Snapshot(st.Volumes[disk], c.GetSnapshots()[disk])
		if s.GetGroup() != id || s.GetGroupSize() != 4 {
			t.Errorf("disk %s: %v", disk, s)
		}
	}
	if why := placement.Unusable(st, c); why != "" {
		t.Error(why)
	}
	w.want(wantStopped)
	w.until("stopped", atRest(stateStopped))
	w.wakeFrom(id)
	w.runs(m.GetPlacement())
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, disk := range []string{"v", "w", "x"} {
		if got := w.rolledBack[disk]; got != c.GetSnapshots()[disk] || got == 0 {
			t.Errorf("disk %s was rolled back to snapshot %d, not to %d", disk, got, c.GetSnapshots()[disk])
		}
	}
}

// Whatever fails while a checkpoint is taken: in the end there is one guest, and
// nothing is left of what was begun.
func TestCheckpointFails(t *testing.T) {
	for name, fail := range map[string]func(w *world, h *host) error{
		"the volumes": func(*world, *host) error { return errors.New("one of them does not stand still") },
		"the guest":   func(_ *world, h *host) error { h.guest().Exit(); return nil },
		"its saving":  func(_ *world, h *host) error { h.guest().FailSave(errors.New("no room")); return nil },
		"the server": func(w *world, h *host) error {
			h.crashed.Store(true)
			h.monitor.KillAll()
			_, err := w.cli.Revoke(w.t.Context(), h.lease)
			h.lease = 0
			return errors.Join(err, errors.New("its server is gone"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "a", "b")
			w.create(2, "a", "b")
			m := w.runs(0)
			h := w.hosts[m.GetServerId()]
			w.atInstant = func() error { return fail(w, h) }
			id := w.checkpoint(manual)
			st := w.until("given up, with nothing left", func(st *catalog.State) bool {
				c := st.Checkpoints[id]
				return c.GetState() == cpFailed && len(st.Volumes) == 1 && len(st.Volumes["v"].GetSnapshots()) <= 1
			})
			for _, s := range st.Volumes["v"].GetSnapshots() {
				if !s.GetRemoving() {
					t.Errorf("a snapshot stays: %v", s)
				}
			}
			w.tells("checkpoint-failed")
			if h.guest() != nil && h.guest().Prepared() {
				t.Error("what the guest took to be saved was not given back")
			}
			w.until("running", func(st *catalog.State) bool {
				return st.Machines["m"].GetStatus().GetState() == stateRunning && w.guests() == 1
			})
		})
	}
}

// A machine is removed while its checkpoint is taken: nothing is left of either.
func TestRemovedInACheckpoint(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	w.atInstant = func() error {
		_, err := w.store.Machines.Update(context.Background(), "m", func(m *argonv1.Machine) error {
			m.Wanted, m.ForceStop = wantRemoved, true
			return nil
		})
		return err
	}
	w.checkpoint(manual)
	st := w.until("gone", func(st *catalog.State) bool {
		return len(st.Machines) == 0 && len(st.Checkpoints) == 0 && len(st.Volumes) == 1
	})
	w.until("without snapshots", func(st *catalog.State) bool { return len(st.Volumes["v"].GetSnapshots()) == 0 })
	if w.guests() != 0 || st.Volumes["v"] == nil {
		t.Errorf("%d guests run; volumes: %v", w.guests(), st.Volumes)
	}
}

// A checkpoint whose disks are not whole is none, however well its memory was
// written.
func TestCheckpointWithoutItsDisks(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	w.lateDisks = true
	id := w.checkpoint(manual)
	asked := w.until("asked for", func(st *catalog.State) bool {
		return len(st.Volumes["v"].GetSnapshots()) > 0 || st.Checkpoints[id].GetState() == cpReady
	})
	if asked.Checkpoints[id].GetState() == cpReady {
		t.Fatal("it is whole without its disk")
	}
	if _, err := w.store.Volumes.Update(t.Context(), "v", func(v *argonv1.Volume) error {
		v.Snapshots = nil
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	st := w.until("decided", func(st *catalog.State) bool {
		state := st.Checkpoints[id].GetState()
		return state != cpWanted && state != cpTaking
	})
	if c := st.Checkpoints[id]; c.GetState() != cpFailed || !strings.Contains(c.GetReason(), "snapshot of volume v was removed") {
		t.Errorf("it ended as %v: %s", c.GetState(), c.GetReason())
	}
	w.until("running", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetState() == stateRunning })
}

// What a machine is to do changes while its memory is read: the guest that was
// made of that never goes on, and the memory is not used up.
func TestNotWokenAfterAll(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	m := w.runs(0)
	id := w.checkpoint(forSuspend)
	w.until("suspended", atRest(stateSuspended))
	woken := make(chan *fake.Guest, 100)
	var once sync.Once
	w.atWake = func(g *fake.Guest) {
		once.Do(func() {
			_, err := w.store.Machines.Update(context.Background(), "m", func(m *argonv1.Machine) error {
				m.Wanted = wantSuspended
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			woken <- g
		})
	}
	w.want(wantRunning)
	g := <-woken
	<-g.Done()
	if n := g.Resumed(); n != 0 {
		t.Errorf("the guest was told to go on %d times", n)
	}
	st := w.until("suspended again", atRest(stateSuspended))
	if st.Machines["m"].GetWake().GetCheckpointId() != id || st.Checkpoints[id].GetState() != cpReady {
		t.Errorf("its memory is %v, wanted for %v", st.Checkpoints[id], st.Machines["m"].GetWake())
	}
	w.want(wantRunning)
	w.runs(m.GetPlacement())
	if w.guests() != 1 {
		t.Errorf("%d guests run", w.guests())
	}
}

// A daemon that is killed while the guest stands still: the next one lets it go
// on, and gives the checkpoint up.
func TestDaemonEndsInACheckpoint(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	h := w.hosts["a"]
	g := h.guest()
	stands, ended := make(chan struct{}), make(chan struct{})
	w.atInstant = func() error {
		close(stands)
		<-ended
		return errors.New("killed")
	}
	id := w.checkpoint(manual)
	<-stands
	h.crashed.Store(true)
	h.stop()
	close(ended)
	<-h.done
	_ = g.Pause(t.Context())
	h.start()
	w.until("given up", func(st *catalog.State) bool { return st.Checkpoints[id].GetState() == cpFailed })
	w.until("running again", func(*catalog.State) bool {
		s, _ := g.Status(t.Context())
		return s.State == "running" || h.guest() != g
	})
	if h.guest() != g || h.monitor.Starts() != 1 {
		t.Error("the guest was started anew")
	}
}

// The guest of a machine that is being suspended, found standing still by a daemon
// that does not know how that ended: it must not go on before the record says that
// it was not saved.
func TestFoundWhileItIsSuspended(t *testing.T) {
	found := func(state argonv1.CheckpointState, wanted argonv1.Wanted) machineStep {
		g := &guest{guestSeen: runningGuest()}
		standing(&g.guestSeen)
		g.arriving = true // as adopt has it
		local := &machine{guests: map[uint64]*guest{3: g}}
		a := New(Options{ServerID: "a"})
		a.machines["m"], a.probe = local, &hypervisor.Probe{}
		m := placed(wanted)
		st := &catalog.State{
			Machines:    map[string]*argonv1.Machine{"m": m},
			Checkpoints: map[string]*argonv1.Checkpoint{"c": {Meta: &argonv1.Meta{Id: "c"}, MachineId: "m", Purpose: forSuspend, State: state, ServerId: "a", Placement: 3}},
		}
		p := &plan{agent: a, st: st, now: noon, allowed: true, jobs: map[string]job{}}
		step, _ := nextForMachine(m, "a", p.seeMachine("machine/m", m, local), true, noon)
		return step
	}
	if got := found(cpTaking, wantSuspended); got != rest {
		t.Errorf("while it is being saved: %v", got)
	}
	if got := found(cpFailed, wantRunning); got != goOn {
		t.Errorf("once it is given up: %v", got)
	}
}

func TestSuspendAndResume(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	m := w.runs(0)
	for range 2 { // the second time from the guest that was woken
		w.hosts[w.view.State().Machines["m"].GetServerId()].guest().Think("there")
		id := w.checkpoint(forSuspend)
		st := w.until("suspended", atRest(stateSuspended))
		if got := st.Machines["m"].GetWake().GetCheckpointId(); got != id || w.guests() != 0 {
			t.Fatalf("suspended to %q; %d guests run", got, w.guests())
		}
		w.hosts[m.GetServerId()].kill() // as if nothing were
		w.hosts[m.GetServerId()].start()
		if _, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
			m.Wanted = wantRunning
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		m = w.runs(m.GetPlacement())
		if got := w.mind(); got != "there" || w.guests() != 1 {
			t.Errorf("it remembers %q; %d guests run", got, w.guests())
		}
		w.until("its memory is used up", func(st *catalog.State) bool { return len(st.Checkpoints) == 0 && len(st.Volumes) == 1 })
	}
}

// What can't be saved is not suspended: it runs on.
func TestSuspendFails(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	g := w.hosts["a"].guest()
	g.FailSave(errors.New("no room"))
	id := w.checkpoint(forSuspend)
	w.until("running on", func(st *catalog.State) bool {
		return st.Checkpoints[id].GetState() == cpFailed && st.Machines["m"].GetWanted() == wantRunning && st.Machines["m"].GetStatus().GetState() == stateRunning
	})
	if w.hosts["a"].guest() != g {
		t.Error("the guest was started anew")
	}
}

// A memory that was whole when it was checked, and is not when it is read: nobody
// tries that for ever.
func TestDamagedAfterTheCheck(t *testing.T) {
	for name, orStart := range map[string]bool{"asked for": false, "by its policy": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "a")
			w.create(1, "a")
			m := w.runs(0)
			id := w.checkpoint(manual)
			st := w.until("taken", func(st *catalog.State) bool { return st.Checkpoints[id].GetState() == cpReady })
			w.want(wantStopped)
			w.until("stopped", atRest(stateStopped))
			w.hosts["a"].monitor.Fail(errors.New("not yet"))
			if _, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
				m.Wanted, m.Wake = wantRunning, &argonv1.Wake{CheckpointId: id, OrStart: orStart}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			w.until("checked", func(st *catalog.State) bool { return st.Machines["m"].GetWake().GetChecked() })
			w.damage(st.Checkpoints[id].GetMemoryVolumeId())
			w.hosts["a"].monitor.Fail(nil)
			if orStart {
				w.runs(m.GetPlacement())
			} else {
				w.until("stopped again", atRest(stateStopped))
			}
			w.tells("machine-not-resumed")
		})
	}
}

// Reading a large memory takes its time: that it goes on is told now and then.
func TestReadingIsFollowed(t *testing.T) {
	now, said := noon, []string(nil)
	r := &followed{
		Reader: iotest.OneByteReader(strings.NewReader("memory")), total: 6, told: noon,
		now:  func() time.Time { now = now.Add(time.Second); return now },
		tell: func(far string) { said = append(said, far) },
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != "memory" {
		t.Errorf("%q, %v", got, err)
	}
	if want := []string{"3 B of 6 B", "6 B of 6 B"}; !slices.Equal(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}
}

// A lost machine with the policy to be resumed goes on from its last checkpoint;
// with none, or with one that is damaged, it starts.
func TestLostAndResumed(t *testing.T) {
	for name, c := range map[string]struct {
		take, damage bool
		want         string
	}{
		"from a checkpoint":    {take: true, want: "then"},
		"without one":          {},
		"from one that is bad": {take: true, damage: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "a", "b")
			w.create(2, "a", "b")
			m := w.runs(0)
			if _, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
				m.OnLoss = argonv1.OnLoss_ON_LOSS_RESUME
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			w.hosts[m.GetServerId()].guest().Think("then")
			if c.take {
				id := w.checkpoint(manual)
				st := w.until("taken", func(st *catalog.State) bool { return st.Checkpoints[id].GetState() == cpReady })
				if c.damage {
					w.damage(st.Checkpoints[id].GetMemoryVolumeId())
				}
			}
			w.hosts[m.GetServerId()].kill()
			w.runs(m.GetPlacement())
			if got := w.mind(); got != c.want || w.guests() != 1 {
				t.Errorf("it remembers %q; %d guests run", got, w.guests())
			}
			if c.want == "" {
				w.tells("machine-not-resumed")
			}
		})
	}
}

// damage changes the stream on a volume.
func (w *world) damage(volumeID string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	overwrite(w.t, w.content[volumeID])
}

func overwrite(t *testing.T, dev *volumetest.MemDevice) {
	t.Helper()
	done := make(chan error, 1)
	dev.Submit(&device.Request{Op: device.OpZero, Off: 0, Len: 512, Done: func(err error) { done <- err }})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
