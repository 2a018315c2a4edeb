package replica

import (
	"fmt"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// Sums fills out with the checksums of a range's regions, which are whole, but
// for the volume's last. What has no record that counts, and was not written in
// the generation or later, is recorded: everything of an earlier one must be on
// disk. Nobody may write the range meanwhile.
func (s *Session) Sums(off, n int64, generation uint64, out []wire.Sum) error {
	return s.do(func(r *Replica) error {
		first, regions, err := r.regions(off, n, r.files.Size())
		if err != nil {
			return err
		}
		return r.read(fillSums(out, regions, func(i int) (wire.Sum, error) { return r.files.Sum(first+i, generation) }))
	})
}

// SnapshotSums is Sums of a snapshot, which must be on disk: what nothing is
// known of is recorded.
func (s *Session) SnapshotSums(id uint32, off, n int64, out []wire.Sum) error {
	return s.do(func(r *Replica) error {
		v, first, regions, err := r.snapshotRegions(id, off, n)
		if err != nil {
			return err
		}
		size := int64(r.files.Superblock().RegionSize)
		return r.read(fillSums(out, regions, func(i int) (wire.Sum, error) {
			return r.files.SnapshotSum(v, first+i, min(size, n-int64(i)*size))
		}))
	})
}

func fillSums(out []wire.Sum, regions int, sum func(i int) (wire.Sum, error)) (err error) {
	if len(out) < regions {
		return fmt.Errorf("room for %d sums of %d: %w", len(out), regions, volume.ErrRange)
	}
	for i := range regions {
		if out[i], err = sum(i); err != nil {
			return err
		}
	}
	return nil
}

// ReadVerified is ReadAt of whole regions. One whose content is not what was
// recorded of it is volume.ErrDamaged.
func (s *Session) ReadVerified(p []byte, off int64) error {
	return s.do(func(r *Replica) error {
		first, regions, err := r.regions(off, int64(len(p)), r.files.Size())
		if err != nil {
			return err
		}
		if err := r.read(r.files.ReadAt(p, off)); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
		}
		size := int64(r.files.Superblock().RegionSize)
		for i := range regions {
			at := int64(i) * size
			ok, err := r.files.Verify(first+i, p[at:min(at+size, int64(len(p)))])
			if err != nil {
				return err
			}
			if !ok {
				return fmt.Errorf("region %d, at %d: %w", first+i, off+at, volume.ErrDamaged)
			}
		}
		return nil
	})
}

// ReadSnapshotVerified is ReadVerified of a snapshot.
func (s *Session) ReadSnapshotVerified(id uint32, p []byte, off int64) error {
	return s.do(func(r *Replica) error {
		v, _, _, err := r.snapshotRegions(id, off, int64(len(p)))
		if err == nil {
			err = r.read(v.ReadVerified(p, off))
		}
		if err != nil {
			return fmt.Errorf("read %d bytes at %d of snapshot %d: %w", len(p), off, id, err)
		}
		return nil
	})
}

// Mend makes whole regions of a snapshot what they once were, p, and makes that
// durable. volume.ErrDamaged: what is damaged is the base's.
func (s *Session) Mend(id uint32, p []byte, off int64) error {
	r := s.r
	r.upkeep.Lock()
	defer r.upkeep.Unlock()
	return s.do(func(r *Replica) error {
		v, _, _, err := r.snapshotRegions(id, off, int64(len(p)))
		if err == nil {
			err = r.haveRoom(int64(len(p)))
		}
		if err != nil {
			return err
		}
		return r.outcome(fmt.Sprintf("mend snapshot %d", id), r.files.Mend(v, off, p))
	})
}

// snapshotRegions is which regions of a snapshot a range is. It may end where
// the record says that the snapshot does: a replica that had begun to grow has
// more of it.
func (r *Replica) snapshotRegions(id uint32, off, n int64) (v *layer.View, first, count int, err error) {
	if v, err = r.files.LastView(id); err == nil {
		first, count, err = r.regions(off, n, off+n)
	}
	return v, first, count, err
}

// regions is which regions a range is, of so many bytes.
func (r *Replica) regions(off, n, of int64) (first, count int, err error) {
	if err := r.check(off, n); err != nil {
		return 0, 0, err
	}
	size, end := int64(r.files.Superblock().RegionSize), off+n
	if off%size != 0 || end > of || end%size != 0 && end != of {
		return 0, 0, fmt.Errorf("%d bytes at %d are no whole regions of %d: %w", n, off, size, volume.ErrRange)
	}
	return int(off / size), int((n + size - 1) / size), nil
}
