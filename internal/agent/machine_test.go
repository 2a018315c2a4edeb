package agent

import (
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	wantRunning = argonv1.Wanted_WANTED_RUNNING
	wantStopped = argonv1.Wanted_WANTED_STOPPED
	wantRemoved = argonv1.Wanted_WANTED_REMOVED
)

// noon is when every decision is made.
var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// placed is a machine on server a with placement 3.
func placed(wanted argonv1.Wanted) *argonv1.Machine {
	return &argonv1.Machine{
		Meta: &argonv1.Meta{Id: "m", Name: "web"}, ServerId: "a", Placement: 3, Wanted: wanted, StopTimeoutSeconds: 10,
	}
}

// shared gives a machine shares.
func shared(m *argonv1.Machine) *argonv1.Machine {
	m.Shares = &argonv1.Shares{CpuPercent: 50, CpuWeight: 10, DiskIops: 100, DiskBytesPerSecond: 1 << 20}
	return m
}

// runningGuest is an adopted guest of placement 3.
func runningGuest() guestSeen {
	return guestSeen{placement: 3, adopted: true, status: hypervisor.Status{State: hypervisor.Running}}
}

func standing(g *guestSeen) { g.status = hypervisor.Status{State: hypervisor.Paused, Detail: "paused"} }

// fresh: its processors have not run.
func fresh(g *guestSeen) { g.status = hypervisor.Status{State: hypervisor.Paused, Detail: "prelaunch"} }

// on is a machine that is placed here, with changes.
func on(wanted argonv1.Wanted, changes ...func(*argonv1.Machine)) *argonv1.Machine {
	m := placed(wanted)
	for _, change := range changes {
		change(m)
	}
	return m
}

// grown says that the disks have size 2.
func grown(s machineSeen) machineSeen {
	s.disks.sizes = []uint64{2}
	return s
}

const wantSuspended = argonv1.Wanted_WANTED_SUSPENDED

func wakes(checkpoint string) func(*argonv1.Machine) {
	return func(m *argonv1.Machine) { m.Wake = &argonv1.Wake{CheckpointId: checkpoint} }
}

func checked(m *argonv1.Machine) { m.Wake.Checked = true }

func TestNextForMachine(t *testing.T) {
	with := func(change func(*guestSeen)) machineSeen {
		g := runningGuest()
		change(&g)
		return machineSeen{guests: []guestSeen{g}, disks: disksSeen{ready: true, held: true}}
	}
	ready := machineSeen{disks: disksSeen{ready: true, held: true}}
	ioError := func(g *guestSeen) { g.status = hypervisor.Status{State: hypervisor.Paused, Detail: "io-error"} }
	tests := []struct {
		name    string
		machine *argonv1.Machine
		seen    machineSeen
		barred  bool
		want    machineStep
	}{
		{name: "start", machine: placed(wantRunning), seen: ready, want: start},
		{name: "not without a lease", machine: placed(wantRunning), seen: ready, barred: true, want: rest},
		{name: "not before its disks are ready", machine: placed(wantRunning), want: rest},
		{name: "not during the pause after a failure", machine: placed(wantRunning), seen: machineSeen{disks: ready.disks, retryAt: noon.Add(1)}, want: rest},
		{name: "after the pause", machine: placed(wantRunning), seen: machineSeen{disks: ready.disks, retryAt: noon}, want: start},
		{name: "not when stopped", machine: placed(wantStopped), seen: ready, want: rest},
		{name: "not when removed", machine: placed(wantRemoved), seen: ready, want: rest},
		{name: "not here", machine: &argonv1.Machine{ServerId: "b", Wanted: wantRunning, Placement: 3}, seen: ready, want: rest},
		{name: "its shares are others now", machine: shared(placed(wantRunning)), seen: with(func(*guestSeen) {}), want: share},
		{name: "its shares are not known", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.unshared = true }), want: share},
		{name: "it has its shares", machine: shared(placed(wantRunning)), seen: with(func(g *guestSeen) { g.shares = sharesOf(shared(placed(wantRunning))) }), want: rest},
		{name: "a stop comes first", machine: shared(placed(wantStopped)), seen: with(func(*guestSeen) {}), want: pressPower},
		{name: "not anywhere", machine: &argonv1.Machine{Wanted: wantRunning, Placement: 3}, seen: ready, want: rest},
		{name: "runs", machine: placed(wantRunning), seen: with(func(*guestSeen) {}), want: rest},
		{name: "runs, without a lease: the guard sees to it", machine: placed(wantRunning), seen: with(func(*guestSeen) {}), barred: true, want: rest},
		{name: "found running", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.adopted = false }), want: adopt},
		{name: "found running, of no machine", seen: with(func(g *guestSeen) { g.adopted = false }), want: adopt},
		{name: "its machine is gone", seen: with(func(*guestSeen) {}), want: kill},
		{name: "its machine moved", machine: &argonv1.Machine{ServerId: "b", Wanted: wantRunning, Placement: 3}, seen: with(func(*guestSeen) {}), want: kill},
		{name: "of an older placement", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.placement = 2 }), want: kill},
		{name: "of an older placement, gone", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.placement, g.exited = 2, true }), want: reap},
		{name: "its disk is over", machine: placed(wantRunning), seen: machineSeen{guests: []guestSeen{runningGuest()}, disks: disksSeen{over: "deposed"}}, want: kill},
		{name: "halted a moment ago", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.haltedAt = noon.Add(1 - haltedFor) }), want: rest},
		{name: "halted", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.haltedAt = noon.Add(-haltedFor) }), want: kill},
		{name: "halted, and its memory is being saved", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.haltedAt, g.saving = noon.Add(-haltedFor), true }), want: rest},
		{name: "powered off", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.status.State = hypervisor.ShutDown }), want: kill},
		{name: "a disk has grown", machine: placed(wantRunning), seen: grown(with(func(g *guestSeen) { g.diskSizes = []uint64{1} })), want: grow},
		{name: "it knows", machine: placed(wantRunning), seen: grown(with(func(g *guestSeen) { g.diskSizes = []uint64{2} })), want: rest},
		{name: "a disk has grown, and waits", machine: placed(wantRunning), seen: func() machineSeen {
			s := grown(with(func(*guestSeen) {}))
			s.disks.ready = false
			return s
		}(), want: rest},
		{name: "gone", machine: placed(wantRunning), seen: with(func(g *guestSeen) { g.exited = true }), want: reap},
		{name: "stop", machine: placed(wantStopped), seen: with(func(*guestSeen) {}), want: pressPower},
		{name: "remove", machine: placed(wantRemoved), seen: with(func(*guestSeen) {}), want: pressPower},
		{name: "still stopping", machine: placed(wantStopped), seen: with(func(g *guestSeen) { g.powerDownAt = noon.Add(-4 * time.Second) }), want: rest},
		{name: "does not go", machine: placed(wantStopped), seen: with(func(g *guestSeen) { g.powerDownAt = noon.Add(-5 * time.Second) }), want: pressAgain},
		{name: "stopping, pressed twice", machine: placed(wantStopped), seen: with(func(g *guestSeen) { g.powerDownAt, g.pressedAgain = noon.Add(-9*time.Second), true }), want: rest},
		{name: "stops for too long", machine: placed(wantStopped), seen: with(func(g *guestSeen) { g.powerDownAt, g.stopSince = noon.Add(-9*time.Second), noon.Add(-10*time.Second) }), want: kill},
		{name: "its button can't be pressed", machine: placed(wantStopped), seen: with(func(g *guestSeen) { g.stopSince = noon.Add(-9 * time.Second) }), want: pressPower},
		{name: "its button can't be pressed for too long", machine: placed(wantStopped), seen: with(func(g *guestSeen) { g.stopSince = noon.Add(-10 * time.Second) }), want: kill},
		{name: "to stop, and stands still: it goes on to obey", machine: placed(wantStopped), seen: with(standing), want: resume},
		{name: "to stop, was told to go on just now", machine: placed(wantStopped), seen: with(func(g *guestSeen) { standing(g); g.resumedAt = noon.Add(-time.Millisecond) }), want: rest},
		{name: "to stop, and stands still for too long", machine: placed(wantStopped), seen: with(func(g *guestSeen) { standing(g); g.stopSince = noon.Add(-10 * time.Second) }), want: kill},
		{name: "never told to go on by who started it", machine: placed(wantRunning), seen: with(fresh), want: resume},
		{name: "never told to go on, no lease", machine: placed(wantRunning), seen: with(fresh), barred: true, want: rest},
		{name: "never told to go on, and to stop", machine: placed(wantStopped), seen: with(fresh), want: kill},
		{name: "stop by force", machine: func() *argonv1.Machine { m := placed(wantStopped); m.ForceStop = true; return m }(), seen: with(func(*guestSeen) {}), want: kill},
		{name: "disk was full, has room", machine: placed(wantRunning), seen: with(ioError), want: resume},
		{name: "left standing by who is gone", machine: placed(wantRunning), seen: with(standing), want: resume},
		{name: "stands still for a checkpoint", machine: placed(wantRunning), seen: with(func(g *guestSeen) { standing(g); g.saving = true }), want: rest},
		{name: "stands still on its way", machine: on(wantRunning, func(m *argonv1.Machine) { m.Migration = &argonv1.Migration{} }), seen: with(standing), want: rest},
		{name: "to be suspended", machine: placed(wantSuspended), seen: with(standing), want: rest},
		{name: "suspended", machine: on(wantSuspended, wakes("c")), seen: with(standing), want: kill},
		{name: "suspended, without a guest", machine: on(wantSuspended, wakes("c")), seen: ready, want: rest},
		{name: "its memory was in a guest of an earlier run", machine: on(wantRunning, wakes("c")), seen: with(standing), want: kill},
		{name: "woken, as the view does not show yet", machine: on(wantRunning, wakes("c")), seen: with(func(g *guestSeen) { g.wokenFrom = "c" }), want: rest},
		{name: "woken, and suspended again", machine: on(wantSuspended, wakes("d")), seen: with(func(g *guestSeen) { g.wokenFrom = "c" }), want: kill},
		{name: "to go on, not checked", machine: on(wantRunning, wakes("c")), seen: machineSeen{}, want: check},
		{name: "to go on, no lease", machine: on(wantRunning, wakes("c")), seen: ready, barred: true, want: rest},
		{name: "to go on, disks not ready", machine: on(wantRunning, wakes("c"), checked), seen: machineSeen{}, want: rest},
		{name: "to go on", machine: on(wantRunning, wakes("c"), checked), seen: ready, want: wake},
		{name: "resumed just now", machine: placed(wantRunning), seen: with(func(g *guestSeen) { ioError(g); g.resumedAt = noon.Add(-time.Millisecond) }), want: rest},
		{name: "disk is full", machine: placed(wantRunning), seen: func() machineSeen {
			s := with(func(g *guestSeen) { ioError(g); g.resumedAt = noon.Add(-2 * time.Second) })
			s.disks.full = true
			return s
		}(), want: rest},
		{name: "disk is full, tried again at times", machine: placed(wantRunning), seen: func() machineSeen {
			s := with(func(g *guestSeen) { ioError(g); g.resumedAt = noon.Add(-time.Minute) })
			s.disks.full = true
			return s
		}(), want: resume},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _ := nextForMachine(tt.machine, "a", tt.seen, !tt.barred, noon)
			if got != tt.want {
				t.Errorf("next is %v, want %v", got, tt.want)
			}
		})
	}
}

// A guest that ignores its button, and is to run again, runs.
func TestDeafGuestIsWantedAgain(t *testing.T) {
	g := runningGuest()
	state := func(m *argonv1.Machine, at time.Time) argonv1.MachineState {
		g.noteStop(m, at)
		o, _ := observe(m, "a", machineSeen{guests: []guestSeen{g}, disks: disksSeen{ready: true}}, true)
		return o.state
	}
	for _, step := range []struct {
		wanted argonv1.Wanted
		at     time.Duration
		press  bool
		want   argonv1.MachineState
	}{
		{wantRunning, 0, false, stateRunning},
		{wantStopped, 0, true, stateStopping},
		{wantRunning, 5 * time.Second, false, stateStopping},
		{wantRunning, 10 * time.Second, false, stateRunning},
		{wantStopped, 20 * time.Second, false, stateStopping},
	} {
		if got := state(placed(step.wanted), noon.Add(step.at)); got != step.want {
			t.Errorf("after %v, to be %v: %v", step.at, step.wanted, got)
		}
		if step.press {
			g.powerDownAt = noon.Add(step.at)
		}
	}
	if got := nextForStop(placed(wantStopped), g, noon.Add(20*time.Second)); got != pressPower {
		t.Errorf("to stop once more: %v", got)
	}
}

// Two guests of one machine: the old one must go before the new one may start.
func TestOldGuestGoesFirst(t *testing.T) {
	old := runningGuest()
	old.placement = 2
	seen := machineSeen{guests: []guestSeen{old}, disks: disksSeen{ready: true}}
	if step, placement := nextForMachine(placed(wantRunning), "a", seen, true, noon); step != kill || placement != 2 {
		t.Errorf("next is %v of placement %d, want kill of 2", step, placement)
	}
}

func TestObserve(t *testing.T) {
	guest := func(change func(*guestSeen)) machineSeen {
		g := runningGuest()
		g.acceleration = hypervisor.TCG
		change(&g)
		return machineSeen{guests: []guestSeen{g}, disks: disksSeen{ready: true, held: true}}
	}
	tests := []struct {
		name    string
		machine *argonv1.Machine
		seen    machineSeen
		barred  bool
		want    argonv1.MachineState // 0: nothing is said
		reason  string
	}{
		{name: "elsewhere", machine: &argonv1.Machine{ServerId: "b"}},
		{name: "runs", machine: placed(wantRunning), seen: guest(func(*guestSeen) {}), want: stateRunning},
		{name: "found running", machine: placed(wantRunning), seen: guest(func(g *guestSeen) { g.adopted = false })},
		{name: "gone", machine: placed(wantRunning), seen: guest(func(g *guestSeen) { g.exited = true })},
		{name: "an older placement", machine: placed(wantRunning), seen: guest(func(g *guestSeen) { g.placement = 2 })},
		{name: "stopping", machine: placed(wantStopped), seen: guest(func(*guestSeen) {}), want: stateStopping},
		{name: "full", machine: placed(wantRunning), seen: func() machineSeen {
			s := guest(func(g *guestSeen) { g.status = hypervisor.Status{State: hypervisor.Paused, Detail: "io-error"} })
			s.disks.waits = "volume v is full"
			return s
		}(), want: statePaused, reason: "volume v is full"},
		{name: "paused", machine: placed(wantRunning), seen: guest(func(g *guestSeen) { g.status = hypervisor.Status{State: hypervisor.Paused, Detail: "io-error"} }), want: statePaused, reason: "io-error"},
		{name: "its disk waits", machine: placed(wantRunning), seen: func() machineSeen {
			s := guest(func(*guestSeen) {})
			s.disks.waits = "volume v waits for replica 2"
			return s
		}(), want: statePaused, reason: "volume v waits for replica 2"},
		{name: "starting", machine: placed(wantRunning), seen: machineSeen{disks: disksSeen{waits: "volume v is being attached"}}, want: stateStarting, reason: "volume v is being attached"},
		{name: "its memory is read", machine: placed(wantRunning), seen: machineSeen{doing: "1 of 2", disks: disksSeen{waits: "volume v is being attached"}}, want: stateStarting, reason: "1 of 2"},
		{name: "failed", machine: placed(wantRunning), seen: machineSeen{failure: "no QEMU"}, want: stateFailed, reason: "no QEMU"},
		{name: "without a lease nothing is known", machine: placed(wantRunning), barred: true},
		{name: "stopped", machine: placed(wantStopped), want: stateStopped},
		{name: "stopped, disks still attached", machine: placed(wantStopped), seen: machineSeen{disks: disksSeen{held: true}}, want: stateStopping},
		{name: "removed", machine: placed(wantRemoved), want: stateStopped},
		{name: "powered off from inside", machine: func() *argonv1.Machine {
			m := placed(wantStopped)
			m.Status = &argonv1.MachineStatus{State: stateStopping, Reason: "powered off from inside"}
			return m
		}(), want: stateStopped, reason: "powered off from inside"},
		{name: "an old failure is no reason of a stop", machine: func() *argonv1.Machine {
			m := placed(wantStopped)
			m.Status = &argonv1.MachineStatus{State: stateFailed, Reason: "no QEMU"}
			return m
		}(), want: stateStopped},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, ok := observe(tt.machine, "a", tt.seen, !tt.barred)
			if ok != (tt.want != 0) || o.state != tt.want || o.reason != tt.reason {
				t.Errorf("observed %v (%v), want %v %q", o, ok, tt.want, tt.reason)
			}
		})
	}
}

func TestStatusCountsStartsAndKeepsTheTime(t *testing.T) {
	m := placed(wantRunning)
	step := func(o observation, at time.Time, changed bool, starts uint32, since time.Time, event string) {
		t.Helper()
		old := proto.CloneOf(m.GetStatus())
		if got := o.apply(m, "a", at); got != changed {
			t.Fatalf("%v changes the status: %v, want %v", o, got, changed)
		}
		if m.GetStatus().GetStarts() != starts || !m.GetStatus().GetSince().AsTime().Equal(since) {
			t.Fatalf("after %v: %v, want %d starts since %v", o, m.GetStatus(), starts, since)
		}
		if got := tell(m, old, "a").GetReason(); changed && got != event {
			t.Fatalf("event of %v is %q, want %q", o, got, event)
		}
	}
	at := func(s int) time.Time { return noon.Add(time.Duration(s) * time.Second) }
	step(observation{state: stateStarting}, at(0), true, 0, at(0), "")
	step(observation{state: stateStarting, reason: "disk"}, at(1), true, 0, at(0), "")
	step(observation{state: stateRunning, acceleration: "tcg"}, at(2), true, 1, at(2), "machine-started")
	step(observation{state: stateRunning, acceleration: "tcg"}, at(3), false, 1, at(2), "")
	// A daemon that took the guest up again does not know its acceleration.
	step(observation{state: stateRunning}, at(4), false, 1, at(2), "")
	step(observation{state: statePaused, reason: "full"}, at(5), true, 1, at(5), "machine-paused")
	step(observation{state: stateRunning}, at(6), true, 1, at(6), "machine-resumed")
	step(observation{state: stateFailed, reason: "crash"}, at(7), true, 1, at(7), "machine-failed")
	step(observation{state: stateRunning, acceleration: "tcg"}, at(8), true, 2, at(8), "machine-started")
	m.Placement++
	step(observation{state: statePaused, reason: "its disk waits", acceleration: "tcg"}, at(9), true, 3, at(9), "machine-started")
	step(observation{state: stateRunning, acceleration: "tcg"}, at(9), true, 3, at(9), "machine-resumed")
	step(observation{state: stateStopping}, at(10), true, 3, at(10), "")
	step(observation{state: stateStopped}, at(11), true, 3, at(11), "machine-stopped")
	// Stopped again before its guest was there: that was no start.
	step(observation{state: stateStarting}, at(12), true, 3, at(12), "")
	step(observation{state: stateStopping}, at(13), true, 3, at(13), "")
	step(observation{state: stateStopped}, at(14), true, 3, at(14), "machine-stopped")
}

func TestGuestID(t *testing.T) {
	id, placement, ok := parseGuestID(GuestID("01J9-X", 42))
	if id != "01J9-X" || placement != 42 || !ok {
		t.Errorf("got %q, %d, %v", id, placement, ok)
	}
	for _, bad := range []string{"", "m", "-1", "m-", "m-x", "m-99999999999999999999"} {
		if _, _, ok := parseGuestID(bad); ok {
			t.Errorf("%q passes for a guest's id", bad)
		}
	}
}

func TestPausesGrowToALimit(t *testing.T) {
	last := time.Duration(0)
	for n := 1; n < 40; n++ {
		if got := pauseAfter(n); got < last || got > longestPause {
			t.Fatalf("pause after %d failures is %v, after one less %v", n, got, last)
		} else {
			last = got
		}
	}
	if pauseAfter(1) != firstPause || last != longestPause {
		t.Errorf("pauses from %v to %v", pauseAfter(1), last)
	}
}
