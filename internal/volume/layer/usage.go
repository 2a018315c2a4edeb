package layer

import (
	"errors"
	"fmt"
	"path"
)

// Usage is how many bytes the replica takes on the disk, and how many of these
// it takes only for its snapshots; a little less or more while blocks move.
func (f *Files) Usage() (used, snapshots uint64, err error) {
	names, err := f.fs.ReadDir(f.dir)
	if err != nil {
		return 0, 0, fmt.Errorf("replica %s: %w", f.dir, err)
	}
	for _, n := range names {
		file, err := f.fs.Open(path.Join(f.dir, n), false)
		if err != nil {
			continue // it has just been deleted
		}
		bytes, err := file.Used()
		if err = errors.Join(err, file.Close()); err != nil {
			return 0, 0, fmt.Errorf("replica %s: %w", f.dir, err)
		}
		used += uint64(bytes)
	}
	// Without the lock: looking at large files takes long, and a snapshot, for
	// which everybody waits, would wait for that.
	c, g := f.current(), f.geometry()
	for _, l := range c.layers[:c.target] {
		at := int64(0)
		err := fileExtents(l.data, 0, g.size, func(n int64, hole bool) bool {
			if !hole {
				snapshots += c.notRead(g, l, span{at, at + n})
			}
			at += n
			return true
		})
		if err != nil {
			return 0, 0, fmt.Errorf("replica %s: %w", f.dir, err)
		}
	}
	return used, min(snapshots, used), nil
}

// notRead is how much of a range of a layer is newer in another one.
func (c *chain) notRead(g geometry, l *stratum, s span) (bytes uint64) {
	for block := s.from / g.block; block*g.block < s.to; block++ {
		if b := g.span(block); c.bySlot[c.slot(block)] != l {
			bytes += uint64(min(b.to, s.to) - max(b.from, s.from))
		}
	}
	return bytes
}
