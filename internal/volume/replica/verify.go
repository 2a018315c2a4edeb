package replica

import (
	"fmt"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// Sums fills out with the checksums of a range's regions, which are whole, but
// for the volume's last. What has no record that counts, and was not written in
// the generation or later, is recorded: everything of an earlier one must be on
// disk. Nobody may write the range meanwhile.
func (s *Session) Sums(off, n int64, generation uint64, out []wire.Sum) error {
	return s.do(func(r *Replica) error {
		first, regions, err := r.regions(off, n)
		if err != nil {
			return err
		}
		if len(out) < regions {
			return fmt.Errorf("room for %d sums of %d: %w", len(out), regions, volume.ErrRange)
		}
		for i := range regions {
			if out[i], err = r.files.Sum(first+i, generation); err != nil {
				return err
			}
		}
		return nil
	})
}

// ReadVerified is ReadAt of whole regions. One whose content is not what was
// recorded of it is volume.ErrDamaged.
func (s *Session) ReadVerified(p []byte, off int64) error {
	return s.do(func(r *Replica) error {
		first, regions, err := r.regions(off, int64(len(p)))
		if err != nil {
			return err
		}
		if err := r.files.ReadAt(p, off); err != nil {
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

// regions is which regions a range is.
func (r *Replica) regions(off, n int64) (first, count int, err error) {
	if err := r.check(off, n); err != nil {
		return 0, 0, err
	}
	size, end := int64(r.files.Superblock().RegionSize), off+n
	if off%size != 0 || end%size != 0 && end != r.files.Size() {
		return 0, 0, fmt.Errorf("%d bytes at %d are no whole regions of %d: %w", n, off, size, volume.ErrRange)
	}
	return int(off / size), int((n + size - 1) / size), nil
}
