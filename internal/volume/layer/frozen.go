package layer

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// This file knows what snapshots hold, by checksums, and mends them. A
// snapshot's content never changes, so a record of it counts for as long as the
// snapshot is there.

func snapshotSumsName(id uint32) string { return fmt.Sprintf("snapshot-%08d.sums", id) }

// snapshotSums is the file of one snapshot's checksums, which is kept open for
// whoever goes through the snapshot's regions. Its records are those of the file
// of sums; the stamp is the generation that the snapshot was made in.
type snapshotSums struct {
	mu   sync.Mutex
	id   uint32 // 0: none is open
	file File
}

// open opens the file of an entry's snapshot. Without create it is nil if there is
// none. Needs mu.
func (s *snapshotSums) open(f *Files, e Entry, create bool) (File, error) {
	if s.id == e.Snapshot {
		return s.file, nil
	}
	if err := s.close(); err != nil {
		return nil, err
	}
	name := path.Join(f.dir, snapshotSumsName(e.Snapshot))
	file, err := openSums(f.fs, name, create, regions(e.Size, f.sb.Load().RegionSize))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s.id, s.file = e.Snapshot, file
	return file, nil
}

func (s *snapshotSums) close() error {
	file := s.file
	s.id, s.file = 0, nil
	if file == nil {
		return nil
	}
	return file.Close()
}

func (f *Files) closeSnapshotSums() error {
	f.frozen.mu.Lock()
	defer f.frozen.mu.Unlock()
	return f.frozen.close()
}

// removeSnapshotSums deletes what was recorded of a snapshot that is gone.
func (f *Files) removeSnapshotSums(id uint32) error {
	return errors.Join(f.closeSnapshotSums(), f.fs.RemoveAll(path.Join(f.dir, snapshotSumsName(id))))
}

// snapshotRecord is what is recorded of a region of a snapshot.
func (f *Files) snapshotRecord(e Entry, region int) (s sumRecord, ok bool, err error) {
	f.frozen.mu.Lock()
	defer f.frozen.mu.Unlock()
	file, err := f.frozen.open(f, e, false)
	if err != nil || file == nil {
		return s, false, err
	}
	s, ok = readSum(file, region)
	return s, ok && (s.stamp == e.Generation || f.hooks.StaleSums), nil
}

// recordSnapshot records what a region of a snapshot is.
func (f *Files) recordSnapshot(e Entry, region int, s sumRecord) error {
	f.frozen.mu.Lock()
	defer f.frozen.mu.Unlock()
	file, err := f.frozen.open(f, e, true)
	if err == nil {
		s.stamp = e.Generation
		err = writeSum(file, region, s)
	}
	if err != nil && !IsFull(err) {
		return fmt.Errorf("replica %s: record a checksum of snapshot %d: %w", f.dir, e.Snapshot, err)
	}
	return nil
}

// SnapshotSum is Sum, of the first n bytes of a snapshot's region: all, or what
// there is of the last. What nothing is known of is recorded; the snapshot must be
// on disk.
func (f *Files) SnapshotSum(v *View, region int, n int64) (wire.Sum, error) {
	is, err := f.sumWith(v, int64(region)*f.geometry().region, n)
	if err != nil {
		return wire.Sum{}, err
	}
	out, e, err := f.judgeSnapshot(v, region, is)
	if err == nil && out.State == wire.SumNew {
		err = f.recordSnapshot(e, region, is)
	}
	return out, err
}

// ReadVerified is ReadAt of whole regions, of the last as far as p goes. One that
// is not what is known of it is volume.ErrDamaged.
func (v *View) ReadVerified(p []byte, off int64) error {
	if err := v.ReadAt(p, off); err != nil {
		return err
	}
	size := v.f.geometry().region
	for at := int64(0); at < int64(len(p)); at += size {
		part := p[at:min(at+size, int64(len(p)))]
		region := int((off + at) / size)
		out, _, err := v.f.judgeSnapshot(v, region, sumOf(sha256.Sum256(part), int64(len(part))))
		if err != nil {
			return err
		}
		if out.State == wire.SumDiffers {
			return fmt.Errorf("snapshot %d, region %d, at %d: %w", v.id, region, off+at, volume.ErrDamaged)
		}
	}
	return nil
}

// judgeSnapshot compares what a snapshot's region is with what is known of it: by
// a record of its own, or by one of a later snapshot, or of the volume, that has
// the same blocks there.
func (f *Files) judgeSnapshot(v *View, region int, is sumRecord) (out wire.Sum, e Entry, err error) {
	out = wire.Sum{State: wire.SumNew, Sum: is.sum}
	f.maps.RLock()
	defer f.maps.RUnlock()
	c, index, err := v.place()
	if err != nil {
		return out, e, err
	}
	e = c.entries[index]
	// Before it is known that nothing was written since: a record with a later
	// stamp would be of something else.
	stamp := f.stampOf(c, region)
	for i := index; i < len(c.layers); i++ {
		if i > index {
			if holds, err := c.layers[i].table.holds(region); holds || err != nil {
				return out, e, err
			}
		}
		if c.entries[i].Snapshot == 0 {
			continue
		}
		was, ok, err := f.snapshotRecord(c.entries[i], region)
		if err != nil || ok && was.length == is.length {
			out.State = compared(was, is)
			return out, e, err
		}
	}
	was, ok, err := f.volumeRecord(region)
	if ok && was.stamp == stamp && was.length == is.length {
		out.State = compared(was, is)
	}
	return out, e, err
}

func compared(was, is sumRecord) uint8 {
	if was.sum == is.sum {
		return wire.SumSame
	}
	return wire.SumDiffers
}

// handDown records of the newest snapshot what is recorded of the volume, where
// both have the same blocks: the volume's record ends with the next write.
func (f *Files) handDown(region int, is sumRecord) error {
	f.maps.RLock()
	defer f.maps.RUnlock()
	c := f.chain.Load()
	if c.where == nil || c.target == 0 || c.begun(f.geometry(), region) {
		return nil
	}
	e := c.entries[c.target-1]
	if end := int64(region)*f.geometry().region + int64(is.length); end > int64(e.Size) {
		return nil // it has less of the region
	}
	if _, ok, err := f.snapshotRecord(e, region); ok || err != nil {
		return err
	}
	return f.recordSnapshot(e, region, is)
}

// place is the chain, and which of its layers is the view's newest. Needs f.maps
// shared.
func (v *View) place() (*chain, int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	c, err := v.current()
	return c, v.index, err
}

// Mend makes a range of a snapshot p, which is what it once was: blocks that
// differ from that are damaged, and written anew where they lie. What nobody can
// write, as it is the base's, is volume.ErrDamaged. Nobody else may move blocks
// meanwhile.
func (f *Files) Mend(v *View, off int64, p []byte) error {
	g := f.geometry()
	written := map[*stratum]bool{}
	err := v.with(off, int64(len(p)), func(c *chain, slot func(int64) uint8) error {
		for at, end := off, off+int64(len(p)); at < end; {
			block := at / g.block
			s := span{at, min((block+1)*g.block, end)}
			l := c.bySlot[slot(block)]
			differs, err := c.differs(slot(block), s, p[s.from-off:s.to-off])
			switch {
			case err != nil:
				return err
			case differs && l == nil:
				return fmt.Errorf("what lies at %d is the base's, which has to be mended: %w", s.from, volume.ErrDamaged)
			case differs:
				written[l] = true
				if err := putThin(l.data, s.from, p[s.from-off:s.to-off]); err != nil {
					return err
				}
			}
			at = s.to
		}
		return nil
	})
	for l := range written {
		err = errors.Join(err, syncFile(l.data, "what was mended"))
	}
	if err != nil {
		return fmt.Errorf("replica %s: mend %d bytes at %d of snapshot %d: %w", f.dir, len(p), off, v.id, err)
	}
	return nil
}

// differs tells whether a range is something else in a slot.
func (c *chain) differs(slot uint8, s span, p []byte) (bool, error) {
	is := make([]byte, s.len())
	err := c.readSlot(slot, is, s.from)
	return !bytes.Equal(is, p), err
}
