package agent

import (
	"slices"
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// spareVolume makes a volume that is no machine's, in sync on two servers.
func (w *world) spareVolume(id string, on ...string) {
	w.t.Helper()
	v := &argonv1.Volume{Meta: &argonv1.Meta{Id: id, Name: id}, SizeBytes: gib, ReplicasWanted: uint32(len(on)), NextReplicaId: uint32(len(on) + 1)}
	for i, s := range on {
		v.Replicas = append(v.Replicas, &argonv1.Replica{Id: uint32(i + 1), ServerId: s, State: argonv1.ReplicaState_REPLICA_STATE_CREATING})
	}
	if err := w.store.Volumes.Create(w.t.Context(), v); err != nil {
		w.t.Fatal(err)
	}
}

// set changes the machine's record as the API does.
func (w *world) set(change func(*argonv1.Machine)) {
	w.t.Helper()
	_, err := w.store.Machines.Update(w.t.Context(), "m", func(m *argonv1.Machine) error {
		change(m)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// has waits until the machine's guest has these disks, by volume and slot, and
// nothing is left to change.
func (w *world) has(want map[string]int) {
	w.t.Helper()
	w.untilHosts("the guest has its disks", func(h *host) bool {
		m := w.view.State().Machines["m"]
		if m.GetServerId() != h.id && m.GetServerId() != "" {
			return true
		}
		if h.guest() == nil || !placement.Changing(m).None() {
			return false
		}
		got := h.guest().Spec().Disks
		return len(got) == len(want) && !slices.ContainsFunc(got, func(d hypervisor.Disk) bool {
			slot, ok := want[d.Export]
			return !ok || slot != d.Slot
		})
	})
}

func getsDisk(id string) func(*argonv1.Machine) {
	return func(m *argonv1.Machine) { m.VolumeIds = append(m.VolumeIds, id) }
}

func letGoOfDisk(id string) func(*argonv1.Machine) {
	return func(m *argonv1.Machine) { m.Detaching = append(m.Detaching, id) }
}

// A guest that runs is given disks and lets go of others. A disk keeps its place on
// the way to another server and when the machine goes on from a checkpoint, and is
// held by nobody once the guest has let go of it.
func TestDisksComeAndGo(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.spareVolume("x", "a", "b")
	w.spareVolume("y", "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	w.set(getsDisk("x"))
	w.has(map[string]int{"v": 0, "x": 1})
	w.set(getsDisk("y"))
	w.has(map[string]int{"v": 0, "x": 1, "y": 2})
	w.set(letGoOfDisk("x"))
	w.has(map[string]int{"v": 0, "y": 2})
	w.until("x is free", func(st *catalog.State) bool {
		x := st.Volumes["x"]
		return x.GetAttachment() == nil && x.GetClean() && !slices.Contains(st.Machines["m"].GetVolumeIds(), "x")
	})

	// The guest there has each in the place that it has here; its daemon is another.
	if r := w.ended(w.migrate("c")); r.GetFailure() != "" {
		t.Fatalf("the way: %v", r)
	}
	w.has(map[string]int{"v": 0, "y": 2})
	w.hosts["c"].crash()
	w.hosts["c"].start()
	w.set(getsDisk("x"))
	w.has(map[string]int{"v": 0, "x": 1, "y": 2})
	if w.runs(0).GetStatus().GetStarts() != 1 {
		t.Errorf("it was started %d times", w.runs(0).GetStatus().GetStarts())
	}

	// Saved with all three, and woken with them.
	w.set(letGoOfDisk("x"))
	w.has(map[string]int{"v": 0, "y": 2})
	w.checkpoint(forSuspend)
	w.until("suspended", atRest(stateSuspended))
	w.want(wantRunning)
	w.has(map[string]int{"v": 0, "y": 2})

	// Its server is lost: it is started anew, where its disks are one behind the other.
	lost := w.runs(0)
	w.hosts[lost.GetServerId()].kill()
	w.runs(lost.GetPlacement())
	w.has(map[string]int{"v": 0, "y": 1})
	w.oneRuns()
}

// A guest that does not let go of a disk keeps it, and its machine says so; another
// can't have the volume. It is asked again, and a stop settles it.
func TestGuestClingsToADisk(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.spareVolume("x", "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	w.set(getsDisk("x"))
	w.has(map[string]int{"v": 0, "x": 1})
	on := w.hosts[w.runs(0).GetServerId()]
	on.guest().Cling(true)
	w.set(letGoOfDisk("x"))
	st := w.until("it says so", func(st *catalog.State) bool {
		return strings.Contains(st.Machines["m"].GetStatus().GetDevicesDetail(), "disk x: the guest does not let go of it")
	})
	if m := st.Machines["m"]; !slices.Contains(m.GetVolumeIds(), "x") || st.Volumes["x"].GetAttachment().GetMachineId() != "m" {
		t.Errorf("the machine is %v, and the volume %v", m, st.Volumes["x"])
	}
	// It goes to another server with the disk.
	other := map[string]string{"a": "b", "b": "a"}[on.id]
	if r := w.ended(w.migrate(other)); r.GetFailure() != "" {
		t.Fatalf("the way: %v", r)
	}
	guest := w.hosts[other].guest()
	w.has(map[string]int{"v": 0}) // this one does not cling
	w.until("x is free", func(st *catalog.State) bool {
		return st.Volumes["x"].GetAttachment() == nil && !slices.Contains(st.Machines["m"].GetVolumeIds(), "x") && st.Machines["m"].GetStatus().GetDevicesDetail() == ""
	})
	w.set(getsDisk("x"))
	w.has(map[string]int{"v": 0, "x": 1})
	guest.Cling(true)
	w.set(letGoOfDisk("x"))
	w.until("it says so", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetDevicesDetail() != "" })
	w.want(argonv1.Wanted_WANTED_STOPPED)
	w.until("x is free", func(st *catalog.State) bool {
		return st.Volumes["x"].GetAttachment() == nil && !slices.Contains(st.Machines["m"].GetVolumeIds(), "x") && st.Machines["m"].GetServerId() == ""
	})
}

// What the record says that the guest does not have is taken off it, and given to it
// once more: whoever was about to is gone.
func TestCutShortWhileADiskIsGiven(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.spareVolume("x", "a", "b")
	w.create(2, "a", "b")
	on := w.hosts[w.runs(0).GetServerId()]
	on.crash()
	w.set(func(m *argonv1.Machine) {
		h := placement.InForce(m)
		h.Disks = append(h.Disks, &argonv1.Device{Id: "x", Slot: 5})
		m.InForce, m.VolumeIds = h, append(m.VolumeIds, "x")
	})
	on.start()
	w.has(map[string]int{"v": 0, "x": 1})
	w.until("it is recorded", func(st *catalog.State) bool {
		disks := placement.InForce(st.Machines["m"]).GetDisks()
		return len(disks) == 2 && disks[1].GetSlot() == 1
	})
}
