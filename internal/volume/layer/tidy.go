package layer

import (
	"errors"
	"fmt"
	"path"
	"slices"
)

const (
	// moveRegions bounds what one step of tidying moves, and of detaching copies.
	moveRegions = 4
	// stampRegions bounds a step of tidying where there is little but stamps.
	stampRegions = 512
)

// cursor is how far a pass over a layer's regions has come. Losing it costs no
// more than a pass.
type cursor struct {
	layer  uint32
	region int
	// drained: the pass has found nothing any more.
	drained bool
}

// Untidy tells whether there are layers that no snapshot keeps apart.
func (f *Files) Untidy() bool {
	c := f.chain.Load()
	return c.pair() >= 0
}

// pair is the index of the lowest layer that can be made one with the layer
// above it; -1: there is none.
func (c *chain) pair() int {
	return slices.IndexFunc(c.entries[:len(c.entries)-1], func(e Entry) bool { return e.Snapshot == 0 })
}

// MoveDown moves some of the blocks of a layer into the one below, from which no
// snapshot keeps it apart. Nothing that can be read changes. When drained is
// true, the layer holds nothing any more, and DropLayer should follow. Nobody
// else may move blocks, or take names off, at the same time.
//
// The order is: the content, durable; the lower layer's rows; the upper layer's
// rows; only then the upper layer's space. At every instant the newest layer
// that holds a block has its content.
func (f *Files) MoveDown() (drained bool, err error) {
	c := f.current()
	i := c.pair()
	if i < 0 {
		return false, nil
	}
	upper := c.entries[i+1].Number
	if f.tidying.layer != upper {
		f.tidying = cursor{layer: upper}
	}
	// Blocks are dropped for being in a newer layer: they must stay there.
	var p *pick
	err = c.settle()
	if err == nil {
		p, err = f.pickUp(c, i)
	}
	if err == nil && p.empty() {
		f.tidying.drained = true
		return true, nil
	}
	if err == nil {
		err = f.moveDown(c, i, p)
	}
	if err != nil {
		return false, fmt.Errorf("replica %s: tidy layer %d: %w", f.dir, upper, err)
	}
	f.tidying.region = p.next
	return false, nil
}

// current is the chain for those who do not exclude its being replaced.
func (f *Files) current() *chain {
	f.maps.RLock()
	defer f.maps.RUnlock()
	return f.chain.Load()
}

// pick is what a step moves.
type pick struct {
	blocks []int64 // that the upper layer holds
	unused map[int64]bool
	down   []mark // for the lower layer
	clear  []mark // for the upper one
	next   int    // region to go on with
}

func (p *pick) empty() bool { return len(p.down) == 0 }

// full tells whether that is enough for one step.
func (p *pick) full() bool { return len(p.clear) == moveRegions || len(p.down) == stampRegions }

// add notes what the upper layer says of a region.
func (p *pick) add(g geometry, region int, r row) {
	p.next = region + 1
	p.down = append(p.down, mark{region: region, stamp: r.stamp, set: r.held})
	if r.held == 0 {
		return
	}
	p.clear = append(p.clear, mark{region: region, clear: r.held})
	for b := range g.perRegion() {
		if r.held&(1<<b) != 0 {
			p.blocks = append(p.blocks, int64(region)*g.perRegion()+b)
		}
	}
}

// pickUp finds the next regions of which layer i+1 holds blocks, or has a stamp
// that the layer below does not have: while it was the lowest of its group, it was
// given the stamps of what was written in place in the layers above it.
func (f *Files) pickUp(c *chain, i int) (*pick, error) {
	g := f.geometry()
	p := &pick{unused: map[int64]bool{}}
	below := c.layers[i].table.stamps()
	var failed error
	err := c.layers[i+1].table.rows(f.tidying.region, func(region int, r row) bool {
		wanted := r.held != 0
		if !wanted && r.stamp != 0 {
			var stamp uint64
			stamp, failed = below(region)
			wanted = stamp < r.stamp
		}
		if wanted && failed == nil {
			p.add(g, region, r)
		}
		return failed == nil && !p.full()
	})
	if err = errors.Join(err, failed); err == nil {
		err = c.findUnused(g, i+1, p)
	}
	return p, err
}

// findUnused finds blocks of a layer that a newer layer of its group holds as
// well, so that nobody reads them.
func (c *chain) findUnused(g geometry, i int, p *pick) error {
	if len(p.clear) == 0 {
		return nil
	}
	picked := map[int]uint16{}
	for _, m := range p.clear {
		picked[m.region] = m.clear
	}
	for j := i; j < len(c.layers)-1 && c.entries[j].Snapshot == 0; j++ {
		err := c.layers[j+1].table.rows(p.clear[0].region, func(region int, r row) bool {
			for b := range g.perRegion() {
				if r.held&picked[region]&(1<<b) != 0 {
					p.unused[int64(region)*g.perRegion()+b] = true
				}
			}
			return region < p.next
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// hold makes those who write blocks in place wait until release is called, and
// returns when none of them is under way.
func (f *Files) hold(blocks []int64) (release func()) {
	m := &moving{blocks: map[int64]bool{}, done: make(chan struct{})}
	for _, b := range blocks {
		m.blocks[b] = true
	}
	f.maps.Lock()
	defer f.maps.Unlock()
	f.moving.Store(m)
	return func() {
		f.moving.Store(nil)
		close(m.done)
	}
}

func (f *Files) moveDown(c *chain, i int, p *pick) error {
	g, lower, upper := f.geometry(), c.layers[i], c.layers[i+1]
	if i >= c.target {
		defer f.hold(p.blocks)()
	}
	for _, b := range p.blocks {
		if p.unused[b] {
			continue
		}
		if err := c.copy(lower.data, c.slots[i+1], g.span(b)); err != nil {
			return err
		}
	}
	if !f.hooks.MoveUnsynced {
		if err := syncFile(lower.data, "what was moved"); err != nil {
			return err
		}
	}
	if err := lower.table.apply(p.withoutUnused(g)); err != nil {
		return err
	}
	if err := upper.table.apply(p.clear); err != nil {
		return err
	}
	f.moved(c, i, p.blocks)
	for _, s := range g.spans(p.blocks) {
		if err := upper.data.Punch(s.from, s.len()); err != nil {
			return err
		}
	}
	return nil
}

// withoutUnused are the lower layer's marks; blocks that were not copied it does
// not hold.
func (p *pick) withoutUnused(g geometry) []mark {
	marks := slices.Clone(p.down)
	for i := range marks {
		for b := range g.perRegion() {
			if p.unused[int64(marks[i].region)*g.perRegion()+b] {
				marks[i].set &^= 1 << b
			}
		}
	}
	return marks
}

// moved takes the blocks of layer i+1 for being in layer i. When it returns
// nobody uses them where they were.
func (f *Files) moved(c *chain, i int, blocks []int64) {
	f.maps.Lock()
	defer f.maps.Unlock()
	for _, b := range blocks {
		c.move(b, c.slots[i+1], c.slots[i])
	}
	f.version++
}

// spans are the places of blocks, which are sorted.
func (g geometry) spans(blocks []int64) []span {
	var list []span
	for _, b := range blocks {
		list = appendSpan(list, g.span(b))
	}
	return list
}

// Settle puts on disk what is provisional. Forget and DropBase do so, too, while
// nobody may write: called before, this makes that short.
func (f *Files) Settle() error { return f.current().settle() }

// settle puts on disk what the tables' pages say provisionally.
func (c *chain) settle() error {
	for _, l := range c.layers {
		if err := l.table.settle(); err != nil {
			return err
		}
	}
	return nil
}

// DropLayer takes a layer that MoveDown has drained out of the chain, and deletes
// its files.
func (f *Files) DropLayer() error {
	c := f.chain.Load()
	i := c.pair()
	if i < 0 || !f.tidying.drained || f.tidying.layer != c.entries[i+1].Number {
		return nil
	}
	entries := slices.Clone(c.entries)
	gone := entries[i+1]
	entries[i].Snapshot, entries[i].Generation, entries[i].Size = gone.Snapshot, gone.Generation, gone.Size
	entries = slices.Delete(entries, i+1, i+2)
	if err := f.Update(func(sb *Superblock) { sb.Layers = entries }); err != nil {
		return err
	}
	upper := c.layers[i+1]
	next := newChain(entries, slices.Delete(slices.Clone(c.layers), i+1, i+2), slices.Delete(slices.Clone(c.slots), i+1, i+2), c.lowest, c.stamps, c.where)
	f.replace(next.simplest())
	f.tidying = cursor{}
	_ = upper.close()
	// What stays of them the next opening deletes.
	_ = f.fs.RemoveAll(path.Join(f.dir, dataName(gone.Number)))
	_ = f.fs.RemoveAll(path.Join(f.dir, tableName(gone.Number)))
	return nil
}

// simplest needs no map of blocks if there is one layer and no base.
func (c *chain) simplest() *chain {
	if len(c.layers) > 1 || c.based() {
		return c
	}
	return newChain(c.entries, c.layers, []uint8{0}, c.lowest, c.stamps, nil)
}
