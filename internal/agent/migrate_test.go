package agent

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// leaving is a machine of placement 3 on server a that goes to b, where it gets
// placement 5.
func leaving(phase argonv1.MigrationPhase, change ...func(*argonv1.Machine)) *argonv1.Machine {
	m := placed(wantRunning)
	m.LastPlacement = 5
	m.Migration = &argonv1.Migration{
		Id: "i", ToServerId: "b", Placement: 5, Phase: phase,
		Since: timestamppb.New(noon.Add(-time.Minute)), Deadline: timestamppb.New(noon.Add(time.Minute)),
	}
	for _, c := range change {
		c(m)
	}
	return m
}

func in(state hypervisor.RunState) *guestSeen {
	g := runningGuest()
	g.status.State = state
	return &g
}

func TestNextForMigration(t *testing.T) {
	running := migrationSeen{guest: in(hypervisor.Running), target: "b", targetAlive: true}
	with := func(change func(*migrationSeen)) migrationSeen {
		s := running
		change(&s)
		return s
	}
	tests := []struct {
		name    string
		machine *argonv1.Machine
		seen    migrationSeen
		barred  bool
		want    migrationStep
		why     string
	}{
		{name: "none", machine: placed(wantRunning), seen: running, want: stay},
		{name: "of another server", machine: leaving(copying, func(m *argonv1.Machine) { m.ServerId = "c" }), seen: running, want: stay},
		{name: "without a lease", machine: leaving(copying), seen: running, barred: true, want: stay},
		{name: "the other one is made ready", machine: leaving(preparing), seen: running, want: stay},
		{name: "send", machine: leaving(copying), seen: running, want: send},
		{name: "its disks are not here yet", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.unattached = true }), want: stay},
		{name: "it was sent before, and its disks are let go of", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.unattached, s.guest = true, in(hypervisor.Left) }), want: giveUp, why: "the server that sent it was interrupted"},
		{name: "it stands still, its disk is full", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.Paused) }), want: send},
		{name: "it is being sent", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.sending, s.guest = true, in(hypervisor.Leaving) }), want: send},
		{name: "all was sent, by this run", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.sending, s.guest = true, in(hypervisor.Left) }), want: send},
		{name: "found running, not taken up", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = &guestSeen{placement: 3} }), want: stay},
		{name: "arrived, and to go on first", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.Paused); s.guest.arriving = true }), want: stay},
		{name: "an earlier run had it stand still", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.Leaving) }), want: giveUp, why: "the server that sent it was interrupted"},
		{name: "an earlier run had sent all", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.Left) }), want: giveUp, why: "the server that sent it was interrupted"},
		{name: "an earlier order had it stand still", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.Left); s.guest.sentBy = "h" }), want: stay},
		{name: "an earlier order had it let go of its disks", machine: leaving(copying), seen: with(func(s *migrationSeen) {
			s.guest = in(hypervisor.Running)
			s.guest.sentBy, s.guest.handsOver = "h", true
		}), want: stay},
		{name: "it goes on after an earlier order", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.Running); s.guest.sentBy = "h" }), want: send},
		{name: "it was sent, and what then was is not recorded", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.Left); s.guest.sentBy = "i" }), want: giveUp, why: "the server that sent it was interrupted"},
		{name: "cancelled", machine: leaving(copying, func(m *argonv1.Machine) { m.Migration.Cancel = true }), seen: with(func(s *migrationSeen) { s.sending = true }), want: giveUp, why: "it was cancelled"},
		{name: "cancelled before it began", machine: leaving(preparing, func(m *argonv1.Machine) { m.Migration.Cancel = true }), seen: running, want: giveUp, why: "it was cancelled"},
		{name: "to stop", machine: leaving(copying, func(m *argonv1.Machine) { m.Wanted = wantStopped }), seen: running, want: giveUp, why: "the machine is to stop"},
		{name: "the other server is lost", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.targetAlive = false }), want: giveUp, why: "server b was lost"},
		{name: "the other server is lost while it is made ready", machine: leaving(preparing), seen: with(func(s *migrationSeen) { s.targetAlive = false }), want: giveUp, why: "server b was lost"},
		{name: "not too late", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.lasts = 119 * time.Second }), want: send},
		{name: "too late", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.lasts = 2 * time.Minute }), want: giveUp, why: "it was not done after 2m0s"},
		{name: "the guest is gone", machine: leaving(preparing), seen: with(func(s *migrationSeen) { s.guest = nil }), want: giveUp, why: "the guest has ended"},
		{name: "the guest has powered itself off", machine: leaving(copying), seen: with(func(s *migrationSeen) { s.guest = in(hypervisor.ShutDown) }), want: giveUp, why: "the guest has ended"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, why := nextForMigration(tt.machine, "a", tt.seen, !tt.barred)
			if got != tt.want || why != tt.why {
				t.Errorf("next is %v %q, want %v %q", got, why, tt.want, tt.why)
			}
		})
	}
}

// What the two servers do with the guests of a machine on its way.
func TestNextForMachineOnItsWay(t *testing.T) {
	guest := func(state hypervisor.RunState, placement uint64, change ...func(*guestSeen)) machineSeen {
		g := *in(state)
		g.placement = placement
		for _, c := range change {
			c(&g)
		}
		return machineSeen{guests: []guestSeen{g}, disks: disksSeen{ready: true}}
	}
	arriving := func(g *guestSeen) { g.arriving = true }
	ready := machineSeen{disks: disksSeen{ready: true}}
	there := placed(wantRunning)
	there.ServerId, there.Placement = "b", 5
	tests := []struct {
		name    string
		server  string
		machine *argonv1.Machine
		seen    machineSeen
		barred  bool
		want    machineStep
	}{
		{name: "makes one that waits", server: "b", machine: leaving(preparing), seen: ready, want: receive},
		{name: "not without a lease", server: "b", machine: leaving(preparing), seen: ready, barred: true, want: rest},
		{name: "not before its disks' sockets are there", server: "b", machine: leaving(preparing), want: rest},
		{name: "not a second one", server: "b", machine: leaving(copying), seen: ready, want: rest},
		{name: "not beside an old one", server: "b", machine: leaving(preparing), seen: guest(hypervisor.Running, 2), want: kill},
		{name: "not on a third server", server: "c", machine: leaving(preparing), seen: ready, want: rest},
		{name: "says that it waits", server: "b", machine: leaving(preparing), seen: guest(hypervisor.Receiving, 5, arriving), want: announceIt},
		{name: "waits", server: "b", machine: leaving(copying), seen: guest(hypervisor.Receiving, 5, arriving), want: rest},
		{name: "has all, and waits for the record", server: "b", machine: leaving(copying), seen: guest(hypervisor.Paused, 5, arriving), want: rest},
		{name: "of an earlier attempt", server: "b", machine: leaving(copying), seen: guest(hypervisor.Receiving, 4, arriving), want: kill},
		{name: "the order is gone", server: "b", machine: placed(wantRunning), seen: guest(hypervisor.Paused, 5, arriving), want: kill},
		{name: "the machine's own now", server: "b", machine: there, seen: guest(hypervisor.Paused, 5, arriving), want: goOn},
		{name: "not without a lease, either", server: "b", machine: there, seen: guest(hypervisor.Paused, 5, arriving), barred: true, want: rest},
		{name: "goes on", server: "b", machine: there, seen: guest(hypervisor.Running, 5), want: rest},
		{name: "sends", server: "a", machine: leaving(copying), seen: guest(hypervisor.Running, 3), want: rest},
		{name: "stands still", server: "a", machine: leaving(copying), seen: guest(hypervisor.Leaving, 3), want: rest},
		{name: "was sent", server: "a", machine: leaving(copying), seen: guest(hypervisor.Left, 3), want: rest},
		{name: "was sent, and stays", server: "a", machine: placed(wantRunning), seen: guest(hypervisor.Left, 3), want: goOn},
		{name: "was sent by an earlier order, and stays", server: "a", machine: leaving(copying), seen: guest(hypervisor.Left, 3, func(g *guestSeen) { g.sentBy = "h" }), want: goOn},
		{name: "runs by itself, and has no disks", server: "a", machine: placed(wantRunning), seen: guest(hypervisor.Running, 3, func(g *guestSeen) { g.handsOver = true }), want: goOn},
		{name: "was sent, and moved", server: "a", machine: there, seen: guest(hypervisor.Left, 3), want: kill},
		{name: "was sent, and is to stop: first it goes on", server: "a", machine: placed(wantStopped), seen: guest(hypervisor.Left, 3), want: goOn},
		{name: "is being sent, and is to stop: that is ended first", server: "a", machine: leaving(copying, func(m *argonv1.Machine) { m.Wanted = wantStopped }), seen: guest(hypervisor.Left, 3), want: rest},
		{name: "by force", server: "a", machine: leaving(copying, func(m *argonv1.Machine) { m.Wanted, m.ForceStop = wantStopped, true }), seen: guest(hypervisor.Left, 3), want: kill},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, _ := nextForMachine(tt.machine, tt.server, tt.seen, !tt.barred, noon); got != tt.want {
				t.Errorf("next is %v, want %v", got, tt.want)
			}
		})
	}
}

// Whatever two servers see of one record, only one of them lets a guest run.
func TestOneServerLetsItRun(t *testing.T) {
	states := []hypervisor.RunState{hypervisor.Running, hypervisor.Paused, hypervisor.Receiving, hypervisor.Leaving, hypervisor.Left}
	rapid.Check(t, func(t *rapid.T) {
		m := placed(rapid.SampledFrom([]argonv1.Wanted{wantRunning, wantStopped}).Draw(t, "wanted"))
		m.ServerId = rapid.SampledFrom([]string{"a", "b", ""}).Draw(t, "server")
		if rapid.Bool().Draw(t, "on its way") {
			m.Migration = leaving(rapid.SampledFrom([]argonv1.MigrationPhase{preparing, copying}).Draw(t, "phase")).GetMigration()
		}
		m.Placement = rapid.SampledFrom([]uint64{3, 5}).Draw(t, "placement")
		lets := 0
		for _, server := range []string{"a", "b"} {
			g := *in(rapid.SampledFrom(states).Draw(t, server+" state"))
			g.arriving, g.handsOver = rapid.Bool().Draw(t, server+" arriving"), rapid.Bool().Draw(t, server+" hands over")
			g.sentBy = rapid.SampledFrom([]string{"", "h", "i"}).Draw(t, server+" sent by")
			g.placement = map[string]uint64{"a": 3, "b": 5}[server]
			step, _ := nextForMachine(m, server, machineSeen{guests: []guestSeen{g}, disks: disksSeen{ready: true}}, true, noon)
			if step == goOn || step == resume || step == start {
				lets++
				if !belongs(m, server) || m.GetPlacement() != g.placement {
					t.Errorf("server %s lets one run that is not the machine's own", server)
				}
			}
		}
		if lets > 1 {
			t.Error("two servers let it run")
		}
	})
}

// A guest that stands still for a moment so that it can be sent does not count as
// paused; one that stands still for another reason does.
func TestObserveGuestThatIsSent(t *testing.T) {
	for _, tt := range []struct {
		detail, sentBy string
		want           bool
	}{{"paused", "i", false}, {"io-error", "i", true}, {"paused", "h", true}, {"paused", "", true}} {
		g := *in(hypervisor.Paused)
		g.status.Detail, g.sentBy = tt.detail, tt.sentBy
		o, ok := observe(leaving(copying), "a", machineSeen{guests: []guestSeen{g}, disks: disksSeen{ready: true}}, true)
		if ok != tt.want || ok && o.state != statePaused {
			t.Errorf("stands still for %q, sent by %q: %v, observed %v", tt.detail, tt.sentBy, ok, o.state)
		}
	}
}
