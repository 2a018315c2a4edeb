package layer

import (
	"fmt"
	"slices"
)

// Based tells whether there is a base.
func (f *Files) Based() bool { return f.sb.Load().Base != BaseRef{} }

// Detached is how far CopyDown has come since the replica was opened, in bytes.
// Not while it runs.
func (f *Files) Detached() uint64 {
	if !f.Based() {
		return 0
	}
	return uint64(min(int64(f.detaching.region)*f.geometry().region, f.Size()))
}

// detachRegions bounds a step where the base has holes, which cost little.
const detachRegions = 512

// DetachRoom is how much a step of CopyDown writes at most, in bytes.
func (f *Files) DetachRoom() int64 { return (moveRegions + 1) * f.geometry().region }

// CopyDown copies some of what only the base holds into the oldest layer; nothing
// that can be read changes. When whole is true the base is not needed any more,
// and DropBase should follow. While it runs no snapshot may be made, and nobody
// else may copy or move blocks down, or take names off.
func (f *Files) CopyDown() (whole bool, err error) {
	c := f.chain.Load()
	if !c.based() {
		return false, nil
	}
	missing, next, err := f.onlyInBase(c)
	if err == nil {
		err = f.copyDown(c, f.geometry().spans(missing))
	}
	if err != nil {
		return false, fmt.Errorf("replica %s: copy from the base: %w", f.dir, err)
	}
	f.detaching.region = next
	f.detaching.drained = next == f.geometry().regions()
	return f.detaching.drained, nil
}

// onlyInBase finds the next blocks that the oldest group does not hold, up to a
// bounded amount of data.
func (f *Files) onlyInBase(c *chain) (blocks []int64, next int, err error) {
	g := f.geometry()
	region := f.detaching.region
	last := min(region+detachRegions, g.regions())
	held, err := c.heldByOldest(region, last)
	if err != nil {
		return nil, 0, err
	}
	var data int64
	for ; region < last && data < moveRegions*g.region; region++ {
		mask := held[0]
		held = held[1:]
		for b := range g.perRegion() {
			block := int64(region)*g.perRegion() + b
			if mask&(1<<b) == 0 && block*g.block < g.size {
				blocks = append(blocks, block)
			}
		}
		s := span{int64(region) * g.region, min(int64(region+1)*g.region, g.size)}
		err := c.lowest.extents(s.from, s.len(), func(n int64, hole bool) bool {
			if !hole {
				data += n
			}
			return true
		})
		if err != nil {
			return nil, 0, err
		}
	}
	return blocks, region, nil
}

// heldByOldest is which blocks of some regions the oldest group holds.
func (c *chain) heldByOldest(from, to int) ([]uint16, error) {
	group := len(c.layers)
	if named := slices.IndexFunc(c.entries, func(e Entry) bool { return e.Snapshot != 0 }); named >= 0 {
		group = named + 1
	}
	held := make([]uint16, to-from)
	for _, l := range c.layers[:group] {
		err := l.table.rows(from, func(region int, r row) bool {
			if region < to {
				held[region-from] |= r.held
			}
			return region < to
		})
		if err != nil {
			return nil, err
		}
	}
	return held, nil
}

// copyDown copies ranges from the base into the oldest layer, which does not hold
// anything of them. If that layer is written, those who write bring blocks up
// into it, too: then they take turns.
func (f *Files) copyDown(c *chain, spans []span) error {
	if len(spans) == 0 {
		return nil
	}
	if c.target == 0 {
		f.commit.turn.Lock()
		defer f.commit.turn.Unlock()
		var requests []*request
		for _, s := range spans {
			requests = append(requests, &request{off: s.from, n: s.len(), keep: true})
		}
		return f.note(requests)
	}
	b := &batch{f: f, c: c, g: f.geometry(), into: c.layers[0], marks: map[int]mark{}, held: map[int64]bool{}}
	for _, s := range spans {
		if err := c.copy(b.into.data, 0, s); err != nil {
			return err
		}
		for block := s.from / b.g.block; block*b.g.block < s.to; block++ {
			b.hold(block)
		}
	}
	if err := syncFile(b.into.data, "what was copied"); err != nil {
		return err
	}
	if err := b.into.table.apply(sorted(b.marks)); err != nil {
		return err
	}
	f.maps.Lock()
	defer f.maps.Unlock()
	for block := range b.held {
		c.move(block, 0, c.slots[0])
	}
	f.version++
	return nil
}

// DropBase takes the base away after CopyDown has copied what is needed of it.
func (f *Files) DropBase() error {
	c := f.chain.Load()
	if !c.based() || !f.detaching.drained {
		return nil
	}
	if err := c.settle(); err != nil {
		return fmt.Errorf("replica %s: %w", f.dir, err)
	}
	if err := f.Update(func(sb *Superblock) { sb.Base, sb.BaseSize = BaseRef{}, 0 }); err != nil {
		return err
	}
	next := newChain(c.entries, c.layers, c.slots, &lowest{}, c.stamps, c.where)
	f.replace(next.simplest())
	f.detaching = cursor{}
	_ = c.lowest.close() // nobody reads it any more
	return nil
}
