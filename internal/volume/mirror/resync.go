package mirror

import (
	"fmt"
	"math/bits"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// This file copies to replicas that are behind (I5). The order is:
//
//	BeginSync   the replica is marked as not to be trusted; if it has no base it
//	            is emptied
//	syncing     it receives every new write; source and replica are asked what
//	            was written since the base, or, if the replica was emptied, the
//	            source what there is; that is copied, chunk after chunk, each
//	            under its lock, so that copy and writes cannot pass each other
//	joining     nothing is acknowledged without it; what came before is answered
//	EndSync     it is flushed and marked good
//	proposal    the catalog takes it into the set

// tryResync begins copies that are due and moves those under way.
func (c *Core) tryResync() {
	for _, p := range c.peers {
		if p.role == outside && p.behind && p.session != 0 && !p.hanging && p.owes == 0 && c.now >= p.nextSync && !c.inSet(p.id) {
			p.role = starting
			p.syncRun++
			c.submit(&op{kind: beginSync, target: p})
		}
	}
	for _, p := range c.peers {
		switch p.role {
		case syncing:
			c.pump(p)
		case joining:
			c.tryJoin(p)
		}
	}
}

// syncStep goes on after a replica answered a step of its copy.
func (c *Core) syncStep(o *op, p *peer, info Info) {
	switch {
	case o.target != p:
	case o.kind == beginSync && p.role == starting:
		c.beginCopy(p, info)
	case o.kind == endSync && p.role == joining && p.ending:
		p.caughtUp, p.ending = true, false
		p.info.Health = Good
	}
}

func (c *Core) beginCopy(p *peer, info Info) {
	p.role, p.incarnation = syncing, info.Incarnation
	p.cursor, p.done, p.total, p.chunks, p.since = 0, 0, 0, 0, c.now
	p.caughtUp, p.ending, p.lost, p.failed = false, false, false, false
	// What began before it receives every write is not in its data, and not
	// in what the source says has changed until it is done.
	p.mark = c.nextID
	p.emptied, p.changed, p.listing, p.listedTo = info.Emptied, nil, false, 0
	what := "what was written since it left"
	if p.emptied {
		p.base = 0
		what = "the whole volume"
	}
	if c.breaks(BreakEnterEarly) {
		p.listedTo, p.cursor = c.cfg.Size, c.cfg.Size
	}
	c.note(argonv1.Severity_SEVERITY_INFO, "resync-started", fmt.Sprint(p.id, c.now), "replica %d is being copied to: %s", p.id, what)
}

// maxList is how many grains are asked for at once.
const maxList = 1 << 18

// list asks for the next part of what has changed.
func (c *Core) list(p *peer) {
	if p.listing || c.changesUpTo(p.mark) {
		return
	}
	n := min(maxList*c.cfg.Grain, c.cfg.Size-p.listedTo)
	p.listing = true
	c.submit(&op{kind: listSource, target: p, listOff: p.listedTo, listLen: n, data: make([]byte, wire.BitBytes(n, c.cfg.Grain))})
}

// sourceListed goes on after a member said what has changed: now the replica
// itself is asked, unless it is empty. It may have what no member has, of
// requests that were never answered.
func (c *Core) sourceListed(o *op) {
	p := o.target
	if c.dropped(o) {
		return
	}
	p.changed = append(p.changed, o.data...)
	o.kind, o.data = listTarget, make([]byte, len(o.data))
	if p.emptied {
		c.settle(o)
		return
	}
	o.pending = p.bit
	c.send(o, p)
}

// listed goes on after the replica said what has changed.
func (c *Core) listed(o *op) {
	p := o.target
	if !o.current() {
		return
	}
	from := int(o.listOff / c.cfg.Grain / 8)
	for i, b := range o.data {
		if !c.breaks(BreakSourceOnly) {
			p.changed[from+i] |= b
		}
		p.total += int64(bits.OnesCount8(p.changed[from+i])) * c.cfg.Grain
	}
	p.listing, p.listedTo = false, o.listOff+o.listLen
}

// nextChunk is the next range to copy; false if there is none.
func (c *Core) nextChunk(p *peer) (off, n int64, ok bool) {
	for p.cursor < c.cfg.Size {
		end := min((p.cursor/c.cfg.Grain+1)*c.cfg.Grain, c.cfg.Size)
		if g := p.cursor / c.cfg.Grain; p.changed[g/8]&(1<<(g%8)) == 0 {
			p.cursor = end
			continue
		}
		off, n = p.cursor, min(c.cfg.Chunk, end-p.cursor)
		p.cursor += n
		return off, n, true
	}
	return 0, 0, false
}

// pump keeps the allowed number of chunks under way.
func (c *Core) pump(p *peer) {
	if p.listedTo < c.cfg.Size {
		c.list(p)
		return
	}
	for p.role == syncing && p.chunks < c.cfg.Chunks {
		off, n, ok := c.nextChunk(p)
		if !ok {
			break
		}
		p.chunks++
		c.submit(&op{kind: copyRead, off: off, len: n, target: p, data: make([]byte, n)})
	}
	if p.role == syncing && p.chunks == 0 && p.cursor >= c.cfg.Size {
		p.role, p.mark = joining, c.nextID
		c.tryJoin(p)
	}
}

// copied goes on after a chunk was read: it is written. Zeros need no data,
// and nothing at all where the replica was emptied.
func (c *Core) copied(o *op) {
	p := o.target
	if c.dropped(o) {
		return
	}
	switch {
	case !allZero(o.data):
		o.kind = copyWrite
	case p.emptied:
		c.settleCopy(o)
		return
	default:
		o.kind = copyZero
	}
	o.pending = p.bit
	c.send(o, p)
}

// current tells whether the operation is of the copy that is under way.
func (o *op) current() bool { return o.target.role == syncing && o.run == o.target.syncRun }

// dropped ends an operation that read for a copy, if the copy is over, or if
// the read failed, which ends the copy.
func (c *Core) dropped(o *op) bool {
	current := o.current()
	if current && o.err == nil {
		return false
	}
	c.settleCopy(o)
	if current {
		c.abortSync(o.target)
	}
	return true
}

// settleCopy ends a chunk's operation.
func (c *Core) settleCopy(o *op) {
	o.kind, o.pending = copyWrite, 0
	c.settle(o)
}

// chunkDone is called when a chunk's operation ended.
func (c *Core) chunkDone(o *op) {
	if o.current() {
		o.target.chunks--
		o.target.done += o.len
	}
}

// tryJoin ends a copy once everything sent before it was complete is answered:
// the flush that follows must cover it.
func (c *Core) tryJoin(p *peer) {
	if p.ending || p.caughtUp {
		return
	}
	for _, o := range c.inflight {
		if o.id <= p.mark && (o.pending|o.held)&p.bit != 0 {
			return
		}
	}
	p.ending = true
	c.submit(&op{kind: endSync, target: p})
}

// abortSync gives a copy up; tryResync begins anew after a pause.
func (c *Core) abortSync(p *peer) {
	p.role, p.caughtUp, p.ending, p.chunks = outside, false, false, 0
	p.nextSync = c.now + c.cfg.RetryAfter
	c.forget(p)
	var keep []*op
	for _, o := range c.blocked {
		if o.target != p {
			keep = append(keep, o)
		}
	}
	c.blocked = keep
	c.settleAll()
}

// stopSync gives a copy up because the attachment ends. One that waits only
// for the catalog may still enter the set.
func (c *Core) stopSync(p *peer) {
	if p.role == starting || p.role == syncing || p.role == joining && !p.caughtUp {
		c.abortSync(p)
	}
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
