package controller

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const suspend = argonv1.Wanted_WANTED_SUSPENDED

// checkpoint adds a checkpoint of machine m with its memory and the snapshot of
// volume v.
func (f fixture) checkpoint(id string, state argonv1.CheckpointState, age time.Duration) *argonv1.Checkpoint {
	if f.Checkpoints == nil {
		f.State.Checkpoints = map[string]*argonv1.Checkpoint{}
	}
	c := &argonv1.Checkpoint{
		Meta: meta(id), MachineId: "m", State: state, Purpose: argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_MANUAL,
		MemoryVolumeId: "memory-" + id, Snapshots: map[string]uint32{"v": 1}, Machine: &argonv1.Machine{VolumeIds: []string{"v"}, GenerationId: "as-then"},
	}
	if m := f.Machines["m"]; m != nil && len(m.GetVolumeIds()) == 0 {
		m.VolumeIds = []string{"v"} // those of the checkpoint
	}
	c.Meta.Created = timestamppb.New(noon.Add(-age))
	f.Checkpoints[id] = c
	f.volume("memory-"+id, 1, "b:in").CheckpointId = id
	if v := f.Volumes["v"]; v == nil {
		f.volume("v", 2, "a:in", "b:in").Snapshots = []*argonv1.Snapshot{
			{Id: 1, State: argonv1.SnapshotState_SNAPSHOT_STATE_READY, ReplicaIds: []uint32{1, 2}},
		}
	}
	return c
}

// planned is the cluster as a plan makes it, as far as it is about m and c.
func planned(f fixture) (m *argonv1.Machine, c *argonv1.Checkpoint, events []string) {
	m, c = f.Machines["m"], f.Checkpoints["c"]
	for _, a := range f.plan(0) {
		for _, rec := range a.Put {
			switch r := rec.(type) {
			case *argonv1.Machine:
				m = r
			case *argonv1.Checkpoint:
				if r.GetMeta().GetId() == "c" {
					c = r
				}
			}
		}
		if slices.ContainsFunc(a.Events, func(e *argonv1.Event) bool { return e.GetKind() == "machine" }) {
			events = append(events, a.Events[len(a.Events)-1].GetReason())
			for _, e := range a.Events[:len(a.Events)-1] {
				events = append(events, e.GetReason())
			}
		}
	}
	return m, c, events
}

func TestLostMachineIsResumed(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(f fixture, m *argonv1.Machine)
		wake   string
		event  string
	}{
		{"from its last checkpoint", func(f fixture, _ *argonv1.Machine) {
			f.checkpoint("b", cpReady, time.Hour)
			f.checkpoint("c", cpReady, time.Minute)
		}, "c", "machine-resumed-from"},
		{"not from one that is not whole", func(f fixture, _ *argonv1.Machine) {
			f.checkpoint("b", cpReady, time.Hour)
			f.checkpoint("c", cpTaking, time.Minute).ServerId = "a"
		}, "b", "machine-resumed-from"},
		{"without one", func(fixture, *argonv1.Machine) {}, "", "machine-not-resumed"},
		{"its snapshot is gone", func(f fixture, _ *argonv1.Machine) {
			f.checkpoint("c", cpReady, time.Minute)
			f.Volumes["v"].Snapshots = nil
		}, "", "machine-not-resumed"},
		{"its memory is on the lost server only", func(f fixture, _ *argonv1.Machine) {
			f.checkpoint("c", cpReady, time.Minute)
			f.Volumes["memory-c"].Replicas[0].ServerId = "a"
		}, "", "machine-not-resumed"},
		{"while it was being suspended", func(f fixture, m *argonv1.Machine) {
			f.checkpoint("c", cpReady, time.Minute)
			m.Status.State = argonv1.MachineState_MACHINE_STATE_SUSPENDING
		}, "c", "machine-resumed-from"},
		{"restarted, as its policy says", func(f fixture, m *argonv1.Machine) {
			f.checkpoint("c", cpReady, time.Minute)
			m.OnLoss = argonv1.OnLoss_ON_LOSS_RESTART
		}, "", ""},
		{"it did not run yet", func(f fixture, m *argonv1.Machine) {
			f.checkpoint("c", cpReady, time.Minute)
			m.Status.State = starting
		}, "", ""},
		{"while it goes on from an older one", func(f fixture, m *argonv1.Machine) {
			f.checkpoint("c", cpReady, time.Minute)
			m.Wake = &argonv1.Wake{CheckpointId: "b"}
		}, "b", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture("a", "b").dead("a")
			m := f.machine("m", "a", run, running)
			m.OnLoss, m.GenerationId = argonv1.OnLoss_ON_LOSS_RESUME, "as-before"
			tt.change(f, m)
			got, _, events := planned(f)
			if got.GetWake().GetCheckpointId() != tt.wake || got.GetServerId() != "b" {
				t.Errorf("on %s, from %v", got.GetServerId(), got.GetWake())
			}
			if goesBack := tt.event == "machine-resumed-from"; (got.GetGenerationId() != m.GetGenerationId()) != goesBack {
				t.Errorf("its generation is %q", got.GetGenerationId())
			}
			if says := slices.Contains(events, "machine-resumed-from") || slices.Contains(events, "machine-not-resumed"); says != (tt.event != "") || says && !slices.Contains(events, tt.event) {
				t.Errorf("events %v, want %q", events, tt.event)
			}
		})
	}
}

// Whatever happens while a machine is suspended: it is the guest that counts or
// the memory.
func TestSuspension(t *testing.T) {
	taking := func(f fixture) *argonv1.Checkpoint {
		c := f.checkpoint("c", cpTaking, time.Minute)
		c.Purpose, c.Snapshots, c.ServerId, c.Placement = forSuspend, nil, "a", 3
		return c
	}
	for _, tt := range []struct {
		name   string
		change func(f fixture, m *argonv1.Machine)
		wanted argonv1.Wanted
		server string
		state  argonv1.CheckpointState
	}{
		{"under way", func(f fixture, _ *argonv1.Machine) { taking(f) }, suspend, "a", cpTaking},
		{"its server is lost before", func(f fixture, _ *argonv1.Machine) { taking(f); f.dead("a") }, run, "a", cpFailed},
		{"its memory could not be saved", func(f fixture, _ *argonv1.Machine) { taking(f).State = cpFailed }, run, "a", cpFailed},
		{"nobody asked for its memory", func(fixture, *argonv1.Machine) {}, run, "a", 0},
		{"saved, its guest is still there", func(f fixture, m *argonv1.Machine) {
			taking(f).State = cpReady
			m.Wake = &argonv1.Wake{CheckpointId: "c"}
		}, suspend, "a", cpReady},
		{"saved, at rest", func(f fixture, m *argonv1.Machine) {
			taking(f).State = cpReady
			m.Wake, m.Status.State = &argonv1.Wake{CheckpointId: "c"}, argonv1.MachineState_MACHINE_STATE_SUSPENDED
		}, suspend, "", cpReady},
		{"saved, its server is lost", func(f fixture, m *argonv1.Machine) {
			taking(f).State = cpReady
			m.Wake = &argonv1.Wake{CheckpointId: "c"}
			f.dead("a")
		}, suspend, "", cpReady},
		{"gone on: the memory is used up", func(f fixture, m *argonv1.Machine) {
			taking(f).State = cpReady
			m.Wanted, m.Status.State = run, running
		}, run, "a", cpRemoving},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture("a", "b")
			m := f.machine("m", "a", suspend, running)
			tt.change(f, m)
			got, c, _ := planned(f)
			if got.GetWanted() != tt.wanted || got.GetServerId() != tt.server || c.GetState() != tt.state {
				t.Errorf("wanted %v on %q, memory %v", got.GetWanted(), got.GetServerId(), c.GetState())
			}
		})
	}
}

func TestSchedule(t *testing.T) {
	for _, tt := range []struct {
		name    string
		change  func(f fixture, m *argonv1.Machine)
		creates bool
		removes int
	}{
		{"the first is due", func(fixture, *argonv1.Machine) {}, true, 0},
		{"not due", func(f fixture, _ *argonv1.Machine) { f.checkpoint("c", cpReady, 20*time.Second).Purpose = scheduled }, false, 0},
		{"due again", func(f fixture, _ *argonv1.Machine) { f.checkpoint("c", cpReady, time.Minute).Purpose = scheduled }, true, 0},
		{"one failed a moment ago", func(f fixture, _ *argonv1.Machine) { f.checkpoint("c", cpFailed, time.Second).Purpose = scheduled }, false, 0},
		{"one is being taken", func(f fixture, m *argonv1.Machine) { f.checkpoint("c", cpWanted, time.Minute) }, false, 0},
		{"it does not run", func(_ fixture, m *argonv1.Machine) { m.Status.State = starting }, false, 0},
		{"there are too many", func(f fixture, _ *argonv1.Machine) {
			for _, id := range []string{"c", "d", "e", "f"} {
				f.checkpoint(id, cpReady, time.Second).Purpose = scheduled
			}
			f.checkpoint("g", cpReady, time.Second) // somebody asked for it: it stays
		}, false, 2},
		{"no room", func(f fixture, _ *argonv1.Machine) {
			for _, s := range f.Servers {
				s.Used = &argonv1.Resources{DiskBytes: 99 * gib}
			}
		}, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture("a", "b")
			m := f.machine("m", "a", run, running)
			m.CheckpointEverySeconds, m.CheckpointsKept = 30, 2
			tt.change(f, m)
			creates, removes := false, 0
			for _, a := range f.plan(0) {
				creates = creates || len(a.Create) == 2
				for _, rec := range a.Put {
					if c, ok := rec.(*argonv1.Checkpoint); ok && c.GetState() == cpRemoving {
						removes++
					}
				}
			}
			if creates != tt.creates || removes != tt.removes {
				t.Errorf("creates: %v, removes %d; want %v, %d", creates, removes, tt.creates, tt.removes)
			}
		})
	}
}
