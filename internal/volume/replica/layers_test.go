package replica_test

import (
	"bytes"
	"errors"
	"log/slog"
	"testing"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// region is that of new replicas.
const region = 1 << 20

func (d *disk) get(volumeID string) *replica.Replica {
	d.t.Helper()
	r, err := d.store.Get(volumeID, 1)
	d.must(err)
	return r
}

func (d *disk) open2(volumeID string, epoch uint64) *replica.Session {
	d.t.Helper()
	s, _, err := d.get(volumeID).Seal(epoch)
	d.must(err)
	return s
}

// holds tells whether a sector of a session is all one byte.
func (d *disk) holds(s *replica.Session, off int64, b byte) bool {
	d.t.Helper()
	p := make([]byte, 512)
	d.must(s.ReadAt(p, off))
	return bytes.Equal(p, bytes.Repeat([]byte{b}, 512))
}

func (d *disk) write(s *replica.Session, off int64, b byte, generation uint64) {
	d.t.Helper()
	d.must(s.WriteAt(bytes.Repeat([]byte{b}, 512), off, generation, false))
}

func (d *disk) untilDone(step func() (more bool, err error)) {
	d.t.Helper()
	for more := true; more; {
		var err error
		more, err = step()
		d.must(err)
	}
}

func TestSnapshots(t *testing.T) {
	d := newDisk(t)
	s := d.open2("v", 1)
	d.write(s, 0, 'a', 1)
	d.must(s.Snapshot(1, 2))
	d.must(s.Snapshot(1, 2)) // asked again
	if n := len(d.get("v").Snapshots()); n != 1 {
		t.Errorf("%d snapshots", n)
	}
	d.write(s, 0, 'b', 2)
	d.must(s.PrepareSnapshot())
	d.must(s.PrepareSnapshot())
	d.must(s.Snapshot(2, 3))
	d.write(s, 512, 'c', 3)
	d.must(s.Flush())
	d.powerCut()
	s = d.open2("v", 2)

	p := make([]byte, 1024)
	for id, want := range map[uint32]string{1: "a\x00", 2: "b\x00"} {
		d.must(s.ReadSnapshot(id, p, 0))
		if p[0] != want[0] || p[512] != want[1] {
			t.Errorf("snapshot %d begins with %q and %q", id, p[0], p[512])
		}
	}
	if err := s.ReadSnapshot(3, p, 0); !errors.Is(err, volume.ErrNoSnapshot) {
		t.Errorf("a snapshot that is not there: %v", err)
	}
	bits := make([]byte, 1)
	d.must(s.ChangedSnapshot(1, 2, 0, region, region, bits))
	if bits[0] != 0 {
		t.Error("a snapshot has changed after it was made")
	}
	d.must(s.ChangedSnapshot(2, 2, 0, region, region, bits))
	if bits[0] != 1 {
		t.Error("what was written before a snapshot does not count as changed")
	}

	// A copy makes the oldest anew: its content now is that of the volume.
	d.must(s.Snapshot(1, 4))
	d.must(s.ReadSnapshot(1, p, 0))
	if p[0] != 'b' || p[512] != 'c' {
		t.Errorf("a snapshot made anew begins with %q and %q", p[0], p[512])
	}
	if list := d.get("v").Snapshots(); len(list) != 2 || list[0].ID != 2 || list[1] != (replica.SnapshotInfo{ID: 1, Generation: 4, Size: region}) {
		t.Errorf("%+v", list)
	}

	d.must(s.Resize(3 * region))
	d.must(s.Resize(region))
	d.write(s, 2*region, 'd', 4)
	d.must(s.Revert(2, 0, 3*region, 5))
	if !d.holds(s, 0, 'b') || !d.holds(s, 512, 0) || !d.holds(s, 2*region, 0) {
		t.Error("it is not what the snapshot is, or has something beyond its end")
	}
	d.must(s.ReadSnapshot(2, p, region)) // the snapshot is shorter
	if !bytes.Equal(p, make([]byte, 1024)) {
		t.Error("a snapshot has something beyond its end")
	}
}

// A snapshot that is taken anew leaves a layer behind that nobody needs.
func TestTakenAnew(t *testing.T) {
	d := newDisk(t)
	s, _ := d.seal(1)
	r := d.get("v")
	for generation := uint64(2); generation < 4; generation++ {
		d.must(s.Snapshot(1, generation))
		if is, want := r.Untidy(), generation > 2; is != want {
			t.Errorf("untidy after generation %d: %v", generation, is)
		}
		d.write(s, 0, byte(generation), generation)
	}
	d.untilDone(func() (bool, error) { return r.Tidy(t.Context()) })
	if r.Untidy() {
		t.Error("still untidy")
	}
}

func TestTooManySnapshots(t *testing.T) {
	d := newDisk(t)
	s := d.open2("v", 1)
	for id := range uint32(layer.MaxSnapshots) {
		d.must(s.Snapshot(id+1, 2))
	}
	if err := s.Snapshot(1000, 3); !errors.Is(err, volume.ErrTooManySnapshots) {
		t.Fatalf("got %v", err)
	}
	if err := s.PrepareSnapshot(); !errors.Is(err, volume.ErrNoSpace) {
		t.Errorf("preparing one more: %v", err)
	}
	d.must(d.get("v").Forget(50))
	d.must(s.PrepareSnapshot())
	d.must(s.Snapshot(1000, 3))
	d.restart()
	if n := len(d.get("v").Snapshots()); n != layer.MaxSnapshots {
		t.Errorf("%d snapshots", n)
	}
}

// What deleted snapshots took comes back, and the rest stays what it is.
func TestSpaceComesBack(t *testing.T) {
	d := newDisk(t)
	s, r := d.open2("v", 1), d.get("v")
	fill := func(b byte, generation uint64) {
		d.must(s.WriteAt(bytes.Repeat([]byte{b}, region/2), 0, generation, false))
	}
	fill('a', 1)
	alone, of, err := r.Usage()
	d.must(err)
	if of != 0 || alone < region/2 {
		t.Errorf("%d bytes used, %d of these by no snapshots", alone, of)
	}
	for id := range uint32(3) {
		d.must(s.Snapshot(id+1, uint64(id)+2))
		fill('b'+byte(id), uint64(id)+2)
	}
	used, of, err := r.Usage()
	d.must(err)
	if used < 4*region/2 || of != 3*region/2 {
		t.Errorf("%d bytes used, %d of these by three snapshots", used, of)
	}
	for _, id := range []uint32{2, 1, 3} {
		d.must(r.Forget(id))
		d.must(r.Forget(id))
		if _, err := r.OpenSnapshot(id); !errors.Is(err, volume.ErrNoSnapshot) {
			t.Errorf("a snapshot that was deleted: %v", err)
		}
		d.untilDone(func() (bool, error) { return r.Tidy(t.Context()) })
	}
	used, of, err = r.Usage()
	d.must(err)
	if used > alone+64<<10 || of != 0 || !d.holds(s, 0, 'd') {
		t.Errorf("%d bytes used, %d of these by no snapshots, %d before", used, of, alone)
	}
}

// clone makes volume w of snapshot 1 of volume v, which begins with 'a'; v then
// goes on.
func clone(t *testing.T) *disk {
	d := newDisk(t)
	s := d.open2("v", 1)
	d.write(s, 0, 'a', 1)
	d.must(s.Snapshot(1, 2))
	d.must(s.Flush())
	d.write(s, 0, 'b', 2)
	_, err := d.store.Create(replica.CreateSpec{VolumeID: "w", ReplicaID: 1, Size: 2 * region, Base: layer.BaseRef{Volume: "v", Snapshot: 1}})
	d.must(err)
	return d
}

func TestClone(t *testing.T) {
	d := clone(t)
	w := d.open2("w", 1)
	d.write(w, 512, 'c', 1)
	check := func(when string) {
		t.Helper()
		w, v := d.open2("w", 9), d.open2("v", 9)
		if !d.holds(w, 0, 'a') || !d.holds(w, 512, 'c') || !d.holds(w, region, 0) || !d.holds(v, 0, 'b') || !d.holds(v, 512, 0) {
			t.Errorf("%s: the clone or its origin is not what it was", when)
		}
	}
	check("at first")
	d.restart() // w may be opened before v
	check("after a restart")
	v := d.get("v")
	_, berr := d.open2("v", 10).BeginSync(0, 20, 0)
	for what, err := range map[string]error{"forget": v.Forget(1), "remove": d.store.Remove("v", 1), "empty": berr} {
		if !errors.Is(err, replica.ErrInUse) {
			t.Errorf("%s, while a clone reads it: %v", what, err)
		}
	}
	d.untilDone(func() (bool, error) { return d.get("w").DetachBase(t.Context()) })
	if d.get("w").Based() {
		t.Error("it has a base still")
	}
	d.must(v.Forget(1))
	d.untilDone(func() (bool, error) { return v.Tidy(t.Context()) })
	w, _, err := d.get("w").Seal(10)
	d.must(err)
	d.must(w.Flush())
	d.powerCut()
	w = d.open2("w", 11)
	if !d.holds(w, 0, 'a') || !d.holds(w, 512, 'c') {
		t.Error("the clone lost something with its base")
	}
	d.must(d.store.Remove("v", 1))
}

// A base that is gone costs a read, and a copy from the others mends that.
func TestBaseGone(t *testing.T) {
	d := newDisk(t)
	images := func(id string) string { return "/" + id }
	reopen := func() {
		var err error
		d.store, err = replica.Open(replica.Options{FS: d.fs, Dir: "/volumes", ClusterID: "c", BootID: d.boot, Images: images, Log: slog.New(slog.DiscardHandler)})
		d.must(err)
	}
	spec := replica.CreateSpec{VolumeID: "w", ReplicaID: 1, Size: region, Base: layer.BaseRef{Image: "image"}}
	reopen()
	if _, err := d.store.Create(spec); err == nil {
		t.Error("a replica was made of an image that is not there")
	}
	f, err := d.fs.Open("/image", true)
	d.must(err)
	_, err = f.WriteAt(bytes.Repeat([]byte{'i'}, 1024), 0)
	d.must(err)
	_, err = d.store.Create(spec)
	d.must(err)
	if err := d.store.RemoveImage("image", func() error { return errors.New("removed") }); !errors.Is(err, replica.ErrInUse) {
		t.Errorf("an image that is read was removed: %v", err)
	}
	s := d.open2("w", 1)
	if !d.holds(s, 512, 'i') || !d.holds(s, 1024, 0) {
		t.Error("it does not begin with the image")
	}
	d.must(d.fs.RemoveAll("/image"))
	reopen()
	s = d.open2("w", 2)
	if err := s.ReadAt(make([]byte, 512), 0); !errors.Is(err, layer.ErrBase) {
		t.Errorf("a read without the base: %v", err)
	}
	if err := s.WriteAt(sector, 0, 2, false); !errors.Is(err, layer.ErrBase) {
		t.Errorf("a write to a part of a block without the base: %v", err)
	}
	info, err := s.BeginSync(1, 3, 0)
	d.must(err)
	if !info.Emptied {
		t.Error("a replica without its base was taken for whole")
	}
	d.must(s.WriteAt(sector, 0, 3, false))
	d.must(s.EndSync())
	if d.get("w").Based() || !d.holds(s, 0, 's') {
		t.Error("it is not usable after it was copied to")
	}
}

// If a table does not say any more where blocks are, nothing is read: some of it
// might be older than it should be.
func TestDamagedTableOfALayer(t *testing.T) {
	d := newDisk(t)
	s := d.open2("v", 1)
	d.write(s, 0, 'a', 1)
	d.must(s.Snapshot(1, 2))
	d.write(s, 0, 'b', 2)
	d.must(s.Close(true))
	f, err := d.fs.Open("/volumes/v/1/layer-00000001.table", false)
	d.must(err)
	_, err = f.WriteAt([]byte{1}, layer.BlockSize+17)
	d.must(err)
	d.restart()
	s, info := d.seal(2)
	if info.Health != layer.Failed {
		t.Errorf("health %v", info.Health)
	}
	if err := s.ReadAt(make([]byte, 512), 0); !errors.Is(err, replica.ErrFailed) {
		t.Errorf("a read: %v", err)
	}
	if _, err := d.get("v").OpenSnapshot(1); !errors.Is(err, replica.ErrFailed) {
		t.Errorf("a snapshot: %v", err)
	}
	info, err = s.BeginSync(2, 3, 0)
	d.must(err)
	if !info.Emptied || len(d.get("v").Snapshots()) != 0 {
		t.Errorf("%+v", info)
	}
	d.write(s, 0, 'c', 3)
	d.must(s.EndSync())
	d.powerCut()
	if s, info = d.seal(3); info.Health != layer.Good || !d.holds(s, 0, 'c') {
		t.Errorf("after a copy: %+v", info)
	}
}

func TestSums(t *testing.T) {
	d := newDisk(t)
	s := d.open2("v", 1)
	d.must(s.Resize(2*region + 1024))
	d.write(s, 0, 'a', 5)
	sums := func(generation uint64) [3]wire.Sum {
		t.Helper()
		var out [3]wire.Sum
		d.must(s.Sums(0, 2*region+1024, generation, out[:]))
		return out
	}
	states := func(sums [3]wire.Sum) (s [3]uint8) { return [3]uint8{sums[0].State, sums[1].State, sums[2].State} }
	first := sums(5)
	if got := states(first); got != [3]uint8{isNew, isNew, isNew} || first[0].Sum == first[1].Sum || first[1].Sum == first[2].Sum {
		t.Errorf("at first: %v", first)
	}
	if got := states(sums(5)); got != [3]uint8{isNew, same, same} {
		t.Errorf("what is being written was recorded, or the rest was not: %v", got)
	}
	sums(6)
	if got := sums(6); states(got) != [3]uint8{same, same, same} || got[0].Sum != first[0].Sum {
		t.Errorf("recorded, then %v", got)
	}
	whole := make([]byte, 2*region)
	d.must(s.ReadVerified(whole, 0))

	// The disk changes a bit.
	f, err := d.fs.Open("/volumes/v/1/layer-00000000.data", false)
	d.must(err)
	_, err = f.WriteAt([]byte{'A'}, 100)
	d.must(err)
	if got := states(sums(6)); got != [3]uint8{differs, same, same} {
		t.Errorf("with a damage: %v", got)
	}
	if err := s.ReadVerified(whole, 0); !errors.Is(err, volume.ErrDamaged) {
		t.Errorf("a read of what is damaged: %v", err)
	}
	d.must(s.ReadVerified(whole[:region], region))
	if err := s.ReadVerified(whole[:512], 0); !errors.Is(err, volume.ErrRange) {
		t.Errorf("a part of a region: %v", err)
	}
	d.write(s, 0, 'a', 7) // repaired
	d.must(s.ReadVerified(whole, 0))
	if got := states(sums(7)); got != [3]uint8{isNew, same, same} {
		t.Errorf("written anew: %v", got)
	}
	sums(8)
	d.restart()
	s = d.open2("v", 2)
	if got := states(sums(8)); got != [3]uint8{same, same, same} {
		t.Errorf("after a restart: %v", got)
	}
	// The last region grows, and that is no damage.
	d.must(s.Resize(3 * region))
	var last [1]wire.Sum
	d.must(s.Sums(2*region, region, 8, last[:]))
	if last[0].State != isNew {
		t.Errorf("a region that has grown: %v", last[0].State)
	}
	_, err = s.BeginSync(0, 9, 0)
	d.must(err)
	d.must(s.Sums(2*region, region, 9, last[:]))
	if last[0].State != isNew {
		t.Errorf("after it was emptied: %v", last[0].State)
	}
}

// A replica was emptied, and nobody could record it: the next holder comes with
// the base of before, which does not hold any more.
func TestEmptiedIsLaterThanItsBase(t *testing.T) {
	d := newDisk(t)
	s := d.open2("v", 1)
	d.write(s, 0, 'a', 5)
	d.must(s.Snapshot(1, 10))
	d.fs.FailSync = true
	if err := s.Flush(); !errors.Is(err, replica.ErrFailed) {
		t.Fatalf("a flush that failed: %v", err)
	}
	for epoch := range uint64(2) {
		s = d.open2("v", epoch+2)
		if info, err := s.BeginSync(17, 9, 0); err != nil || !info.Emptied {
			t.Errorf("in epoch %d: %+v, %v", epoch+2, info, err)
		}
	}
	if info, err := s.BeginSync(18, 9, 0); err != nil || info.Emptied {
		t.Errorf("a copy that goes on: %+v, %v", info, err)
	}
}
