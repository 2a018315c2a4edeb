package controller

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

const (
	isRunning = argonv1.MachineState_MACHINE_STATE_RUNNING
	isStopped = argonv1.MachineState_MACHINE_STATE_STOPPED
	isPending = argonv1.MachineState_MACHINE_STATE_PENDING
	wantsRun  = argonv1.Wanted_WANTED_RUNNING
)

func (f fixture) drain(server string, d *argonv1.Drain) fixture {
	f.Servers[server].Drain = d
	return f
}

// moves shows what a plan does to a machine: where it is, and what it is told.
func moves(actions []Action) []string {
	var out []string
	for _, a := range actions {
		for _, rec := range a.Put {
			if m, ok := rec.(*argonv1.Machine); ok {
				said := fmt.Sprintf("%s on %s, placement %d, leaves %d", m.GetMeta().GetName(), m.GetServerId(), m.GetPlacement(), m.GetMove().GetPlacement())
				if mig := m.GetMigration(); mig != nil {
					said = fmt.Sprintf("%s on %s, placement %d, goes to %s as %d", m.GetMeta().GetName(), m.GetServerId(), m.GetPlacement(), mig.GetToServerId(), mig.GetPlacement())
				}
				out = append(out, said)
			}
		}
		for _, e := range a.Events {
			out = append(out, e.GetReason())
		}
	}
	return out
}

func TestDrainMovesMachines(t *testing.T) {
	leaving := func(m *argonv1.Machine) *argonv1.Machine {
		m.Move = &argonv1.Move{FromServerId: "a", Placement: 3}
		return m
	}
	// sent is one that has the order to go to b, or had it, and did not.
	sent := func(m *argonv1.Machine) *argonv1.Machine {
		placement.Migrate(m, "i", "b", noon, time.Minute)
		return m
	}
	failed := func(m *argonv1.Machine) *argonv1.MigrationReport {
		m.LastPlacement = 4
		m.LastMigration = &argonv1.MigrationReport{FromServerId: "a", ToServerId: "b", Ended: timestamppb.New(noon), Failure: "broken"}
		return m.GetLastMigration()
	}
	for name, c := range map[string]struct {
		cluster func(f fixture)
		want    []string
	}{
		"the first two are told to go": {
			func(f fixture) {
				for _, n := range []string{"m1", "m2", "m3"} {
					f.machine(n, "a", wantsRun, isRunning)
				}
			},
			[]string{"m1 on a, placement 3, goes to b as 4", "machine-moves", "m2 on a, placement 3, goes to b as 4", "machine-moves"},
		},
		"as many as the operator allows": {
			func(f fixture) {
				f.Servers["a"].Drain.Parallel = 1
				f.machine("m1", "a", wantsRun, isRunning)
				f.machine("m2", "a", wantsRun, isRunning)
			},
			[]string{"m1 on a, placement 3, goes to b as 4", "machine-moves"},
		},
		"one on its way is waited for": {
			func(f fixture) {
				f.Servers["a"].Drain.Parallel = 1
				sent(f.machine("m1", "a", wantsRun, isRunning))
				f.machine("m2", "a", wantsRun, isRunning)
			},
			nil,
		},
		"one that does not run yet is stopped": {
			func(f fixture) { f.machine("m", "a", wantsRun, isPending) },
			[]string{"m on a, placement 3, leaves 3", "machine-moves"},
		},
		"one whose migration failed is stopped": {
			func(f fixture) { failed(f.machine("m", "a", wantsRun, isRunning)) },
			[]string{"m on a, placement 3, leaves 3", "machine-moves"},
		},
		"not if it failed before": {
			func(f fixture) {
				f.Servers["a"].Drain.Since = timestamppb.New(noon.Add(time.Second))
				failed(f.machine("m", "a", wantsRun, isRunning))
			},
			[]string{"m on a, placement 3, goes to b as 5", "machine-moves"},
		},
		"nor if it failed with the other server": {
			func(f fixture) { failed(f.machine("m", "a", wantsRun, isRunning)).ToServerId = "c" },
			[]string{"m on a, placement 3, goes to b as 5", "machine-moves"},
		},
		"one that an operator keeps stays": {
			func(f fixture) { failed(f.machine("m", "a", wantsRun, isRunning)).Cancelled = true },
			[]string{"machine-stays"},
		},
		"one on KVM is stopped where only emulation is left": {
			func(f fixture) { f.machine("m", "a", wantsRun, isRunning).Status.Acceleration = "kvm" },
			[]string{"m on a, placement 3, leaves 3", "machine-moves"},
		},
		"one whose checkpoint is being taken waits": {
			func(f fixture) {
				f.machine("m", "a", wantsRun, isRunning)
				f.Checkpoints = map[string]*argonv1.Checkpoint{"c": {
					Meta: meta("c"), MachineId: "m", ServerId: "a", Placement: 3, State: cpTaking, Taken: timestamppb.New(noon),
				}}
			},
			nil,
		},
		"the next waits until one has arrived": {
			func(f fixture) {
				f.Servers["a"].Drain.Parallel = 1
				m := leaving(f.machine("m1", "b", wantsRun, isPending))
				m.Placement, m.Status.Placement = 4, 4
				f.machine("m2", "a", wantsRun, isRunning)
			},
			nil,
		},
		"one that has stopped is placed": {
			func(f fixture) { leaving(f.machine("m", "a", wantsRun, isStopped)) },
			[]string{"m on b, placement 4, leaves 3", "machine-placed"},
		},
		"one that still runs is waited for": {
			func(f fixture) { leaving(f.machine("m", "a", wantsRun, isRunning)) }, nil,
		},
		"one that has arrived is told so": {
			func(f fixture) {
				m := leaving(f.machine("m", "b", wantsRun, isRunning))
				m.Placement, m.Status.Placement = 4, 4
			},
			[]string{"m on b, placement 4, leaves 0", "machine-moved"},
		},
		"one that does not start there is not waited for": {
			func(f fixture) {
				m := leaving(f.machine("m", "b", wantsRun, argonv1.MachineState_MACHINE_STATE_FAILED))
				m.Placement, m.Status.Placement = 4, 4
			},
			[]string{"m on b, placement 4, leaves 0", "machine-moved"},
		},
		"one that fits nowhere else stays": {
			func(f fixture) {
				f.machine("m", "a", wantsRun, isRunning).MemoryBytes = 19 * gib / 2
				f.machine("n", "b", wantsRun, isRunning).MemoryBytes = 10 * gib
			},
			[]string{"machine-stays"},
		},
		"one that was stopped, and now fits nowhere, starts again": {
			func(f fixture) { leaving(f.machine("m", "a", wantsRun, isStopped)); f.dead("b") },
			[]string{"m on a, placement 3, leaves 0", "machine-stays", "server-lost"},
		},
		"what those on their way will take is not free": {
			func(f fixture) {
				leaving(f.machine("m", "a", wantsRun, isRunning)).MemoryBytes = 9 * gib
				f.machine("n", "a", wantsRun, isRunning).MemoryBytes = 9 * gib
			},
			[]string{"machine-stays"},
		},
		"one that is stopped by its user gives its place back": {
			func(f fixture) { leaving(f.machine("m", "a", argonv1.Wanted_WANTED_STOPPED, isStopped)) },
			[]string{"m on , placement 3, leaves 0"},
		},
		"other servers' stay": {
			func(f fixture) { f.machine("m", "b", wantsRun, isRunning) }, nil,
		},
		"its server is lost on the way": {
			func(f fixture) { leaving(f.machine("m", "a", wantsRun, isRunning)); f.dead("a") },
			[]string{"server-lost", "m on b, placement 4, leaves 3", "machine-lost", "machine-placed"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture("a", "b").drain("a", &argonv1.Drain{})
			c.cluster(f)
			got := moves(f.plan(0))
			slices.Sort(got)
			slices.Sort(c.want)
			if !slices.Equal(got, c.want) {
				t.Errorf("planned\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

func TestEvacuationMovesReplicas(t *testing.T) {
	heldBy := func(server string) func(fixture, *argonv1.Volume) {
		return func(_ fixture, v *argonv1.Volume) {
			v.Attachment, v.Clean = &argonv1.Attachment{ServerId: server}, false
		}
	}
	lost := func(server string) func(fixture, *argonv1.Volume) {
		return func(f fixture, v *argonv1.Volume) { heldBy("b")(f, v); f.dead(server) }
	}
	for name, c := range map[string]struct {
		replicas []string
		change   func(fixture, *argonv1.Volume)
		evacuate bool
		want     []string
	}{
		"a new one first":                      {[]string{"a:in", "b:in"}, nil, true, []string{"a:in", "b:in", "c:new"}},
		"the old one while it is copied":       {[]string{"a:in", "b:in", "c:out"}, nil, true, nil},
		"then the old one goes":                {[]string{"a:in", "b:in", "c:in"}, nil, true, []string{"a:gone", "b:in", "c:in"}},
		"attached: a new one first":            {[]string{"a:in", "b:in"}, heldBy("b"), true, []string{"a:in", "b:in", "c:new"}},
		"attached: not before that is in sync": {[]string{"a:in", "b:in", "c:out"}, heldBy("b"), true, nil},
		"attached: then it leaves the set":     {[]string{"a:in", "b:in", "c:in"}, heldBy("b"), true, []string{"a:leaves", "b:in", "c:in"}},
		"attached there: it leaves the set":    {[]string{"a:in", "b:in", "c:in"}, heldBy("a"), true, []string{"a:leaves", "b:in", "c:in"}},
		"attached: it is waited for":           {[]string{"a:leaves", "b:in", "c:in"}, heldBy("b"), true, nil},
		"attached: it has left the set":        {[]string{"a:left", "b:in", "c:in"}, heldBy("b"), true, []string{"a:gone", "b:in", "c:in"}},
		"attached: it stays after all":         {[]string{"a:leaves", "b:in", "c:out"}, heldBy("b"), true, []string{"a:in", "b:in", "c:out"}},
		"attached: another one is lost":        {[]string{"a:in", "b:in", "c:in"}, lost("c"), true, nil},
		"attached: its holder is lost":         {[]string{"a:in", "b:in", "c:in"}, lost("b"), true, nil},
		"attached: one that is not in sync":    {[]string{"a:out", "b:in", "c:in"}, heldBy("b"), true, []string{"a:gone", "b:in", "c:in"}},
		"only if asked for":                    {[]string{"a:in", "b:in"}, nil, false, nil},
		"never the last one":                   {[]string{"a:in", "b:out", "c:out"}, nil, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture("a", "b", "c").drain("a", &argonv1.Drain{Evacuate: c.evacuate})
			v := f.volume("v", 2, c.replicas...)
			if c.change != nil {
				c.change(f, v)
			}
			var got []string
			for _, a := range f.plan(0) {
				for _, rec := range a.Put {
					got = show(rec.(*argonv1.Volume))
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("becomes %v, want %v", got, c.want)
			}
		})
	}
}

// What lies on a disk that failed is made elsewhere at once, and nothing is put
// there.
func TestBadDisk(t *testing.T) {
	for name, c := range map[string]struct {
		bad      []string
		replicas []string
		want     []string
	}{
		"a new one first":                       {[]string{"a"}, []string{"a:in", "b:in"}, []string{"a:in", "b:in", "c:new"}},
		"one that left the set":                 {[]string{"a"}, []string{"a:out", "b:in"}, []string{"a:out", "b:in", "c:new"}},
		"one that was being made":               {[]string{"a"}, []string{"a:new", "b:in"}, []string{"a:new", "b:in", "c:new"}},
		"the old one while it is copied":        {[]string{"a"}, []string{"a:in", "b:in", "c:out"}, nil},
		"then the old one goes":                 {[]string{"a"}, []string{"a:in", "b:in", "c:in"}, []string{"a:gone", "b:in", "c:in"}},
		"never the last one":                    {[]string{"a"}, []string{"a:in", "b:out", "c:out"}, nil},
		"nor the last one on a disk that works": {[]string{"a", "b"}, []string{"a:in", "b:in", "c:in"}, nil},
		"nothing is put there":                  {[]string{"c"}, []string{"a:in"}, []string{"a:in", "b:new"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture("a", "b", "c")
			for _, id := range c.bad {
				f.Servers[id].Disks = []*argonv1.Disk{{Path: "/volumes", Problem: "it burns"}}
			}
			f.volume("v", 2, c.replicas...)
			var got []string
			for _, a := range f.plan(0) {
				for _, rec := range a.Put {
					got = show(rec.(*argonv1.Volume))
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("becomes %v, want %v", got, c.want)
			}
		})
	}
}

// An image's copy leaves once another server has it.
func TestEvacuationMovesImages(t *testing.T) {
	f := newFixture("a", "b", "c").drain("a", &argonv1.Drain{Evacuate: true})
	f.Images["i"] = &argonv1.Image{Meta: meta("i"), Copies: []*argonv1.ImageCopy{{ServerId: "a", Ready: true}}}
	next := only[*argonv1.Image](t, f.plan(0))
	if len(next.GetCopies()) != 3 || next.GetCopies()[0].GetServerId() != "a" {
		t.Fatalf("copies become %v", next.GetCopies())
	}
	next.Copies[1].Ready = true
	f.Images["i"] = next
	next = only[*argonv1.Image](t, f.plan(0))
	if len(next.GetCopies()) != 2 || next.GetCopies()[0].GetServerId() == "a" {
		t.Errorf("copies become %v", next.GetCopies())
	}
}

// Whatever the cluster, a drain ends: with its machines elsewhere, or running
// where they were because they fit nowhere; never are more on their way than
// allowed, never does a volume have fewer replicas in sync than before or wanted,
// and never does a machine run where it has not been placed.
func TestDrainEnds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		servers := []string{"a", "b", "c", "d"}[:rapid.IntRange(2, 4).Draw(t, "servers")]
		limit := rapid.Uint32Range(0, 3).Draw(t, "parallel")
		f := newFixture(servers...)
		for i := range rapid.IntRange(0, 6).Draw(t, "machines") {
			m := f.machine(fmt.Sprintf("m%d", i), rapid.SampledFrom(servers).Draw(t, "server"), wantsRun, isRunning)
			m.MemoryBytes = rapid.Uint64Range(1, 8).Draw(t, "memory") * gib / 2
		}
		for i := range rapid.IntRange(0, 4).Draw(t, "volumes") {
			on := rapid.Permutation(servers).Draw(t, "replicas")[:rapid.IntRange(1, 2).Draw(t, "count")]
			var replicas []string
			for _, s := range on {
				replicas = append(replicas, s+":in")
			}
			v := f.volume(fmt.Sprintf("v%d", i), uint32(len(on)), replicas...)
			if holder := rapid.SampledFrom(append(servers, "")).Draw(t, "holder"); holder != "" {
				v.Attachment, v.Clean = &argonv1.Attachment{ServerId: holder}, false
			}
		}
		evacuate := rapid.Bool().Draw(t, "evacuate")
		f.drain("a", &argonv1.Drain{Evacuate: evacuate, Parallel: limit})
		for round := 0; ; round++ {
			if round == 200 {
				t.Fatalf("it goes on for ever: %v", moves(f.plan(0)))
			}
			changed := false
			for _, a := range f.plan(0) {
				changed = changed || !a.OnlyNews
				apply(t, f, a)
			}
			moving := 0
			for _, m := range f.Machines {
				if m.GetMove() != nil || m.GetMigration() != nil {
					moving++
				}
			}
			if most := max(int(limit), 1); moving > most && (limit != 0 || moving > defaultParallel) {
				t.Fatalf("%d machines are on their way at once, %d are allowed", moving, limit)
			}
			if acted := act(t, f); !acted && !changed {
				break
			}
		}
		for name, m := range f.Machines {
			if m.GetStatus().GetState() != isRunning || m.GetMove() != nil || m.GetMigration() != nil {
				t.Errorf("machine %s ends as %v", name, m)
			}
			if to, err := placement.PlaceMachine(f.State, m); m.GetServerId() == "a" && err == nil {
				t.Errorf("machine %s is left behind although it fits on %s", name, to)
			}
		}
		for name, v := range f.Volumes {
			if n := countInSync(v); n != int(v.GetReplicasWanted()) {
				t.Errorf("volume %s ends with %d replicas in sync: %v", name, n, show(v))
			}
			if evacuate && len(servers) > int(v.GetReplicasWanted()) && slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return r.GetServerId() == "a" }) {
				t.Errorf("volume %s is left behind: %v", name, show(v))
			}
		}
	})
}

// apply makes a plan's changes, as the catalog would.
func apply(t *rapid.T, f fixture, a Action) {
	for _, rec := range a.Put {
		switch r := rec.(type) {
		case *argonv1.Machine:
			f.Machines[r.GetMeta().GetId()] = r
		case *argonv1.Volume:
			before, after := countInSync(f.Volumes[r.GetMeta().GetId()]), countInSync(r)
			if after < before && after < int(r.GetReplicasWanted()) {
				t.Fatalf("volume %s goes from %d replicas in sync to %d", r.GetMeta().GetName(), before, after)
			}
			f.Volumes[r.GetMeta().GetId()] = r
		}
	}
}

func countInSync(v *argonv1.Volume) int {
	n := 0
	for _, r := range v.GetReplicas() {
		if r.GetState() == inSync {
			n++
		}
	}
	return n
}

// migrated ends a machine's migration, as its agent does.
func migrated(m *argonv1.Machine, well bool) {
	mig := m.GetMigration()
	m.Migration, m.LastMigration = nil, &argonv1.MigrationReport{FromServerId: m.GetServerId(), ToServerId: mig.GetToServerId(), Ended: timestamppb.New(noon)}
	if !well {
		m.LastMigration.Failure = "broken"
		return
	}
	m.ServerId, m.Placement = mig.GetToServerId(), mig.GetPlacement()
	m.Status.ServerId, m.Status.Placement = m.GetServerId(), m.GetPlacement()
}

// act is what agents and holders do, one step each; it tells whether they did
// anything.
func act(t *rapid.T, f fixture) bool {
	acted := false
	for id, old := range f.Machines {
		m := proto.CloneOf(old)
		if m.GetMigration() != nil {
			migrated(m, rapid.Bool().Draw(t, "arrives"))
			f.Machines[id], acted = m, true
			continue
		}
		leaves := m.GetMove() != nil && m.GetMove().GetPlacement() == m.GetPlacement()
		want := isRunning
		if leaves {
			want = isStopped
		}
		if m.GetStatus().GetState() == isRunning && m.GetStatus().GetServerId() != m.GetServerId() {
			t.Fatalf("machine %s runs on %s and was placed on %s", id, m.GetStatus().GetServerId(), m.GetServerId())
		}
		if m.GetStatus().GetState() != want {
			m.Status = &argonv1.MachineStatus{State: want, ServerId: m.GetServerId(), Placement: m.GetPlacement()}
			f.Machines[id], acted = m, true
		}
	}
	for id, old := range f.Volumes {
		v := proto.CloneOf(old)
		v.Replicas = slices.DeleteFunc(v.Replicas, func(r *argonv1.Replica) bool { return r.GetState() == removing })
		for _, r := range v.GetReplicas() {
			switch {
			case r.GetRetiring() && r.GetState() == inSync && countInSync(v) > int(v.GetReplicasWanted()):
				r.State = outOfSync
			case r.GetState() == creating || r.GetState() == outOfSync && !r.GetRetiring():
				r.State = inSync
			}
		}
		if !proto.Equal(old, v) {
			f.Volumes[id], acted = v, true
		}
	}
	return acted
}
