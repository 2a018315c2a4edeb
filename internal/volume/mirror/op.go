package mirror

import (
	"errors"
	"fmt"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
)

// lock is how an operation locks its range while it is in flight. That is how
// overlapping writes reach all replicas in one order (I6), how a copy and a
// write of the same place cannot pass each other, and why a read never returns
// what a crash could take back.
type lock uint8

const (
	// unlocked: what it is about does not change, or it does not matter.
	unlocked lock = iota
	// shared: others may read.
	shared
	// still: others may read, but not even begin anything else; for an instant
	// of the whole volume.
	still
	exclusive
)

// audience is who carries an operation out.
type audience uint8

const (
	// oneMember: any one of the set reads.
	oneMember audience = iota
	// members: all without whose answer nothing is acknowledged.
	members
	// stayers: those that the next set will have.
	stayers
	// writers: members, and those that receive every write while they are
	// copied to.
	writers
	// everyone: and those that are being given a snapshot's content.
	everyone
	// targetOnly: the replica that is copied to.
	targetOnly
)

// op is one operation in flight.
type op struct {
	id   uint64
	verb Verb
	who  audience
	lock lock
	// off and len are the range, in bytes.
	off, len int64
	snapshot uint32 // whose content is read, taken or reverted to; 0: the volume's
	req      *volume.Request
	answered bool
	data     []byte            // read or written, if it is not the request's
	each     map[uint32][]byte // where each peer's answer goes, if all are read from
	// generation is what a change is stamped with: 0 until it starts, then the
	// clock's, unless it was given. For a list it says since when.
	generation uint64
	info       Info // the answer to BeginSync

	// Bits are those of peers.
	pending uint32 // must still do it
	held    uint32 // were sent it in their present session: they may touch its buffer
	full    uint32 // have no room for it; asked again at retryAt
	damaged uint32 // members whose copy of what is read is damaged
	retryAt time.Duration
	reader  *peer // who reads; nil: nobody can now
	target  *peer // who is copied to ...
	run     int   // ... in which of its copies
	// optional: it fails if nobody can read for it.
	optional bool
	// missing: somebody does not have the snapshot that it is about.
	missing bool
	err     error

	// begun is called when it has its lock, in place of sending it.
	begun func(*op)
	// read is called when a member has read for it; it ends or goes on.
	read func(*op)
	// then is called when it has ended, however.
	then func(*op)
}

func conflict(a, b *op) bool {
	if a.lock == unlocked || b.lock == unlocked || a.off >= b.off+b.len || b.off >= a.off+a.len {
		return false
	}
	return a.lock+b.lock > shared+still // still stands beside shared, shared beside shared
}

// changes tells whether it changes what members hold.
func (o *op) changes() bool { return o.who != targetOnly && o.verb.changes() }

// current tells whether the operation is of the copy that is under way.
func (o *op) current() bool { return o.target != nil && o.run == o.target.run }

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
		c.lastRequest = c.now
		c.submit(requestOp(r))
	})
}

func requestOp(r *volume.Request) *op {
	o := &op{off: r.Off, len: r.Len, req: r, data: r.Data, who: writers, lock: exclusive}
	switch r.Op {
	case volume.OpRead:
		o.verb, o.who, o.lock = VerbRead, oneMember, shared
	case volume.OpFlush:
		o.verb, o.who, o.lock = VerbFlush, members, unlocked
	case volume.OpZero:
		o.verb = VerbZero
	case volume.OpTrim:
		o.verb = VerbTrim
	case volume.OpWrite:
		o.verb = VerbWrite
	}
	return o
}

// submit starts an operation, or lines it up behind those it must not pass.
func (c *Core) submit(o *op) {
	if o.target != nil && o.run == 0 {
		o.run = o.target.run
	}
	if c.phase < serving || c.untouched || c.mustWait(o, c.blocked) {
		c.blocked = append(c.blocked, o)
		return
	}
	c.start(o)
}

func (c *Core) mustWait(o *op, earlier []*op) bool {
	if c.held(o) {
		return true
	}
	if o.lock == unlocked || c.breaks(BreakNoOrder) {
		return false
	}
	return slices.ContainsFunc(c.inflight, func(other *op) bool { return conflict(o, other) }) ||
		slices.ContainsFunc(earlier, func(other *op) bool { return conflict(o, other) && !c.held(other) })
}

// held tells whether a request may not even wait for its turn: until a rollback
// is done there is none.
func (c *Core) held(o *op) bool { return o.req != nil && c.rollback.due(c.volume) }

// startBlocked starts what may start now. An operation still never passes an
// earlier one that overlaps it.
func (c *Core) startBlocked() {
	if c.phase < serving || c.untouched || len(c.blocked) == 0 {
		return
	}
	waiting := c.blocked
	c.blocked = nil
	var waits []*op
	for _, o := range waiting {
		if c.mustWait(o, waits) {
			waits = append(waits, o)
		} else {
			c.start(o)
		}
	}
	// A start may have finished at once and lined others up again.
	c.blocked = append(waits, c.blocked...)
}

// dropBlocked forgets what waits for a copy that is over.
func (c *Core) dropBlocked(p *peer) {
	c.blocked = slices.DeleteFunc(c.blocked, func(o *op) bool { return o.target == p && !o.current() })
}

func (c *Core) start(o *op) {
	c.nextID++
	o.id = c.nextID
	if o.generation == 0 && o.verb != VerbChanged {
		o.generation = c.clock.generation
	}
	c.ops[o.id] = o
	c.inflight = append(c.inflight, o)
	if o.changes() {
		c.clock.used = true
	}
	if o.begun != nil {
		o.begun(o)
		return
	}
	c.ask(o)
}

// ask sends an operation to all who have to carry it out.
func (c *Core) ask(o *op) {
	if o.who == oneMember {
		c.assignReader(o)
		return
	}
	o.pending = c.mask(o)
	for _, p := range c.peers {
		if o.pending&p.bit != 0 {
			c.send(o, p)
		}
	}
	c.settle(o)
}

// mask has the bits of an operation's audience.
func (c *Core) mask(o *op) uint32 {
	switch o.who {
	case members:
		return c.requiredMask()
	case stayers:
		return c.wantedMask()
	case writers:
		return c.requiredMask() | c.roleMask(syncing)
	case everyone:
		return c.requiredMask() | c.roleMask(syncing) | c.roleMask(catching)
	case targetOnly:
		return o.target.bit
	}
	return 0
}

// send asks a peer to do its part, if it is there; PeerUp asks again.
func (c *Core) send(o *op, p *peer) {
	if p.session == 0 || p.lost || p.role == leaving {
		return
	}
	e := Effect{
		Send: true, Peer: p.id, Session: p.session, ID: o.id, Verb: o.verb, Snapshot: o.snapshot,
		Off: o.off, Len: o.len, Data: o.data, Generation: o.generation,
	}
	switch {
	case o.req != nil:
		e.FUA = o.req.FUA
	case o.verb == VerbBeginSync:
		e.Base = o.target.copy.startBase()
	case o.verb == VerbReadVerified && (o.snapshot != 0 && p.info.Old || o.target != nil && c.breaks(BreakCopyUnverified)):
		e.Verb = VerbRead
	}
	if o.each != nil {
		e.Data = o.each[p.id]
	}
	o.held |= p.bit
	if p.owes == 0 {
		p.heard = c.now
	}
	p.owes++
	c.emit(e)
}

// assignReader asks a member for the data: the near one, else any.
func (c *Core) assignReader(o *op) {
	o.reader = nil
	for _, p := range c.peers {
		if !p.healthy() || p.role != member || o.damaged&p.bit != 0 {
			continue
		}
		if o.reader == nil || p.id == c.cfg.Near {
			o.reader = p
		}
	}
	switch {
	case o.reader != nil:
		c.send(o, o.reader)
	case o.optional:
		o.err = errNoReader
		c.finish(o)
	}
}

var errNoReader = errors.New("no replica that has it is in reach")

// finish ends an operation that waits for nobody any more.
func (c *Core) finish(o *op) {
	o.who, o.pending = targetOnly, 0
	c.settle(o)
}

// settle answers an operation's client and ends the operation when it may.
func (c *Core) settle(o *op) {
	switch o.who {
	case oneMember:
	case stayers:
		if o.pending&c.wantedMask() != 0 {
			return
		}
	default:
		// While one leaves, nothing is acknowledged: see tryPropose.
		if o.req != nil && c.anyLeaving() && !c.breaks(BreakAckBeforeShrink) {
			return
		}
		if o.pending&(c.requiredMask()|c.roleMask(syncing)|c.roleMask(catching)|o.ownTarget()) != 0 {
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
	if o.then != nil {
		o.then(o)
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
		case o.who == oneMember && o.target != nil && !o.current():
			c.finish(o)
		case o.who == oneMember:
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

// anyFull tells whether somebody waits for room who uses the volume.
func (c *Core) anyFull() bool {
	return slices.ContainsFunc(c.inflight, func(o *op) bool { return o.full != 0 && o.verb != VerbPrepare && o.verb != VerbResize })
}

func (c *Core) noteFull(o *op, p *peer) {
	if s := c.take.under; o.verb == VerbPrepare && s != nil { // which nobody waits for
		c.note(argonv1.Severity_SEVERITY_WARNING, "snapshot-delayed", fmt.Sprint(s.GetId()), "snapshot %s waits: replica %d has no room for another layer, or as many as it can have; delete snapshots, or free space on its server", s.GetName(), p.id)
		return
	}
	if o.verb == VerbResize {
		c.note(argonv1.Severity_SEVERITY_WARNING, "growth-delayed", fmt.Sprint(o.len), "the volume cannot grow to %d bytes yet: replica %d has no room; free space on its server", o.len, p.id)
		return
	}
	c.note(argonv1.Severity_SEVERITY_ERROR, "volume-full", "", "replica %d has no room: the volume waits; free space on its server", p.id)
}
