package mirror

import (
	"fmt"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file copies to replicas that are behind (I5). The order is:
//
//	BeginSync   the replica is emptied and marked as not to be trusted
//	syncing     it receives every new write, and chunk after chunk is copied
//	            under the chunk's lock, so that copy and writes cannot pass
//	            each other
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
		p.role, p.incarnation = syncing, info.Incarnation
		p.cursor, p.done, p.chunks, p.since = 0, 0, 0, c.now
		p.caughtUp, p.ending, p.lost, p.failed = false, false, false, false
		if c.breaks(BreakEnterEarly) {
			p.cursor = c.cfg.Size
		}
		c.note(argonv1.Severity_SEVERITY_INFO, "resync-started", fmt.Sprint(p.id, c.now), "replica %d is being copied to", p.id)
	case o.kind == endSync && p.role == joining && p.ending:
		p.caughtUp, p.ending = true, false
		p.info.Health = Good
	}
}

// pump keeps the allowed number of chunks under way.
func (c *Core) pump(p *peer) {
	for p.role == syncing && p.chunks < c.cfg.Chunks && p.cursor < c.cfg.Size {
		n := min(c.cfg.Chunk, c.cfg.Size-p.cursor)
		o := &op{kind: copyRead, off: p.cursor, len: n, target: p, data: make([]byte, n)}
		p.cursor += n
		p.chunks++
		c.submit(o)
	}
	if p.role == syncing && p.chunks == 0 && p.cursor >= c.cfg.Size {
		p.role, p.mark = joining, c.nextID
		c.tryJoin(p)
	}
}

// copied goes on after a chunk was read: what is not zero is written. The
// replica was emptied, so zeros are there already — or a write under this
// copy put them there.
func (c *Core) copied(o *op) {
	p := o.target
	switch {
	case p.role != syncing || o.err != nil:
		c.settleCopy(o)
		if o.err != nil && p.role == syncing {
			c.abortSync(p)
		}
	case allZero(o.data):
		c.settleCopy(o)
	default:
		o.kind, o.pending = copyWrite, p.bit
		c.send(o, p)
	}
}

// settleCopy ends a chunk's operation.
func (c *Core) settleCopy(o *op) {
	o.kind, o.pending = copyWrite, 0
	c.settle(o)
}

// chunkDone is called when a chunk's operation ended.
func (c *Core) chunkDone(o *op) {
	if p := o.target; p.role == syncing && o.run == p.syncRun {
		p.chunks--
		p.done += o.len
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
