package controller

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const (
	run    = argonv1.Wanted_WANTED_RUNNING
	stop   = argonv1.Wanted_WANTED_STOPPED
	remove = argonv1.Wanted_WANTED_REMOVED

	pending  = argonv1.MachineState_MACHINE_STATE_PENDING
	starting = argonv1.MachineState_MACHINE_STATE_STARTING
	running  = argonv1.MachineState_MACHINE_STATE_RUNNING
	stopped  = argonv1.MachineState_MACHINE_STATE_STOPPED
)

// wantMachine is what a plan makes of a machine.
type wantMachine struct {
	server    string
	placement uint64
	state     argonv1.MachineState
	reason    string
}

func TestMachines(t *testing.T) {
	tests := []struct {
		name    string
		cluster func() fixture
		// want is nil when nothing is to be changed.
		want   *wantMachine
		events []string
	}{
		{
			name: "runs where it should",
			cluster: func() fixture {
				f := newFixture("a", "b")
				f.machine("m", "a", run, running)
				return f
			},
		},
		{
			name: "new: placed",
			cluster: func() fixture {
				f := newFixture("a", "b")
				f.machine("m", "", run, pending)
				return f
			},
			want:   &wantMachine{"a", 4, pending, "starting on a"},
			events: []string{"machine-placed"},
		},
		{
			name: "new: placed where it is to start",
			cluster: func() fixture {
				f := newFixture("a", "b")
				f.machine("m", "", run, pending).StartOn = "b"
				return f
			},
			want:   &wantMachine{"b", 4, pending, "starting on b"},
			events: []string{"machine-placed"},
		},
		{
			name: "has stopped to be restarted",
			cluster: func() fixture {
				f := newFixture("a", "b")
				m := f.machine("m", "a", run, stopped)
				m.Move, m.ForceStop = &argonv1.Move{FromServerId: "a", Placement: m.GetPlacement(), Restart: true}, true
				return f
			},
			want:   &wantMachine{"a", 4, pending, "restarted; starting on a"},
			events: []string{"machine-placed"},
		},
		{
			name: "is to be restarted, and runs yet",
			cluster: func() fixture {
				f := newFixture("a", "b")
				m := f.machine("m", "a", run, running)
				m.Move = &argonv1.Move{FromServerId: "a", Placement: m.GetPlacement(), Restart: true}
				return f
			},
		},
		{
			name: "its server is lost: moved",
			cluster: func() fixture {
				f := newFixture("a", "b").dead("a")
				f.machine("m", "a", run, running)
				return f
			},
			want:   &wantMachine{"b", 4, pending, "server a is lost; starting on b"},
			events: []string{"machine-lost", "machine-placed"},
		},
		{
			name: "its server was removed: moved",
			cluster: func() fixture {
				f := newFixture("b")
				f.machine("m", "a", run, running)
				return f
			},
			want:   &wantMachine{"b", 4, pending, "server a is lost; starting on b"},
			events: []string{"machine-lost", "machine-placed"},
		},
		{
			name: "its server is lost and no other has room: said once",
			cluster: func() fixture {
				f := newFixture("a", "b").dead("a")
				f.machine("m", "a", run, running).MemoryBytes = 64 * gib
				return f
			},
			want:   &wantMachine{"a", 3, pending, "server a is lost; no server has 65 GiB of memory free, its 64 GiB and what running it takes; the most is 18 GiB on server b"},
			events: []string{"machine-lost", "machine-unplaceable"},
		},
		{
			name: "not moved away from its only data",
			cluster: func() fixture {
				f := newFixture("a", "b").dead("a")
				f.volume("v", 1, "a:in")
				f.machine("m", "a", run, running).VolumeIds = []string{"v"}
				return f
			},
			want:   &wantMachine{"a", 3, pending, "server a is lost; its volume v is in sync only on a: start that server"},
			events: []string{"machine-lost"},
		},
		{
			name: "moved to its data",
			cluster: func() fixture {
				f := newFixture("a", "b", "c").dead("a")
				f.volume("v", 2, "a:in", "c:in")
				f.machine("m", "a", run, running).VolumeIds = []string{"v"}
				return f
			},
			want:   &wantMachine{"c", 4, pending, "server a is lost; starting on c"},
			events: []string{"machine-lost", "machine-placed"},
		},
		{
			name: "waits until its disk is made",
			cluster: func() fixture {
				f := newFixture("a")
				f.volume("v", 1, "a:new").Epoch = 0
				f.machine("m", "", run, pending).VolumeIds = []string{"v"}
				return f
			},
			want: &wantMachine{"", 3, pending, "its volume v is still being made"},
		},
		{
			name: "does not wait until an image is fetched for another replica",
			cluster: func() fixture {
				f := newFixture("a", "b")
				f.Images["i"] = &argonv1.Image{Meta: &argonv1.Meta{Id: "i"}, Copies: []*argonv1.ImageCopy{{ServerId: "a", Ready: true}, {ServerId: "b"}}}
				v := f.volume("v", 2, "a:in", "b:new")
				v.Epoch, v.Base = 0, &argonv1.Base{ImageId: "i"}
				f.machine("m", "", run, pending).VolumeIds = []string{"v"}
				return f
			},
			want:   &wantMachine{"a", 4, pending, "starting on a"},
			events: []string{"machine-placed"},
		},
		{
			name: "waits until all of its disk is made",
			cluster: func() fixture {
				f := newFixture("a", "b")
				f.volume("v", 2, "a:in", "b:new").Epoch = 0
				f.machine("m", "", run, pending).VolumeIds = []string{"v"}
				return f
			},
			want: &wantMachine{"", 3, pending, "its volume v is still being made"},
		},
		{
			name: "does not wait for a replica that can't be made",
			cluster: func() fixture {
				f := newFixture("a", "b", "c").dead("c")
				v := f.volume("v", 3, "a:in", "b:new", "c:new")
				v.Epoch, v.Replicas[1].Reason = 0, "no space left"
				f.machine("m", "", run, pending).VolumeIds = []string{"v"}
				return f
			},
			want:   &wantMachine{"a", 4, pending, "starting on a"},
			events: []string{"machine-placed"},
		},
		{
			name: "its disk does not exist any more",
			cluster: func() fixture {
				f := newFixture("a")
				f.machine("m", "", run, pending).VolumeIds = []string{"v"}
				return f
			},
			want: &wantMachine{"", 3, pending, "its volume v does not exist any more"},
		},
		{
			name: "its disk is being removed",
			cluster: func() fixture {
				f := newFixture("a")
				v := f.volume("v", 1, "a:in")
				v.Removing, v.Attachment = true, &argonv1.Attachment{ServerId: "a"}
				f.machine("m", "", run, pending).VolumeIds = []string{"v"}
				return f
			},
			want: &wantMachine{"", 3, pending, "its volume v is being removed"},
		},
		{
			name: "stopped: gives its server back",
			cluster: func() fixture {
				f := newFixture("a")
				f.machine("m", "a", stop, stopped).Status.Reason = "powered off from inside"
				return f
			},
			want: &wantMachine{"", 3, stopped, "powered off from inside"},
		},
		{
			name: "still stopping: keeps it",
			cluster: func() fixture {
				f := newFixture("a")
				f.machine("m", "a", stop, running)
				return f
			},
		},
		{
			name: "stopped was another placement: keeps it",
			cluster: func() fixture {
				f := newFixture("a")
				f.machine("m", "a", stop, stopped).Status.Placement = 2
				return f
			},
		},
		{
			name: "to be stopped, its server is lost",
			cluster: func() fixture {
				f := newFixture("a", "b").dead("a")
				f.machine("m", "a", stop, running)
				return f
			},
			want: &wantMachine{"", 3, stopped, "its server a was lost"},
		},
		{
			name: "to be stopped before it was placed",
			cluster: func() fixture {
				f := newFixture("a")
				f.machine("m", "", stop, pending)
				return f
			},
			want: &wantMachine{"", 3, stopped, ""},
		},
		{
			name: "to be removed, still runs",
			cluster: func() fixture {
				f := newFixture("a")
				f.machine("m", "a", remove, running)
				return f
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := tt.cluster()
			before := proto.CloneOf(f.Machines["m"])
			actions := f.plan(time.Minute)
			if !proto.Equal(before, f.Machines["m"]) {
				t.Error("the plan wrote to the record that it was made from")
			}
			if tt.want == nil {
				if len(actions) > 0 {
					t.Fatalf("planned %+v, want nothing", actions)
				}
				return
			}
			if len(actions) != 1 || len(actions[0].Put) != 1 {
				t.Fatalf("planned %+v, want one change", actions)
			}
			m := actions[0].Put[0].(*argonv1.Machine)
			got := wantMachine{m.GetServerId(), m.GetPlacement(), m.GetStatus().GetState(), m.GetStatus().GetReason()}
			if got != *tt.want {
				t.Errorf("machine becomes %+v, want %+v", got, *tt.want)
			}
			if m.GetMeta().GetRevision() != 7 {
				t.Errorf("planned at revision %d, want that of the record", m.GetMeta().GetRevision())
			}
			if got := reasons(actions); !slices.Equal(got, tt.events) {
				t.Errorf("events %v, want %v", got, tt.events)
			}
			f.Machines["m"] = m
			if again := f.plan(time.Minute); len(again) > 0 {
				t.Errorf("the same again: %+v", again)
			}
		})
	}
}

func TestMachineIsRemovedOnceNothingOfItRuns(t *testing.T) {
	for name, cluster := range map[string]func() fixture{
		"stopped":        func() fixture { f := newFixture("a"); f.machine("m", "a", remove, stopped); return f },
		"never placed":   func() fixture { f := newFixture("a"); f.machine("m", "", remove, pending); return f },
		"server is lost": func() fixture { f := newFixture("a", "b").dead("a"); f.machine("m", "a", remove, running); return f },
	} {
		t.Run(name, func(t *testing.T) {
			actions := cluster().plan(time.Minute)
			if len(actions) != 1 || len(actions[0].Delete) != 1 {
				t.Fatalf("planned %+v, want the record deleted", actions)
			}
		})
	}
}

// Machines that are placed in one plan do not get the same memory.
func TestOnePlanGivesMemoryAwayOnce(t *testing.T) {
	f := newFixture("a", "b", "c").dead("c")
	for i := range 5 {
		f.machine(fmt.Sprintf("m%d", i), "c", run, running).MemoryBytes = 8 * gib
	}
	on := map[string]int{}
	for _, a := range f.plan(time.Minute) {
		on[a.Put[0].(*argonv1.Machine).GetServerId()]++
	}
	if on["a"] != 2 || on["b"] != 2 || on["c"] != 1 {
		t.Errorf("machines of 8 GiB: %v; want 2 on each server with 18 GiB, and one left", on)
	}
}
