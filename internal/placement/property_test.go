package placement

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// drawCluster makes up a small cluster: some servers dead, some witnesses,
// some full.
func drawCluster(t *rapid.T) fixture {
	f := newFixture()
	f.Cluster = &argonv1.Cluster{Settings: &argonv1.Settings{CpuOvercommit: rapid.Uint32Range(0, 6).Draw(t, "overcommit")}}
	n := rapid.IntRange(0, 7).Draw(t, "servers")
	for i := range n {
		s := f.server(fmt.Sprintf("s%d", i), rapid.SampledFrom([]string{"", "x", "y", "z"}).Draw(t, "zone"))
		s.Capacity = &argonv1.Resources{
			Cpus:        rapid.Uint32Range(0, 4).Draw(t, "cpus"),
			MemoryBytes: rapid.Uint64Range(0, 40).Draw(t, "memory") * 100 * mib,
			DiskBytes:   rapid.Uint64Range(0, 40).Draw(t, "disk") * 100 * mib,
		}
		s.Used = &argonv1.Resources{DiskBytes: rapid.Uint64Range(0, 20).Draw(t, "used") * 100 * mib}
		s.Witness = rapid.IntRange(0, 4).Draw(t, "witness") == 0
		if rapid.IntRange(0, 3).Draw(t, "dead") == 0 {
			delete(f.Leases, s.GetMeta().GetId())
		}
	}
	return f
}

// Whatever is placed, nothing is given away twice, nothing lands on a dead
// server or a witness, and what is refused really fits nowhere.
func TestMachinesNeverExceedCapacity(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := drawCluster(t)
		for i := range rapid.IntRange(0, 12).Draw(t, "machines") {
			m := &argonv1.Machine{
				Meta:        &argonv1.Meta{Id: fmt.Sprintf("m%d", i), Name: fmt.Sprintf("m%d", i)},
				Cpus:        rapid.Uint32Range(1, 9).Draw(t, "vcpus"),
				MemoryBytes: rapid.Uint64Range(1, 30).Draw(t, "mem") * 100 * mib,
			}
			id, err := PlaceMachine(f.State, m)
			if again, _ := PlaceMachine(f.State, m); again != id {
				t.Fatalf("placed on %q, then on %q", id, again)
			}
			if err != nil {
				for _, s := range f.Servers {
					free := Free(f.State, s.GetMeta().GetId())
					if Alive(f.State, s.GetMeta().GetId()) && !s.GetWitness() && free.GetCpus() >= m.GetCpus() && free.GetMemoryBytes() >= MemoryOn(s, m) {
						t.Fatalf("refused (%v) although %v has %v free", err, s.GetMeta().GetName(), free)
					}
				}
				continue
			}
			m.ServerId = id
			f.Machines[m.GetMeta().GetId()] = m
		}
		for id, s := range f.Servers {
			given := Allocated(f.State, id)
			if given.GetMemoryBytes() > s.GetCapacity().GetMemoryBytes() || given.GetCpus() > CPUOvercommit(f.State)*s.GetCapacity().GetCpus() {
				t.Fatalf("server %s gave away %v of %v", id, given, s.GetCapacity())
			}
			if (s.GetWitness() || !Alive(f.State, id)) && given.GetCpus() > 0 {
				t.Fatalf("server %s runs machines; it is a witness or dead", id)
			}
		}
	})
}

// The replicas of a volume are on different servers that live and have room,
// as many as there can be, in as many zones as there can be.
func TestReplicasSpreadAsFarAsPossible(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := drawCluster(t)
		want := Replicas{
			Count:     rapid.IntRange(1, 3).Draw(t, "count"),
			NeedBytes: rapid.Uint64Range(1, 30).Draw(t, "size") * 100 * mib,
		}
		got, err := PlaceReplicas(f.State, want)
		if again, _ := PlaceReplicas(f.State, want); !slices.Equal(again, got) {
			t.Fatalf("placed on %v, then on %v", got, again)
		}
		var fit []string
		zones := map[string]bool{}
		for id, s := range f.Servers {
			if Alive(f.State, id) && !s.GetWitness() && Free(f.State, id).GetDiskBytes() >= want.NeedBytes {
				fit = append(fit, id)
				zones[s.GetZone()] = true
			}
		}
		if len(got) != min(want.Count, len(fit)) {
			t.Fatalf("placed %d of %d; %d servers fit", len(got), want.Count, len(fit))
		}
		if (err != nil) != (len(got) < want.Count) {
			t.Fatalf("placed %d of %d with error %v", len(got), want.Count, err)
		}
		used := map[string]bool{}
		for i, id := range got {
			if !slices.Contains(fit, id) || slices.Contains(got[:i], id) {
				t.Fatalf("placed on %v; only %v fit, each once", got, fit)
			}
			used[f.Servers[id].GetZone()] = true
		}
		if len(used) != min(len(zones), len(got)) {
			t.Fatalf("%v are in %d zones; %d are possible", got, len(used), min(len(zones), len(got)))
		}
	})
}
