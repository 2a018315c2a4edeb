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
//
// After the volume come its snapshots, the newest first: of each what the content
// that was compared before does not share with it. Nobody writes that, so nothing
// is locked.

// scrubbing is one under way.
type scrubbing struct {
	number uint64 // 0: none
	// view is the snapshot that is compared, after it the one before; nil: the
	// volume.
	view, after *argonv1.Snapshot
	// left are those that are still to be compared, the newest first; not known
	// while the volume is.
	left  []*argonv1.Snapshot
	known bool
	// A bit for each grain, up to listedTo: of a snapshot, which are to be compared;
	// where any member has data. What has none costs no reading.
	todo, data []byte
	listedTo   int64

	cursor   int64
	busy     bool
	mending  int // regions
	next     time.Duration
	compared uint64
	repaired uint64
	unclear  uint64
	flushed  bool
}

const (
	// scrubBatch is how many regions are compared at once, holeBatch how many of
	// those that nobody has data of. That may change meanwhile, and writers wait for
	// what is compared, so it is not more.
	scrubBatch, holeBatch = 4, 32
	// scrubList is for how many regions of the volume it is asked at once where
	// there is data.
	scrubList = 1 << 12
)

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
	for {
		size := c.scrubSize()
		if s.listedTo < size && (s.view != nil || s.cursor >= s.listedTo) {
			c.listScrub(size)
			return
		}
		if n, hole := s.batch(c.cfg.Grain, size); n > 0 {
			if !hole { // what the last tick came too late is made up for
				s.next = max(s.next, c.now-tick) + time.Duration(float64(n)/float64(c.cfg.ScrubPace)*float64(time.Second))
			}
			c.submit(c.sumsOp(s.cursor, n, c.summed))
			return
		}
		if !c.nextScrubView() {
			c.submit(&op{verb: VerbFlush, who: members, then: func(*op) { s.busy, s.flushed = false, true }})
			return
		}
	}
}

// scrubSize is how much there is of what is compared.
func (c *Core) scrubSize() int64 {
	if v := c.scrub.view; v != nil {
		return int64(v.GetSizeBytes())
	}
	return c.cfg.Size
}

// batch moves the cursor to what is to be compared next, and says how much that
// is, and whether nobody has data there; 0: nothing is left.
func (s *scrubbing) batch(grain, size int64) (n int64, hole bool) {
	wanted := func(off int64) bool { return s.view == nil || has(s.todo, off/grain) }
	for s.cursor < size && !wanted(s.cursor) {
		s.cursor += grain
	}
	if s.cursor >= size {
		return 0, false
	}
	hole = !has(s.data, s.cursor/grain)
	most := scrubBatch * grain
	if hole {
		most = holeBatch * grain
	}
	for at := s.cursor; n < most && at < s.listedTo && wanted(at) && has(s.data, at/grain) != hole; at += grain {
		n += grain
	}
	return min(n, size-s.cursor), hole
}

// nextScrubView goes on with the next older snapshot; false: that was the last.
func (c *Core) nextScrubView() bool {
	s := &c.scrub
	if !s.known {
		s.known = true
		if !slices.ContainsFunc(c.peers, func(p *peer) bool { return p.role == member && p.info.Old }) {
			s.left = slices.DeleteFunc(c.readySnapshots(), func(r *argonv1.Snapshot) bool {
				// One that is not recorded yet may not be on every disk.
				return c.snapshotRecord(r.GetId()).GetState() != argonv1.SnapshotState_SNAPSHOT_STATE_READY
			})
			slices.Reverse(s.left)
		}
	}
	if len(s.left) == 0 {
		return false
	}
	s.after, s.view, s.left = s.view, s.left[0], s.left[1:]
	s.cursor, s.todo, s.data, s.listedTo = 0, nil, nil, 0
	return true
}

// listScrub asks all members for the next part of where they have data; of a
// snapshot also for what was written between it and what came after it: the rest
// lies in the same blocks as that, and has been compared. Each has its own stamps,
// and so its own blocks.
func (c *Core) listScrub(size int64) {
	s := &c.scrub
	if s.view == nil {
		from := s.listedTo - s.listedTo%(8*c.cfg.Grain) // lists begin with a byte; it may have grown
		c.submit(c.listOp(0, 0, from, min(scrubList*c.cfg.Grain, size-from), func(o *op) { c.scrubListed(nil, o) }))
		return
	}
	n := min(maxList*c.cfg.Grain, size-s.listedTo)
	c.submit(c.listOp(s.after.GetId(), s.view.GetGeneration(), s.listedTo, n, func(changed *op) {
		c.submit(c.listOp(s.view.GetId(), 0, changed.off, n, func(o *op) { c.scrubListed(changed, o) }))
	}))
}

// listOp asks all members what has changed since a generation, 0: where there is
// data.
func (c *Core) listOp(snapshot uint32, since uint64, off, n int64, then func(*op)) *op {
	o := &op{
		verb: VerbChanged, who: members, snapshot: snapshot, generation: since,
		off: off, len: n, each: map[uint32][]byte{}, then: then,
	}
	for _, p := range c.peers {
		o.each[p.id] = make([]byte, wire.BitBytes(n, c.cfg.Grain))
	}
	return o
}

// scrubListed goes on when it is known what has changed, nil: all, and where there
// is data.
func (c *Core) scrubListed(changed, data *op) {
	s := &c.scrub
	s.busy = false
	if s.number == 0 {
		return
	}
	if changed != nil {
		s.todo = append(s.todo, changed.anyBits()...)
	}
	s.data, s.listedTo = append(s.data[:data.off/c.cfg.Grain/8], data.anyBits()...), data.off+data.len
}

// anyBits are the bits that any member has set; all of them if one could not tell.
func (o *op) anyBits() []byte {
	var list []byte
	for _, bits := range o.each {
		if list == nil {
			list = make([]byte, len(bits))
		}
		for i := range bits {
			list[i] |= bits[i]
			if o.missing { // what came after is gone, and so is what it shared
				list[i] = 0xff
			}
		}
	}
	return list
}

// sumsOp asks all members for the checksums of a range. They record those of
// regions that are flushed: what a power cut may take back must not be called
// damaged afterwards.
func (c *Core) sumsOp(off, n int64, then func(*op)) *op {
	o := &op{
		verb: VerbSums, who: members, lock: shared, off: off, len: n, each: map[uint32][]byte{}, then: then,
		generation: max(c.clock.equalBefore, 1),
	}
	if c.breaks(BreakSumUnflushed) {
		o.generation = c.clock.generation + 1
	}
	if v := c.scrub.view; v != nil {
		o.snapshot, o.lock = v.GetId(), unlocked
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
		// One that left the set meanwhile has not answered, and does not matter;
		// nor does one whose snapshot is gone.
		if list, err := wire.ParseSums(o.each[p.id]); err == nil && p.role == member && p.healthy() {
			answers[p.id] = list
		}
	}
	for i := int64(0); i*c.cfg.Grain < o.len; i++ {
		sums := map[uint32]wire.Sum{}
		for id, list := range answers {
			sums[id] = list[i]
		}
		s.compared++
		off := o.off + i*c.cfg.Grain
		switch good, bad, v := verdict(sums); v {
		case repairable:
			c.mend(off, min(c.cfg.Grain, o.off+o.len-off), good, bad)
		case unclear:
			c.noteUnclear(off, s.view)
		}
	}
}

func (c *Core) noteUnclear(off int64, view *argonv1.Snapshot) {
	c.scrub.unclear++
	if view == nil {
		c.tell(argonv1.Severity_SEVERITY_ERROR, "scrub-unclear", "the region at %d is damaged, and nothing tells which copy is good: restore it from a snapshot or a backup", off)
		return
	}
	c.tell(argonv1.Severity_SEVERITY_ERROR, "scrub-unclear", "the region at %d of snapshot %s is damaged, and nothing tells which copy is good: delete the snapshot, or do not rely on it", off, view.GetName())
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
// region is locked from the reading to the writing, unless it is a snapshot's; if
// it was written before the lock, the good copy is as good.
func (c *Core) mend(off, n int64, good, bad []uint32) {
	view := c.scrub.view
	o := &op{verb: VerbReadVerified, lock: exclusive, off: off, len: n, data: make([]byte, n), optional: true}
	if view != nil {
		o.snapshot, o.lock = view.GetId(), unlocked
	}
	for _, p := range c.peers {
		if !slices.Contains(good, p.id) {
			o.damaged |= p.bit // is not read
		}
	}
	o.read = func(o *op) { c.mendRead(o, bad, view) }
	c.scrub.mending++
	o.then = func(o *op) {
		c.scrub.mending--
		switch {
		case o.err == nil && !o.missing:
			c.scrub.repaired++
		case o.verb == VerbMend && !o.missing:
			c.noteUnclear(off, view)
		}
	}
	c.submit(o)
}

func (c *Core) mendRead(o *op, bad []uint32, view *argonv1.Snapshot) {
	if o.err != nil {
		c.finish(o)
		return
	}
	where := fmt.Sprint(o.off)
	o.verb, o.who, o.generation, o.pending = VerbWrite, members, c.clock.generation, 0
	if view == nil {
		c.clock.used = true
	} else {
		o.verb, where = VerbMend, fmt.Sprintf("%d of snapshot %s", o.off, view.GetName())
	}
	for _, p := range c.peers {
		if slices.Contains(bad, p.id) && (p.role == member || p.role == leaving) {
			o.pending |= p.bit
			c.tell(argonv1.Severity_SEVERITY_WARNING, "replica-mended", "replica %d was damaged at %s; it is given a good copy", p.id, where)
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
	c.tell(severity, "scrub-finished", "%d regions were compared, %d mended, %d are damaged and unclear", s.GetRegions(), s.GetRepaired(), s.GetUnclear())
}

// outcome is what there is to record of a scrub; nil: nothing yet.
func (s *scrubbing) outcome() *argonv1.Scrub {
	if !s.flushed {
		return nil
	}
	return &argonv1.Scrub{Finished: s.number, Regions: s.compared, Repaired: s.repaired, Unclear: s.unclear}
}
