package mirror

import (
	"fmt"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// This file compares the replicas in sync, when the record asks for it, a
// little at a time: each sends the checksums of some regions, which nobody
// writes meanwhile. Where they differ, a replica that finds its region as it
// once recorded it has the good copy; the others are mended from it. Where
// nobody can tell, nothing is changed and the operator is told.

// scrubbing is one under way.
type scrubbing struct {
	number   uint64 // 0: none
	cursor   int64
	busy     bool
	mending  int // regions
	next     time.Duration
	repaired uint64
	unclear  uint64
	flushed  bool
}

// scrubBatch is how many regions are compared at once.
const scrubBatch = 4

// tryScrub begins a scrub that is due, and goes on with one under way, as far
// as its pace allows. Copies go first.
func (c *Core) tryScrub() {
	s := &c.scrub
	if s.number == 0 && c.volume.GetScrub().GetWanted() > c.volume.GetScrub().GetFinished() {
		*s = scrubbing{number: c.volume.GetScrub().GetWanted()}
	}
	if c.volume.GetWantedBytes() > uint64(c.cfg.Size) {
		return // until all have grown, the last region is not the same for all
	}
	if s.number == 0 || s.busy || s.mending > 0 || s.flushed || c.now < s.next || !c.atEase() || c.anyRole(syncing) || c.rollback.due(c.volume) {
		return
	}
	s.busy = true
	if s.cursor >= c.cfg.Size {
		c.submit(&op{verb: VerbFlush, who: members, then: func(*op) { s.busy, s.flushed = false, true }})
		return
	}
	n := min(scrubBatch*c.cfg.Grain, c.cfg.Size-s.cursor)
	s.next = c.now + time.Duration(float64(n)/float64(c.cfg.ScrubPace)*float64(time.Second))
	c.submit(c.sumsOp(s.cursor, n, c.summed))
}

// sumsOp asks all members for the checksums of a range. They record those of
// regions that are flushed: what a power cut may take back must not be called
// damaged afterwards.
func (c *Core) sumsOp(off, n int64, then func(*op)) *op {
	o := &op{
		verb: VerbSums, who: members, lock: shared, off: off, len: n, each: map[uint32][]byte{}, then: then,
		generation: max(c.clock.equalBefore, 1),
	}
	for _, p := range c.peers {
		o.each[p.id] = make([]byte, (n+c.cfg.Grain-1)/c.cfg.Grain*wire.SumSize)
	}
	return o
}

// summed looks at the checksums of a batch.
func (c *Core) summed(o *op) {
	s := &c.scrub
	s.busy = false
	if s.number == 0 {
		return
	}
	s.cursor = o.off + o.len
	answers := map[uint32][]wire.Sum{}
	for _, p := range c.peers {
		// One that left the set meanwhile has not answered, and does not matter.
		if list, err := wire.ParseSums(o.each[p.id]); err == nil && p.role == member && p.healthy() {
			answers[p.id] = list
		}
	}
	for i := int64(0); i*c.cfg.Grain < o.len; i++ {
		sums := map[uint32]wire.Sum{}
		for id, list := range answers {
			sums[id] = list[i]
		}
		off := o.off + i*c.cfg.Grain
		switch good, bad, v := verdict(sums); v {
		case repairable:
			c.mend(off, min(c.cfg.Grain, c.cfg.Size-off), good, bad)
		case unclear:
			s.unclear++
			c.note(argonv1.Severity_SEVERITY_ERROR, "scrub-unclear", fmt.Sprint(off), "the region at %d is damaged, and nothing tells which copy is good: restore it from a snapshot or a backup", off)
		}
	}
}

type finding uint8

const (
	equal finding = iota
	repairable
	unclear
)

// verdict says which replicas have the good copy of a region. Only what a
// replica recorded earlier tells; a majority does not.
func verdict(sums map[uint32]wire.Sum) (good, bad []uint32, f finding) {
	var known, differs bool
	var first, right [16]byte
	for i, id := range sortedIDs(sums) {
		s := sums[id]
		if i == 0 {
			first = s.Sum
		}
		differs = differs || s.Sum != first
		if s.State != wire.SumSame {
			continue
		}
		if known && s.Sum != right {
			return nil, nil, unclear // both were like that once
		}
		known, right = true, s.Sum
	}
	damaged := slices.ContainsFunc(sortedIDs(sums), func(id uint32) bool { return sums[id].State == wire.SumDiffers })
	switch {
	case !differs && (!damaged || len(sums) > 1):
		return nil, nil, equal // copies that agree outweigh the record of one
	case !known:
		return nil, nil, unclear
	}
	for _, id := range sortedIDs(sums) {
		if sums[id].Sum == right {
			good = append(good, id)
		} else {
			bad = append(bad, id)
		}
	}
	return good, bad, repairable
}

func sortedIDs(sums map[uint32]wire.Sum) []uint32 {
	var ids []uint32
	for id := range sums {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// mend gives those whose copy of a region is bad what a good one has. The
// region is locked from the reading to the writing; if it was written before
// the lock, the good copy is as good.
func (c *Core) mend(off, n int64, good, bad []uint32) {
	o := &op{verb: VerbReadVerified, lock: exclusive, off: off, len: n, data: make([]byte, n), optional: true}
	for _, p := range c.peers {
		if !slices.Contains(good, p.id) {
			o.damaged |= p.bit // is not read
		}
	}
	o.read = func(o *op) { c.mendRead(o, bad) }
	c.scrub.mending++
	o.then = func(o *op) {
		c.scrub.mending--
		if o.err == nil {
			c.scrub.repaired++
		}
	}
	c.submit(o)
}

func (c *Core) mendRead(o *op, bad []uint32) {
	if o.err != nil {
		c.finish(o)
		return
	}
	o.verb, o.who, o.generation, o.pending = VerbWrite, members, c.clock.generation, 0
	c.clock.used = true
	for _, p := range c.peers {
		if slices.Contains(bad, p.id) && (p.role == member || p.role == leaving) {
			o.pending |= p.bit
			c.note(argonv1.Severity_SEVERITY_WARNING, "replica-mended", fmt.Sprint(p.id, o.off), "replica %d was damaged at %d; it has a good copy again", p.id, o.off)
			c.send(o, p)
		}
	}
	c.settle(o)
}

// scrubRecorded ends a scrub.
func (c *Core) scrubRecorded(s *argonv1.Scrub) {
	c.scrub = scrubbing{}
	severity := argonv1.Severity_SEVERITY_INFO
	if s.GetUnclear() > 0 {
		severity = argonv1.Severity_SEVERITY_ERROR
	}
	c.note(severity, "scrub-finished", fmt.Sprint(s.GetFinished()), "%d regions were compared, %d mended, %d are damaged and unclear", s.GetRegions(), s.GetRepaired(), s.GetUnclear())
}

// outcome is what there is to record of a scrub; nil: nothing yet.
func (s *scrubbing) outcome(size, grain int64) *argonv1.Scrub {
	if !s.flushed {
		return nil
	}
	return &argonv1.Scrub{Finished: s.number, Regions: uint64((size + grain - 1) / grain), Repaired: s.repaired, Unclear: s.unclear}
}
