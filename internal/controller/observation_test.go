package controller

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// TestLost: a is without a lease at noon.
func TestLost(t *testing.T) {
	leases := func(f fixture, seen Observation, at time.Time, servers ...string) Observation {
		f.dead("a", "b")
		for _, s := range servers {
			f.alive(s)
		}
		return seen.Observe(f.State, at)
	}
	for _, tt := range []struct {
		name string
		see  func(f fixture) Observation
		want bool
	}{
		{"without a lease", func(f fixture) Observation {
			return leases(f, Observation{}, noon.Add(-time.Hour), "a", "b")
		}, true},
		{"joined just now", func(f fixture) Observation {
			joined := f.Servers["a"]
			delete(f.Servers, "a")
			seen := leases(f, Observation{}, noon.Add(-time.Hour), "b")
			f.Servers["a"] = joined
			return leases(f, seen, noon.Add(-time.Second), "a", "b")
		}, false},
		{"the whole cluster is just back", func(f fixture) Observation {
			seen := leases(f, Observation{}, noon.Add(-time.Hour), "a", "b")
			seen = leases(f, seen, noon.Add(-time.Minute))
			return leases(f, seen, noon.Add(-time.Second), "b")
		}, false},
		{"the other one has another lease since a moment ago", func(f fixture) Observation {
			seen := leases(f, Observation{}, noon.Add(-time.Hour), "a", "b")
			f.alive("b")
			f.Leases["b"].Revision = 9
			return seen.Observe(f.State, noon.Add(-time.Second))
		}, false},
		{"nobody has looked before", func(fixture) Observation { return Observation{} }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture("a", "b")
			seen := tt.see(f)
			f.dead("a")
			if f.Leases["b"] == nil {
				f.alive("b")
			}
			if _, got := seen.Observe(f.State, noon).Lost["a"]; got != tt.want {
				t.Errorf("lost: %v, want %v", got, tt.want)
			}
		})
	}
	f := newFixture("a", "b")
	seen := leases(f, Observation{}, noon.Add(-time.Hour), "a", "b")
	if lost := leases(f, seen, noon).Lost; len(lost) > 0 {
		t.Errorf("%v are lost while nobody has a lease", lost)
	}
	p := &planner{st: f.State}
	if !p.lost("nobody") {
		t.Error("a server that is not in the catalog is not lost")
	}
}

// TestClocksOfOthersDoNotCount: whatever the clocks of the servers show, and
// show after they were set, a server that is gone is lost after the same time.
func TestClocksOfOthersDoNotCount(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		wrong := rapid.Custom(func(t *rapid.T) *timestamppb.Timestamp {
			return timestamppb.New(noon.Add(time.Duration(rapid.Int64Range(-1e5, 1e5).Draw(t, "seconds ahead")) * time.Second))
		})
		f := newFixture("a", "b", "c")
		for _, id := range []string{"a", "b", "c"} {
			f.Servers[id].Meta.Created = wrong.Draw(t, "created")
			f.Leases[id].Since = wrong.Draw(t, "since")
		}
		m := f.machine("m", "a", argonv1.Wanted_WANTED_RUNNING, argonv1.MachineState_MACHINE_STATE_RUNNING)
		m.Meta.Created, m.Status.Since = wrong.Draw(t, "created"), wrong.Draw(t, "since")
		begin := noon
		seen := Observation{}.Observe(f.State, begin)
		seen = seen.Observe(f.State, begin.Add(6*time.Second))
		f.dead("a")
		at := begin.Add(6*time.Second + time.Millisecond)
		seen = seen.Observe(f.State, at)
		if got := reasons(Plan(f.State, at, seen, nil)); !slices.Contains(got, "server-lost") || !slices.Contains(got, "machine-placed") {
			t.Fatalf("events %v when a is gone", got)
		}
	})
}

// TestIntervalsSurviveClocks: what is done at an interval is done again, and
// not at once, after a clock was wrong.
func TestIntervalsSurviveClocks(t *testing.T) {
	p := &planner{now: noon}
	for _, tt := range []struct {
		ago  time.Duration
		want bool
	}{
		{time.Hour, true},
		{time.Hour - time.Second, false},
		{-time.Second, false}, // clocks differ a little
		{-time.Hour, false},
		{-40 * 24 * time.Hour, true},
	} {
		if got := p.due(timestamppb.New(noon.Add(-tt.ago)), time.Hour); got != tt.want {
			t.Errorf("each hour, last done %v ago: due is %v", tt.ago, got)
		}
	}
}

func TestServersThatGoAndComeBackAreNews(t *testing.T) {
	f := newFixture("a", "b").dead("a")
	seen, told := f.watched(noon), map[string]bool{}
	step := func(at time.Duration, what string, want ...string) {
		t.Helper()
		now := noon.Add(at)
		seen = seen.Observe(f.State, now)
		if got := reasons(Plan(f.State, now, seen, told)); !slices.Equal(got, want) {
			t.Errorf("events %v when %s, want %v", got, what, want)
		}
	}
	carriedOut := func() { told = nowTold(told, f.State, seen) }
	step(0, "it is gone", "server-lost")
	step(time.Second, "the catalog did not take that", "server-lost")
	carriedOut()
	step(2*time.Second, "it is still gone")
	carriedOut()
	f.alive("a")
	step(3*time.Second, "it is back", "server-returned")
	carriedOut()
	step(4*time.Second, "it stays")
	carriedOut()
	f.dead("a")
	step(5*time.Second, "it is gone again", "server-lost")
}

// TestCheckpointsWaitByTheLeadersClock: one that is not begun is given up, and
// one that failed goes, after a time that the leader has seen pass.
func TestCheckpointsWaitByTheLeadersClock(t *testing.T) {
	for _, ahead := range []time.Duration{-48 * time.Hour, 0, 48 * time.Hour} {
		f := newFixture("a", "b")
		m := f.machine("m", "a", argonv1.Wanted_WANTED_RUNNING, argonv1.MachineState_MACHINE_STATE_RUNNING)
		m.VolumeIds = []string{"v"}
		f.checkpoint("c", cpWanted, -ahead)
		seen := f.watched(noon)
		state := func(after time.Duration) argonv1.CheckpointState {
			now := noon.Add(after)
			c := f.Checkpoints["c"]
			for _, a := range Plan(f.State, now, seen.Observe(f.State, now), nil) {
				for _, rec := range a.Put {
					if r, ok := rec.(*argonv1.Checkpoint); ok {
						c = r
					}
				}
			}
			return c.GetState()
		}
		if got := state(beginsWithin - time.Second); got != cpWanted {
			t.Errorf("a clock %v ahead: %v before its time", ahead, got)
		}
		if got := state(beginsWithin + time.Second); got != cpFailed {
			t.Errorf("a clock %v ahead: %v after its time", ahead, got)
		}
	}
}
