package mirror

import (
	"errors"
	"fmt"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
)

type opKind uint8

const (
	clientRead opKind = iota + 1
	clientChange
	clientFlush
	finalFlush
	barrier   // a flush of those that stay in the set
	rollFlush // ends a generation
	beginSync
	listSource // a member says what has changed ...
	listTarget // ... and so does the replica that is copied to
	copyRead   // a chunk is read from a member ...
	copyWrite  // ... and written to the replica that is copied to,
	copyZero   // or made zeros there
	endSync
)

// op is one operation in flight. While it is, its range is locked: shared for
// reading, exclusive for all else. That is how overlapping writes reach all
// replicas in one order (I6), how a copy and a write of the same place cannot
// pass each other, and why a read never returns what a crash could take back.
type op struct {
	id       uint64
	kind     opKind
	off, len int64
	req      *volume.Request // a client's; nil otherwise
	answered bool
	data     []byte // a copy's, or the bits of a list
	// generation is what a change is stamped with.
	generation uint64
	// A list's range. It locks nothing.
	listOff, listLen int64

	// Bits are those of peers.
	pending uint32 // must still do it
	held    uint32 // were sent it in their present session: they may touch its buffer
	full    uint32 // have no room for it; asked again at retryAt
	retryAt time.Duration
	reader  *peer // who reads; nil: nobody can now
	target  *peer // who is copied to ...
	run     int   // ... in which of its copies
	err     error
}

func (o *op) reads() bool { return o.kind == clientRead }

// asksOne tells whether one member is asked, any one.
func (o *op) asksOne() bool {
	return o.kind == clientRead || o.kind == copyRead || o.kind == listSource
}

// copies tells whether the operation is a part of a copy that can be dropped
// with it.
func (o *op) copies() bool {
	return o.kind == copyRead || o.kind == listSource
}

func conflict(a, b *op) bool {
	return a.off < b.off+b.len && b.off < a.off+a.len && !(a.reads() && b.reads())
}

// Submit takes a request.
func (c *Core) Submit(now time.Duration, r *volume.Request) []Effect {
	if c.phase == ended {
		c.effects = append(c.effects[:0], Effect{Complete: r, Err: fmt.Errorf("%w: %w", volume.ErrClosed, errOr(c.err, ErrDeposed))})
		return c.effects
	}
	return c.event(now, func() {
		if c.phase == closing {
			c.emit(Effect{Complete: r, Err: volume.ErrClosed})
			return
		}
		if r.Off < 0 || r.Len < 0 || r.Off%volume.SectorSize != 0 || r.Len%volume.SectorSize != 0 || r.Off > c.cfg.Size-r.Len {
			c.emit(Effect{Complete: r, Err: fmt.Errorf("%s of %d bytes at %d, the volume has %d: %w", r.Op, r.Len, r.Off, c.cfg.Size, volume.ErrRange)})
			return
		}
		o := &op{kind: clientChange, off: r.Off, len: r.Len, req: r}
		switch r.Op {
		case volume.OpRead:
			o.kind = clientRead
		case volume.OpFlush:
			o.kind = clientFlush
		}
		c.submit(o)
	})
}

// submit starts an operation, or lines it up behind those it must not pass.
func (c *Core) submit(o *op) {
	if c.phase < serving || c.mustWait(o, c.blocked) {
		c.blocked = append(c.blocked, o)
		return
	}
	c.start(o)
}

func (c *Core) mustWait(o *op, earlier []*op) bool {
	if c.breaks(BreakNoOrder) {
		return false
	}
	overlaps := func(other *op) bool { return conflict(o, other) }
	return slices.ContainsFunc(c.inflight, overlaps) || slices.ContainsFunc(earlier, overlaps)
}

// startBlocked starts what may start now. An operation still never passes an
// earlier one that overlaps it.
func (c *Core) startBlocked() {
	if c.phase < serving || len(c.blocked) == 0 {
		return
	}
	waiting := c.blocked
	c.blocked = nil
	var still []*op
	for _, o := range waiting {
		if c.mustWait(o, still) {
			still = append(still, o)
		} else {
			c.start(o)
		}
	}
	// A start may have finished at once and lined others up again.
	c.blocked = append(still, c.blocked...)
}

func (c *Core) start(o *op) {
	c.nextID++
	o.id = c.nextID
	o.generation = c.clock.generation
	if o.target != nil {
		o.run = o.target.syncRun
	}
	c.ops[o.id] = o
	c.inflight = append(c.inflight, o)
	switch o.kind {
	case clientRead, copyRead, listSource:
		c.assignReader(o)
		return
	case clientFlush, finalFlush, rollFlush:
		o.pending = c.requiredMask()
	case barrier:
		o.pending = c.wantedMask()
	case clientChange:
		o.pending = c.requiredMask() | c.syncingMask()
		c.clock.used = true
	case beginSync, endSync, copyWrite, listTarget:
		o.pending = o.target.bit
	}
	for _, p := range c.peers {
		if o.pending&p.bit != 0 {
			c.send(o, p)
		}
	}
	c.settle(o)
}

// send asks a peer to do its part, if it is there; PeerUp asks again.
func (c *Core) send(o *op, p *peer) {
	if p.session == 0 || p.lost || p.role == leaving {
		return
	}
	e := Effect{Send: true, Peer: p.id, Session: p.session, ID: o.id, Off: o.off, Len: o.len, Generation: o.generation}
	switch o.kind {
	case clientRead:
		e.Verb, e.Data = VerbRead, o.req.Data
	case copyRead:
		e.Verb, e.Data = VerbRead, o.data
	case copyWrite:
		e.Verb, e.Data = VerbWrite, o.data
	case copyZero:
		e.Verb = VerbZero
	case listSource, listTarget:
		e.Verb, e.Data, e.Off, e.Len, e.Generation = VerbChanged, o.data, o.listOff, o.listLen, o.target.base
	case clientChange:
		e.Verb, e.Data, e.FUA = verbOf(o.req.Op), o.req.Data, o.req.FUA
	case clientFlush, finalFlush, barrier, rollFlush:
		e.Verb = VerbFlush
	case beginSync:
		e.Verb, e.Base = VerbBeginSync, o.target.base
	case endSync:
		e.Verb = VerbEndSync
	}
	o.held |= p.bit
	if p.owes == 0 {
		p.heard = c.now
	}
	p.owes++
	c.emit(e)
}

func verbOf(op volume.Op) Verb {
	switch op {
	case volume.OpZero:
		return VerbZero
	case volume.OpTrim:
		return VerbTrim
	default:
		return VerbWrite
	}
}

// assignReader asks a member for the data: the near one, else any.
func (c *Core) assignReader(o *op) {
	o.reader = nil
	for _, p := range c.peers {
		if !p.healthy() || p.role != member {
			continue
		}
		if o.reader == nil || p.id == c.cfg.Near {
			o.reader = p
		}
	}
	if o.reader != nil {
		c.send(o, o.reader)
	}
}

// Outcome is a replica's answer to one message.
type Outcome uint8

// What a replica may answer. A broken connection is no answer: see PeerDown.
const (
	Done Outcome = iota + 1
	// Full: there is no room; nothing else is wrong.
	Full
	// Broken: its disk failed (I8).
	Broken
)

// Reply is a peer's answer to message id of its session. info goes with the
// answer to VerbBeginSync.
func (c *Core) Reply(now time.Duration, peerID uint32, session, id uint64, out Outcome, info Info, err error) []Effect {
	return c.event(now, func() {
		p := c.peer(peerID)
		o := c.ops[id]
		if p == nil || p.session != session || session == 0 {
			return
		}
		p.owes--
		p.heard = c.now
		if o == nil || o.held&p.bit == 0 {
			return
		}
		o.held &^= p.bit
		if o.asksOne() {
			c.readReply(o, p, out, err)
			return
		}
		c.changeReply(o, p, out, info, err)
	})
}

func (c *Core) readReply(o *op, p *peer, out Outcome, err error) {
	if out != Done {
		if c.otherHealthy(p) {
			c.loseDisk(p, "a read", err)
			c.assignReader(o)
			return
		}
		o.err = fmt.Errorf("read %d bytes at %d: the only replica in sync cannot: %w", o.len, o.off, err)
	}
	switch o.kind {
	case copyRead:
		c.copied(o)
	case listSource:
		c.sourceListed(o)
	default:
		c.settle(o)
	}
}

func (c *Core) changeReply(o *op, p *peer, out Outcome, info Info, err error) {
	switch {
	case out == Done:
		o.pending &^= p.bit
		if c.breaks(BreakAckBeforeAll) && o.kind == clientChange || c.breaks(BreakFlushBeforeAll) && o.kind == clientFlush {
			c.answer(o)
		}
		c.syncStep(o, p, info)
	case o.pending&p.bit == 0:
		// It does not matter any more.
	case out == Full && p.role != syncing:
		o.full |= p.bit
		o.retryAt = c.now + c.cfg.RetryAfter
		c.note(argonv1.Severity_SEVERITY_ERROR, "volume-full", "", "replica %d has no room: the volume waits; free space on its server", p.id)
	case p.role == syncing || p.role == joining && !p.caughtUp || o.kind == beginSync:
		c.note(argonv1.Severity_SEVERITY_WARNING, "resync-failed", fmt.Sprint(p.id, c.now), "copying to replica %d: %v; it is tried again", p.id, err)
		c.abortSync(p)
	case errors.Is(err, ErrDeposed):
		// The shell finds out and calls Deposed.
	default:
		c.loseDisk(p, "its disk", err)
		if c.breaks(BreakIgnoreFailure) {
			o.pending &^= p.bit
		}
	}
	c.settle(o)
}

// settle answers an operation's client and ends the operation when it may.
func (c *Core) settle(o *op) {
	switch o.kind {
	case clientRead, copyRead, listSource:
	case barrier:
		if o.pending&c.wantedMask() != 0 {
			return
		}
	case clientChange, clientFlush:
		// While one leaves, nothing is acknowledged: see tryPropose.
		if c.anyLeaving() && !c.breaks(BreakAckBeforeShrink) {
			return
		}
		fallthrough
	default:
		if o.pending&(c.requiredMask()|c.syncingMask()|o.ownTarget()) != 0 {
			return
		}
	}
	if o.held != 0 || c.ops[o.id] == nil {
		return
	}
	c.answer(o)
	delete(c.ops, o.id)
	c.inflight = slices.DeleteFunc(c.inflight, func(x *op) bool { return x == o })
	if o.full != 0 && !c.anyFull() {
		delete(c.noted, "volume-full")
	}
	switch o.kind {
	case finalFlush:
		c.quiet = true
	case barrier:
		c.flushed = c.flushed || o == c.barrier
	case rollFlush:
		c.rollFlushed(o)
	case listTarget:
		c.listed(o)
	case copyRead, copyWrite, copyZero:
		c.chunkDone(o)
	}
	c.startBlocked()
}

func (o *op) ownTarget() uint32 {
	if o.target != nil {
		return o.target.bit
	}
	return 0
}

func (c *Core) answer(o *op) {
	if o.req == nil || o.answered {
		return
	}
	o.answered = true
	c.emit(Effect{Complete: o.req, Err: o.err})
}

// settleAll looks at everything in flight after the set changed.
func (c *Core) settleAll() {
	for _, o := range slices.Clone(c.inflight) {
		switch {
		case c.ops[o.id] == nil:
		case o.copies() && !o.current():
			c.settleCopy(o)
		case o.asksOne():
			if o.reader == nil && o.held == 0 {
				c.assignReader(o)
			}
		default:
			c.settle(o)
		}
	}
}

// retry asks those again that had no room.
func (c *Core) retry(o *op) {
	if o.full == 0 || c.now < o.retryAt {
		return
	}
	o.retryAt = c.now + c.cfg.RetryAfter
	for _, p := range c.peers {
		if o.full&p.bit != 0 && o.held&p.bit == 0 && p.session != 0 {
			o.full &^= p.bit
			c.send(o, p)
		}
	}
}

func (c *Core) anyFull() bool {
	return slices.ContainsFunc(c.inflight, func(o *op) bool { return o.full != 0 })
}
