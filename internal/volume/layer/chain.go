package layer

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync/atomic"
)

// stratum is one layer's files.
type stratum struct {
	data  File
	table *table
	// dirty: it was written when it was the top, and not synced since.
	dirty atomic.Bool
}

func (s *stratum) close() error { return errors.Join(s.data.Close(), s.table.file.Close()) }

// chain is the layers of a replica, and where each block is. Only the content of
// stamps and where changes; everything else is replaced by a new chain.
//
// Layers between which there is no snapshot are a group: nobody needs to tell
// them apart, and tidying makes one of them. A block that the newest group holds
// is written in place, in whichever of its layers holds it; any other is copied
// first to the lowest of the group.
type chain struct {
	entries []Entry    // oldest first
	layers  []*stratum // of the entries
	slots   []uint8    // of the entries: what where says of their blocks
	lowest  *lowest    // what is below them

	// stamps are the newest of all layers', 8 bytes for each region: 8 MiB for
	// each TiB.
	stamps []atomic.Uint64
	// where has the slot of the newest layer that holds a block, a byte for each
	// block: 16 MiB for each TiB. Nil while there is one layer and no base. 0 is
	// the oldest layer if there is no base, else what no layer holds.
	where []atomic.Uint64

	bySlot   [MaxLayers + 1]*stratum
	writable [MaxLayers + 1]bool
	target   int // index of the layer that blocks are copied to
}

// newChain derives what follows from the layers.
func newChain(entries []Entry, layers []*stratum, slots []uint8, low *lowest, stamps, where []atomic.Uint64) *chain {
	c := &chain{entries: entries, layers: layers, slots: slots, lowest: low, stamps: stamps, where: where}
	c.target = c.group(len(layers) - 1)
	for i, s := range slots {
		c.bySlot[s] = layers[i]
		c.writable[s] = i >= c.target
	}
	if !c.based() {
		c.bySlot[0], c.writable[0] = layers[0], c.target == 0
	}
	return c
}

// group is the index of the lowest layer of the group that layer i is in.
func (c *chain) group(i int) int {
	for i > 0 && c.entries[i-1].Snapshot == 0 {
		i--
	}
	return i
}

func (c *chain) based() bool { return c.lowest.ref != BaseRef{} }

func (c *chain) top() *stratum { return c.layers[len(c.layers)-1] }

// snapshot is the index of the layer that is a snapshot's newest; -1: none.
func (c *chain) snapshot(id uint32) int {
	if id == 0 {
		return -1
	}
	return slices.IndexFunc(c.entries, func(e Entry) bool { return e.Snapshot == id })
}

// holdsAll tells whether layer i has every block that it is asked for: below it
// there is nothing.
func (c *chain) holdsAll(i int) bool { return i == 0 && !c.based() }

// freeSlot is a slot that no layer has.
func (c *chain) freeSlot() (uint8, error) {
	for s := 1; s <= MaxLayers; s++ {
		if !slices.Contains(c.slots, uint8(s)) {
			return uint8(s), nil
		}
	}
	return 0, fmt.Errorf("%d layers, no more can be", len(c.slots))
}

func (c *chain) slot(block int64) uint8 {
	return uint8(c.where[block/8].Load() >> (block % 8 * 8))
}

// move notes that a block is now in another layer, if it is where it was
// thought to be.
func (c *chain) move(block int64, from, to uint8) {
	word, shift := &c.where[block/8], block%8*8
	for {
		old := word.Load()
		if uint8(old>>shift) != from {
			return
		}
		if word.CompareAndSwap(old, old&^(0xff<<shift)|uint64(to)<<shift) {
			return
		}
	}
}

// set notes where a block is, wherever it was.
func (c *chain) set(block int64, to uint8) {
	for {
		from := c.slot(block)
		if from == to {
			return
		}
		c.move(block, from, to)
	}
}

func (c *chain) stamp(region int, stamp uint64) {
	for {
		old := c.stamps[region].Load()
		if old >= stamp || c.stamps[region].CompareAndSwap(old, stamp) {
			return
		}
	}
}

// stamped tells whether the regions have the stamp, or a later one.
func (c *chain) stamped(first, last int, stamp uint64) bool {
	for r := first; r <= last; r++ {
		if c.stamps[r].Load() < stamp {
			return false
		}
	}
	return true
}

// geometry is how a volume is cut into regions, and those into blocks.
type geometry struct {
	size   int64
	region int64
	block  int64
}

// blocksPerRegion is how many blocks a region has, at most. No block is smaller
// than two sectors: so even where regions are tiny, a block can be written in
// part.
const blocksPerRegion = 16

func newGeometry(size uint64, regionSize uint32) geometry {
	return geometry{size: int64(size), region: int64(regionSize), block: max(int64(regionSize)/blocksPerRegion, 2*sectorSize)}
}

func (g geometry) regions() int { return regions(uint64(g.size), uint32(g.region)) }

// perRegion is how many blocks a region has.
func (g geometry) perRegion() int64 { return g.region / g.block }

// words is how long where is.
func (g geometry) words() int { return int((int64(g.regions())*g.perRegion() + 7) / 8) }

// blocks are those of a region, as far as the volume goes.
func (g geometry) blocks(region int) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		first := int64(region) * g.perRegion()
		for b := first; b < first+g.perRegion() && b*g.block < g.size; b++ {
			if !yield(b) {
				return
			}
		}
	}
}

// span is a block's place, cut off at the volume's end.
func (g geometry) span(block int64) span {
	return span{block * g.block, min((block+1)*g.block, g.size)}
}

// mask is a block's bit in its region's mask.
func (g geometry) mask(block int64) uint16 { return 1 << (block % g.perRegion()) }

func (g geometry) regionOf(block int64) int { return int(block / g.perRegion()) }

// span is from the first byte to the one after the last.
type span struct{ from, to int64 }

func (s span) len() int64 { return s.to - s.from }

// appendSpan adds a span that comes after the others.
func appendSpan(spans []span, s span) []span {
	if n := len(spans); n > 0 && spans[n-1].to == s.from {
		spans[n-1].to = s.to
		return spans
	}
	return append(spans, s)
}
