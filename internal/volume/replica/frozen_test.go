package replica_test

import (
	"errors"
	"testing"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

const isNew, same, differs = wire.SumNew, wire.SumSame, wire.SumDiffers

// snapshotStates is what a session says of the first regions of a snapshot.
func (d *disk) snapshotStates(s *replica.Session, id uint32) [2]uint8 {
	d.t.Helper()
	var out [2]wire.Sum
	d.must(s.SnapshotSums(id, 0, 2*region, out[:]))
	return [2]uint8{out[0].State, out[1].State}
}

// rot changes a byte of a layer.
func (d *disk) rot(layerNumber string, off int64) {
	d.t.Helper()
	d.must(d.fs.Rot("/volumes/v/1/layer-"+layerNumber+".data", off))
}

// What is known of a snapshot stays known when the volume is written, when other
// snapshots go, and after a restart; what is damaged is not read, and mended in
// its place.
func TestSnapshotSums(t *testing.T) {
	d := newDisk(t)
	s := d.open2("v", 1)
	d.must(s.Resize(2 * region))
	whole := make([]byte, 2*region)
	d.write(s, 0, 'a', 1)
	d.write(s, region, 'b', 1)
	d.must(s.Snapshot(1, 2))
	d.write(s, 0, 'c', 2)
	d.must(s.Snapshot(2, 3))
	d.must(s.Flush())

	if got := d.snapshotStates(s, 1); got != [2]uint8{isNew, isNew} {
		t.Errorf("at first: %v", got)
	}
	if got := d.snapshotStates(s, 1); got != [2]uint8{same, same} {
		t.Errorf("recorded, then %v", got)
	}
	// The newer one is known where it shares its blocks with the volume.
	var sums [2]wire.Sum
	d.must(s.Sums(0, 2*region, 4, sums[:]))
	d.write(s, 0, 'd', 4)
	d.write(s, region, 'e', 4)
	if got := d.snapshotStates(s, 2); got != [2]uint8{same, same} {
		t.Errorf("what the volume was is not known of the snapshot: %v", got)
	}
	d.restart()
	s = d.open2("v", 2)
	d.must(d.get("v").Forget(2))
	d.untilDone(func() (bool, error) { return d.get("v").Tidy(t.Context()) })
	if got := d.snapshotStates(s, 1); got != [2]uint8{same, same} {
		t.Errorf("after the newer one is gone: %v", got)
	}
	if names, err := d.fs.ReadDir("/volumes/v/1"); err != nil || len(names) != 7 {
		t.Errorf("%v, %v", names, err)
	}

	d.must(s.ReadSnapshotVerified(1, whole, 0))
	d.rot("00000000", 100)
	if got := d.snapshotStates(s, 1); got != [2]uint8{differs, same} {
		t.Errorf("with a damage: %v", got)
	}
	if err := s.ReadSnapshotVerified(1, make([]byte, region), 0); !errors.Is(err, volume.ErrDamaged) {
		t.Errorf("a read of what is damaged: %v", err)
	}
	d.must(s.ReadSnapshotVerified(1, make([]byte, region), region))
	if err := s.ReadSnapshotVerified(1, make([]byte, 512), 512); !errors.Is(err, volume.ErrRange) {
		t.Errorf("a part of a region: %v", err)
	}
	d.must(s.Mend(1, whole, 0))
	d.powerCut()
	s = d.open2("v", 3)
	d.must(s.ReadSnapshotVerified(1, whole, 0))
	if whole[100] != 'a' || !d.holds(s, 0, 'd') {
		t.Error("what was mended is not what it was, or the volume has changed")
	}
	for _, err := range []error{
		s.ReadSnapshotVerified(9, whole, 0), s.Mend(9, whole, 0), s.SnapshotSums(9, 0, 2*region, sums[:]),
	} {
		if !errors.Is(err, volume.ErrNoSnapshot) {
			t.Errorf("a snapshot that is not there: %v", err)
		}
	}
}

// A snapshot that is taken anew under its id is something else: what was
// recorded of the former does not count.
func TestSnapshotSumsOfAnotherOne(t *testing.T) {
	d := newDisk(t)
	s := d.open2("v", 1)
	d.must(s.Resize(2 * region))
	d.write(s, 0, 'a', 1)
	d.must(s.Snapshot(1, 2))
	d.snapshotStates(s, 1)
	d.write(s, 0, 'b', 2)
	d.must(s.Snapshot(1, 3))
	if got := d.snapshotStates(s, 1); got != [2]uint8{isNew, isNew} {
		t.Errorf("%v", got)
	}
	_, err := s.BeginSync(0, 4, 0)
	d.must(err)
	d.must(s.Snapshot(1, 3))
	if got := d.snapshotStates(s, 1); got != [2]uint8{isNew, isNew} {
		t.Errorf("after it was emptied: %v", got)
	}
}

// What a clone's snapshot reads from its base is mended there, and not in the
// clone.
func TestMendLeavesTheBaseAlone(t *testing.T) {
	d := newDisk(t)
	parent := d.open2("v", 1)
	d.must(parent.Resize(2 * region))
	d.write(parent, 0, 'a', 1)
	d.must(parent.Snapshot(1, 2))
	d.must(parent.Flush())
	_, err := d.store.Create(replica.CreateSpec{VolumeID: "clone", ReplicaID: 1, Size: 2 * region, Base: layer.BaseRef{Volume: "v", Snapshot: 1}})
	d.must(err)
	clone := d.open2("clone", 1)
	d.must(clone.Snapshot(1, 2))
	whole := make([]byte, 2*region)
	d.must(clone.ReadSnapshot(1, whole, 0))
	d.snapshotStates(parent, 1)
	if got := d.snapshotStates(clone, 1); got != [2]uint8{isNew, isNew} {
		t.Errorf("the clone's snapshot: %v", got)
	}
	d.rot("00000000", 100)
	if got := d.snapshotStates(clone, 1); got != [2]uint8{differs, same} {
		t.Errorf("the clone's snapshot, when the base is damaged: %v", got)
	}
	if err := clone.Mend(1, whole, 0); !errors.Is(err, volume.ErrDamaged) {
		t.Errorf("mending the base through the clone: %v", err)
	}
	d.must(parent.Mend(1, whole, 0))
	d.must(clone.ReadSnapshotVerified(1, whole, 0))
}
