package mirror

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// This file copies to replicas that are behind (I5). The order is:
//
//	BeginSync   the replica is marked as not to be trusted; if it has no base it
//	            is emptied
//	catching    for each snapshot that it does not have, oldest first: it is
//	            given what changed up to then, read from the snapshot, is
//	            flushed, and makes that the snapshot's content. It receives no
//	            new writes
//	syncing     it receives every new write; source and replica are asked what
//	            was written since; that is copied, region after region, each
//	            under its lock, so that copy and writes cannot pass each other
//	joining     nothing is acknowledged without it; what came before is answered
//	EndSync     it is flushed and marked good
//	proposal    the catalog takes it into the set
//
// A snapshot that is taken meanwhile turns a syncing replica back into one that
// catches up: what it lacks is then read from that snapshot.

// copying is one copy to a replica.
type copying struct {
	// have are the snapshots that the replica has, whole.
	have map[uint32]bool
	// view is the snapshot that is copied; nil: the volume as it is.
	view *argonv1.Snapshot
	// What was written in base or later can differ, what lies before resumeTo
	// only if it was written in resumeBase or later. A base of 0: everything.
	base, resumeBase uint64
	resumeTo         int64
	emptied          bool // the replica holds nothing but what this copy gave it

	todo     []byte // a bit for each grain that is still to be copied
	going    []byte // and for each of those that is under way
	listing  bool
	listedTo int64 // the first byte that todo says nothing of
	mark     uint64

	cursor  int64 // no grain before it is to be begun
	chunks  int   // under way
	pauseTo time.Duration
	done    int64
	total   int64
	started time.Duration

	// ending: what follows the last chunk is under way.
	ending bool
}

// startBase is what BeginSync says: the replica is emptied only if it does not
// even have what an earlier copy gave it.
func (cp *copying) startBase() uint64 { return cmp.Or(cp.resumeBase, cp.base) }

// copied tells whether the replica is being copied to.
func (p *peer) copied() bool { return p.role == starting || p.role == catching || p.role == syncing }

// tryCopy begins copies that are due and moves those under way.
func (c *Core) tryCopy() {
	for _, p := range c.peers {
		if c.mayCopy(p) {
			c.beginCopy(p)
		}
	}
	for _, p := range c.peers {
		switch p.role {
		case catching, syncing:
			c.pump(p)
		case joining:
			c.tryJoin(p)
		}
	}
}

// mayCopy tells whether a copy to a replica should begin. What an earlier one came
// to must be recorded before: if this one empties the replica, whoever comes next
// knows that by the base, and must not come with a later one.
func (c *Core) mayCopy(p *peer) bool {
	return p.role == outside && p.behind && p.session != 0 && !p.hanging && p.owes == 0 && c.now >= p.nextCopy &&
		!c.inSet(p.id) && !c.grow.under && !slices.ContainsFunc(c.facts, func(f fact) bool { return f.about(p.id) })
}

func (c *Core) beginCopy(p *peer) {
	r := c.replicaRecord(p.id)
	cp := &copying{
		have: map[uint32]bool{}, started: c.now,
		base: r.GetEqualBefore(), resumeTo: int64(r.GetCopiedTo()), resumeBase: r.GetCopiedBase(),
	}
	for _, s := range c.readySnapshots() {
		if !slices.Contains(s.GetReplicaIds(), p.id) {
			break // later ones have to be made again, after this one
		}
		cp.have[s.GetId()] = true
	}
	p.role, p.copy = starting, cp
	p.run++
	o := &op{verb: VerbBeginSync, who: targetOnly, target: p, len: c.cfg.Size, then: c.copyBegun}
	if s := c.nextView(p); s != nil {
		o.generation = s.GetGeneration() - 1
	}
	c.submit(o)
}

func (c *Core) copyBegun(o *op) {
	p := o.target
	if !o.current() || p.role != starting {
		return
	}
	cp := p.copy
	p.incarnation, cp.emptied = o.info.Incarnation, o.info.Emptied
	p.caughtUp, p.lost, p.failed = false, false, false
	what := "what was written since it left"
	if cp.emptied {
		cp.base, cp.resumeBase, cp.resumeTo = 0, 0, 0
		clear(cp.have)
		what = "the whole volume"
		c.record(fact{emptied: p.id})
	}
	c.note(argonv1.Severity_SEVERITY_INFO, "resync-started", fmt.Sprint(p.id), "replica %d is being copied to: %s", p.id, what)
	c.nextPhase(p)
}

// nextView is the snapshot that the replica has to be given next; nil if it has
// all.
func (c *Core) nextView(p *peer) *argonv1.Snapshot {
	for _, s := range c.readySnapshots() {
		if !p.copy.have[s.GetId()] {
			return s
		}
	}
	return nil
}

// nextPhase begins to copy the next snapshot, or the volume as it is.
func (c *Core) nextPhase(p *peer) {
	cp := p.copy
	cp.todo, cp.going, cp.listing, cp.listedTo, cp.ending = nil, nil, false, 0, false
	cp.cursor, cp.chunks, cp.done, cp.total = 0, 0, 0, 0
	if cp.view = c.nextView(p); cp.view != nil {
		p.role = catching
		if cp.base != 0 && cp.view.GetGeneration() <= cp.base {
			cp.base = 0 // it should have had it
		}
		return
	}
	p.role = syncing
	// What began before it receives every write is not in its data, and not
	// in what the source says has changed until it is done.
	cp.mark = c.nextID
	if c.breaks(BreakEnterEarly) {
		cp.todo, cp.listedTo = make([]byte, wire.BitBytes(c.cfg.Size, c.cfg.Grain)), c.cfg.Size
		cp.going = slices.Clone(cp.todo)
	}
}

// copySize is how much there is of what is copied.
func (c *Core) copySize(p *peer) int64 {
	if v := p.copy.view; v != nil {
		return int64(v.GetSizeBytes())
	}
	return c.cfg.Size
}

// snapshotTaken turns those that receive every write into ones that catch up
// with the snapshot: at this instant they differ from it where there is still
// something to be copied.
func (c *Core) snapshotTaken(s *argonv1.Snapshot) {
	for _, p := range c.peers {
		if p.role != syncing {
			continue
		}
		cp := p.copy
		p.role, cp.view = catching, s
		p.run++ // what waits for its lock would read what is written from now on
		c.dropBlocked(p)
		cp.cursor, cp.chunks, cp.listing = 0, 0, false
		if cp.listedTo < c.cfg.Size {
			cp.todo, cp.listedTo, cp.done, cp.total = nil, 0, 0, 0
		}
		cp.going = make([]byte, len(cp.todo))
	}
}

// maxList is how many grains are asked for at once.
const maxList = 1 << 18

// list asks for the next part of what has changed.
func (c *Core) list(p *peer) {
	cp := p.copy
	if cp.listing || cp.view == nil && c.changesUpTo(cp.mark) {
		return
	}
	since, end := cp.base, c.copySize(p)
	if cp.listedTo < cp.resumeTo {
		since, end = cp.resumeBase, min(end, cp.resumeTo)
	}
	n := min(maxList*c.cfg.Grain, end-cp.listedTo)
	cp.listing = true
	c.submit(&op{
		verb: VerbChanged, target: p, snapshot: cp.view.GetId(), generation: since, off: cp.listedTo, len: n,
		data: make([]byte, wire.BitBytes(n, c.cfg.Grain)), read: c.sourceListed,
	})
}

// sourceListed goes on after a member said what has changed: now the replica
// itself is asked, unless it is empty. It may have what no member has, of
// requests that were never answered.
func (c *Core) sourceListed(o *op) {
	p := o.target
	if c.dropped(o) {
		return
	}
	source := o.data
	o.then = func(o *op) { c.listed(o, source) }
	if p.copy.emptied {
		o.data = nil
		c.finish(o)
		return
	}
	o.who, o.pending, o.snapshot, o.data = targetOnly, p.bit, 0, make([]byte, len(source))
	c.send(o, p)
}

// listed goes on after the replica said what has changed.
func (c *Core) listed(o *op, source []byte) {
	if !o.current() {
		return
	}
	cp := o.target.copy
	for i := range source {
		if o.data != nil && !c.breaks(BreakSourceOnly) {
			source[i] |= o.data[i]
		}
		cp.total += int64(bits.OnesCount8(source[i])) * c.cfg.Grain
	}
	cp.todo = append(cp.todo, source...)
	cp.going = append(cp.going, make([]byte, len(source))...)
	cp.listing, cp.listedTo = false, o.off+o.len
}

// pump keeps the allowed number of chunks under way.
func (c *Core) pump(p *peer) {
	cp := p.copy
	if cp.ending {
		return
	}
	size := c.copySize(p)
	if cp.listedTo < size {
		c.list(p)
		return
	}
	for run := p.run; run == p.run && cp.chunks < c.chunks(cp); {
		off, ok := c.nextChunk(cp, size)
		if !ok {
			break
		}
		c.copyChunk(p, off, min(c.cfg.Grain, size-off))
	}
	if p.role == syncing && c.take.begun() {
		return // one that joins now might miss the snapshot
	}
	if p.copied() && cp.chunks == 0 && !anySet(cp.todo) {
		cp.ending = true
		c.copyDone(p)
	}
}

// busy is how long after a request the volume counts as in use.
const busy = 200 * time.Millisecond

// chunks is how many may be under way: few while the volume is in use, and then
// none for as long as the last one took.
func (c *Core) chunks(cp *copying) int {
	switch {
	case c.lastRequest == 0 || c.now-c.lastRequest > busy:
		return c.cfg.Chunks
	case c.now < cp.pauseTo:
		return 0
	}
	return 1
}

// nextChunk is the next grain to copy; false if there is none to begin.
func (c *Core) nextChunk(cp *copying, size int64) (off int64, ok bool) {
	for ; cp.cursor < size; cp.cursor += c.cfg.Grain {
		if g := cp.cursor / c.cfg.Grain; has(cp.todo, g) && !has(cp.going, g) {
			return cp.cursor, true
		}
	}
	return 0, false
}

func (c *Core) copyChunk(p *peer, off, n int64) {
	cp := p.copy
	cp.chunks++
	set(cp.going, off/c.cfg.Grain)
	o := &op{verb: VerbReadVerified, target: p, off: off, len: n, data: make([]byte, n), lock: exclusive, read: c.chunkRead}
	if n < c.cfg.Grain {
		o.verb = VerbRead // the end: a replica that grew already has more of the region
	}
	if cp.view != nil {
		// It cannot change, and the replica gets no writes: nothing to lock. It
		// is stamped as the newest of what the snapshot holds.
		o.verb, o.snapshot, o.lock, o.generation = VerbReadVerified, cp.view.GetId(), unlocked, cp.view.GetGeneration()-1
	}
	begun := c.now
	o.then = func(o *op) { c.chunkDone(o, begun) }
	c.submit(o)
}

// chunkRead goes on after a chunk was read: it is written. Zeros need no data,
// and nothing at all where the replica was emptied.
func (c *Core) chunkRead(o *op) {
	p := o.target
	if c.dropped(o) {
		return
	}
	o.snapshot = 0
	switch {
	case !allZero(o.data):
		o.verb = VerbWrite
	case p.copy.emptied && p.copy.base == 0:
		c.finish(o)
		return
	default:
		o.verb, o.data = VerbZero, nil
	}
	o.who, o.pending = targetOnly, p.bit
	c.send(o, p)
}

// dropped ends an operation that read for a copy, if the copy is over, or if
// the read failed, which ends the copy.
func (c *Core) dropped(o *op) bool {
	if o.current() && o.err == nil {
		return false
	}
	if o.current() {
		c.failCopy(o.target, o.err)
	}
	if c.ops[o.id] != nil {
		c.finish(o)
	}
	return true
}

// chunkDone is called when a chunk's operation ended.
func (c *Core) chunkDone(o *op, begun time.Duration) {
	if !o.current() {
		return
	}
	cp := o.target.copy
	cp.chunks--
	cp.done += o.len
	clearBit(cp.todo, o.off/c.cfg.Grain)
	clearBit(cp.going, o.off/c.cfg.Grain)
	cp.pauseTo = c.now + (c.now - begun)
}

// copyDone goes on when nothing is left to be copied.
func (c *Core) copyDone(p *peer) {
	if p.role == syncing {
		p.role, p.copy.mark, p.copy.ending = joining, c.nextID, false
		c.tryJoin(p)
		return
	}
	c.submit(&op{verb: VerbFlush, who: targetOnly, target: p, then: func(o *op) {
		if o.current() {
			s := p.copy.view
			c.submit(&op{verb: VerbSnapshot, who: targetOnly, target: p, snapshot: s.GetId(), generation: s.GetGeneration(), then: c.snapshotCopied})
		}
	}})
}

// snapshotCopied goes on when the replica has the snapshot, whole.
func (c *Core) snapshotCopied(o *op) {
	p := o.target
	if !o.current() {
		return
	}
	cp := p.copy
	c.record(fact{reached: p.id, snapshot: cp.view.GetId()})
	cp.have[cp.view.GetId()] = true
	cp.base, cp.resumeTo, cp.resumeBase = cp.view.GetGeneration(), 0, 0
	c.nextPhase(p)
}

// reachedBy is how far a copy has come for certain, once the replica was
// flushed: what lies before that equals the source, but for what was written in
// a generation, or later. False if that is not worth a note.
func (c *Core) reachedBy(p *peer, generation uint64) (f fact, ok bool) {
	cp := p.copy
	if p.role != catching && p.role != syncing || cp.listing || cp.listedTo < c.copySize(p) {
		return f, false
	}
	to := int64(0)
	for to < cp.listedTo && !has(cp.todo, to/c.cfg.Grain) {
		to += c.cfg.Grain
	}
	to -= to % (8 * c.cfg.Grain) // lists have a bit for each grain, and begin with a byte
	if cp.view != nil {
		generation = cp.view.GetGeneration()
	}
	return fact{copied: p.id, to: uint64(to), base: generation}, to > 0
}

// tryJoin ends a copy once everything sent before it was complete is answered:
// the flush that follows must cover it.
func (c *Core) tryJoin(p *peer) {
	if p.copy.ending || p.caughtUp {
		return
	}
	for _, o := range c.inflight {
		if o.id <= p.copy.mark && (o.pending|o.held)&p.bit != 0 {
			return
		}
	}
	p.copy.ending = true
	c.submit(&op{verb: VerbEndSync, who: targetOnly, target: p, then: func(o *op) {
		if o.current() && p.role == joining {
			p.caughtUp, p.info.Health = true, Good
		}
	}})
}

// failCopy gives a copy up that cannot go on. It is tried again every second for as
// long as that takes: the operator is told of the first time.
func (c *Core) failCopy(p *peer, err error) {
	c.note(argonv1.Severity_SEVERITY_WARNING, "resync-failed", fmt.Sprint(p.id), "copying to replica %d: %v; it is tried again", p.id, err)
	c.abortCopy(p)
}

// abortCopy gives a copy up; tryCopy begins anew after a pause.
func (c *Core) abortCopy(p *peer) {
	p.role, p.caughtUp, p.copy = outside, false, nil
	p.run++
	p.nextCopy = c.now + c.cfg.RetryAfter
	c.forget(p)
	c.dropBlocked(p)
	c.settleAll()
}

// stopCopy gives a copy up because the attachment ends. One that waits only
// for the catalog may still enter the set.
func (c *Core) stopCopy(p *peer) {
	if p.copied() || p.role == joining && !p.caughtUp {
		c.abortCopy(p)
	}
}

func has(bitmap []byte, i int64) bool { return bitmap[i/8]&(1<<(i%8)) != 0 }
func set(bitmap []byte, i int64)      { bitmap[i/8] |= 1 << (i % 8) }
func clearBit(bitmap []byte, i int64) { bitmap[i/8] &^= 1 << (i % 8) }
func anySet(bitmap []byte) bool {
	return slices.ContainsFunc(bitmap, func(b byte) bool { return b != 0 })
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
			return false
		}
		b = b[8:]
	}
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
