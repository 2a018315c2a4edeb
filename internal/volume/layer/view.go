package layer

import (
	"fmt"
	"sync"

	"github.com/argon-cluster/argon/internal/volume"
)

// View is a snapshot's content, open. It keeps a bounded part of where that is in
// memory, and reads the rest from the tables as needed. Safe for concurrent use;
// it stays valid while layers are tidied, and ends with the snapshot.
type View struct {
	f  *Files
	id uint32

	mu      sync.Mutex
	version uint64 // of the files, that the rest is of
	found   bool
	index   int // of the newest layer
	size    int64
	leaves  map[int]*leaf
}

// leaf is what the tables say of some regions.
type leaf struct {
	slots  [rowsPerPage * blocksPerRegion]uint8
	stamps [rowsPerPage]uint64
}

// maxLeaves bounds what a view keeps: 9.6 KiB each, for 400 MiB of the volume.
const maxLeaves = 256

// View opens a snapshot.
func (f *Files) View(id uint32) (*View, error) {
	v := &View{f: f, id: id}
	f.maps.RLock()
	defer f.maps.RUnlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, err := v.current(); err != nil {
		return nil, err
	}
	return v, nil
}

// current is the chain, with what is remembered of it being right. Needs f.maps
// shared, and mu.
func (v *View) current() (*chain, error) {
	c := v.f.chain.Load()
	if !v.found || v.version != v.f.version {
		v.index = c.snapshot(v.id)
		v.found, v.version, v.leaves = v.index >= 0, v.f.version, map[int]*leaf{}
		if v.found {
			v.size = int64(c.entries[v.index].Size)
		}
	}
	if !v.found {
		return nil, fmt.Errorf("snapshot %d: %w", v.id, volume.ErrNoSnapshot)
	}
	return c, nil
}

// leaf finds what is known of a region and its neighbours.
func (v *View) leaf(c *chain, g geometry, number int) (*leaf, error) {
	if l := v.leaves[number]; l != nil {
		return l, nil
	}
	l := &leaf{}
	first := number * rowsPerPage
	for i := range v.index + 1 {
		err := c.layers[i].table.rows(first, func(region int, r row) bool {
			at := region - first
			if at >= rowsPerPage {
				return false
			}
			l.stamps[at] = max(l.stamps[at], r.stamp)
			for b := 0; !c.holdsAll(i) && b < int(g.perRegion()); b++ {
				if r.held&(1<<b) != 0 {
					l.slots[at*blocksPerRegion+b] = c.slots[i]
				}
			}
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	if len(v.leaves) >= maxLeaves {
		clear(v.leaves)
	}
	v.leaves[number] = l
	return l, nil
}

// with calls use with the chain, and with what tells the slots of the blocks of a
// range. As long as it runs, no block moves away from where it is found.
func (v *View) with(off, n int64, use func(c *chain, slot func(block int64) uint8) error) error {
	v.f.maps.RLock()
	defer v.f.maps.RUnlock()
	c, leaves, err := v.around(off, n)
	if err != nil {
		return err
	}
	g := v.f.geometry()
	return use(c, func(block int64) uint8 {
		region := int(block / g.perRegion())
		return leaves[region/rowsPerPage].slots[region%rowsPerPage*blocksPerRegion+int(block%g.perRegion())]
	})
}

// around finds the leaves of a range.
func (v *View) around(off, n int64) (*chain, map[int]*leaf, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	c, err := v.current()
	if err != nil {
		return nil, nil, err
	}
	g := v.f.geometry()
	leaves := map[int]*leaf{}
	for number := int(off / g.region / rowsPerPage); int64(number)*rowsPerPage*g.region < off+n; number++ {
		if leaves[number], err = v.leaf(c, g, number); err != nil {
			return nil, nil, err
		}
	}
	return c, leaves, nil
}

// Size is the volume's when the snapshot was made.
func (v *View) Size() int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.size
}

// inside is how much of a range the snapshot has.
func (v *View) inside(off, n int64) int64 { return max(0, min(n, v.Size()-off)) }

// ReadAt fills p; there are zeros beyond the snapshot's size.
func (v *View) ReadAt(p []byte, off int64) error {
	n := v.inside(off, int64(len(p)))
	clear(p[n:])
	return v.with(off, n, func(c *chain, slot func(int64) uint8) error {
		return c.runs(v.f.geometry(), off, n, slot, func(s span, slot uint8) (bool, error) {
			return true, c.readSlot(slot, p[s.from-off:s.to-off], s.from)
		})
	})
}

// ReadCached reports that it cannot say.
func (v *View) ReadCached([]byte, int64) bool { return false }

// leafSpan is how much Extents and Changed look at at once.
func (v *View) leafSpan() int64 { return rowsPerPage * v.f.geometry().region }

// Extents calls found for each stretch of the range, hole or data, until that
// returns false; it must not use the view. Holes read as zeros.
func (v *View) Extents(off, n int64, found func(n int64, hole bool) bool) error {
	inside := v.inside(off, n)
	more := true
	m := merger{found: found}
	for at := off; more && at < off+inside; at += v.leafSpan() {
		part := min(v.leafSpan(), off+inside-at)
		err := v.with(at, part, func(c *chain, slot func(int64) uint8) error {
			return v.f.extents(c, slot, at, part, func(n int64, hole bool) bool {
				more = m.add(n, hole)
				return more
			})
		})
		if err != nil {
			return err
		}
	}
	if more && n > inside {
		m.add(n-inside, true)
	}
	m.end()
	return nil
}

// Changed is Files.Changed, of the snapshot.
func (v *View) Changed(since uint64, off, n, grain int64, bits []byte) error {
	v.f.maps.RLock()
	defer v.f.maps.RUnlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	c, err := v.current()
	if err != nil {
		return err
	}
	g := v.f.geometry()
	changed(g, v.f.sb.Load().Generation, since, off, n, grain, bits, func(region int) uint64 {
		l, lerr := v.leaf(c, g, region/rowsPerPage)
		if lerr != nil {
			err = lerr
			return 0
		}
		return l.stamps[region%rowsPerPage]
	})
	return err
}

// HasData is Files.HasData, of the snapshot.
func (v *View) HasData(off, n, grain int64, bits []byte) error {
	return hasData(v.Extents, off, n, grain, bits)
}

// Close ends nothing but the view.
func (v *View) Close() error { return nil }

// LastView is a view that is kept for whoever reads a snapshot piece by piece.
func (f *Files) LastView(id uint32) (*View, error) {
	f.views.Lock()
	defer f.views.Unlock()
	if f.view == nil || f.view.id != id {
		v, err := f.View(id)
		if err != nil {
			return nil, err
		}
		f.view = v
	}
	return f.view, nil
}

// Revert makes a range what it is in a snapshot, zeros beyond its size. Blocks
// that were not written since are left alone. What is damaged changes nothing:
// volume.ErrDamaged.
func (f *Files) Revert(v *View, off, n int64, generation uint64) error {
	differs, err := f.since(v, off, n)
	if err == nil && len(differs) > 0 {
		err = f.fitToRevert(v, off, n)
	}
	if err != nil {
		return err
	}
	for _, s := range differs {
		if err := f.revert(v, s, generation); err != nil {
			return err
		}
	}
	return nil
}

// fitToRevert is volume.ErrDamaged if the snapshot is not what it was there.
func (f *Files) fitToRevert(v *View, off, n int64) error {
	if off%f.geometry().region != 0 {
		return nil // a part of a region, of which nothing is known
	}
	return v.ReadVerified(make([]byte, v.inside(off, n)), off)
}

// since is what of a range is not where the snapshot has it.
func (f *Files) since(v *View, off, n int64) (differs []span, err error) {
	inside := v.inside(off, n)
	err = v.with(off, inside, func(c *chain, slot func(int64) uint8) error {
		return c.runs(f.geometry(), off, inside, slot, func(s span, there uint8) (bool, error) {
			return true, c.runs(f.geometry(), s.from, s.len(), c.slot, func(s span, here uint8) (bool, error) {
				// One layer may have two slots, see chain.where.
				if c.bySlot[here] != c.bySlot[there] {
					differs = appendSpan(differs, s)
				}
				return true, nil
			})
		})
	})
	if n > inside {
		differs = appendSpan(differs, span{off + inside, off + n})
	}
	return differs, err
}

func (f *Files) revert(v *View, s span, generation uint64) error {
	type stretch struct {
		span
		hole bool
	}
	var list []stretch
	at := s.from
	err := v.Extents(s.from, s.len(), func(n int64, hole bool) bool {
		list = append(list, stretch{span{at, at + n}, hole})
		at += n
		return true
	})
	if err != nil {
		return err
	}
	buf := make([]byte, min(copyStep, s.len()))
	for _, e := range list {
		if e.hole {
			if err := f.Zero(e.from, e.len(), generation); err != nil {
				return err
			}
			continue
		}
		for at := e.from; at < e.to; at += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), e.to-at)]
			if err := v.ReadAt(p, at); err != nil {
				return err
			}
			if err := f.Write(p, at, generation); err != nil {
				return err
			}
		}
	}
	return nil
}
