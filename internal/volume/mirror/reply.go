package mirror

import (
	"errors"
	"fmt"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// Outcome is a replica's answer to one message.
type Outcome uint8

// What a replica may answer. A broken connection is no answer: see PeerDown.
const (
	Done Outcome = iota + 1
	// Full: there is no room; nothing else is wrong.
	Full
	// Broken: its disk failed (I8).
	Broken
	// Damaged: what was asked for is not what was once written there.
	Damaged
	// Missing: it has no such snapshot.
	Missing
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
		if o.who == oneMember {
			c.readReply(o, p, out, err)
			return
		}
		o.info = info
		c.changeReply(o, p, out, err)
	})
}

// readReply goes on after one member was asked. Another one is asked if it
// could not answer.
func (c *Core) readReply(o *op, p *peer, out Outcome, err error) {
	switch {
	case out == Done:
	case out == Damaged:
		o.damaged |= p.bit
		c.note(argonv1.Severity_SEVERITY_ERROR, "replica-damaged", fmt.Sprint(p.id, o.off), "replica %d: %v; it is not copied from there: run `argon volume scrub`", p.id, err)
		if c.assignReader(o); o.reader != nil {
			return
		}
		o.err = err
	case out == Missing:
		o.err = err
	case c.otherHealthy(p):
		c.loseDisk(p, "a read", err)
		c.assignReader(o)
		return
	default:
		o.err = fmt.Errorf("read %d bytes at %d: the only replica in sync cannot: %w", o.len, o.off, err)
	}
	if o.read == nil {
		c.settle(o)
		return
	}
	o.read(o)
}

func (c *Core) changeReply(o *op, p *peer, out Outcome, err error) {
	switch {
	case out == Done:
		o.pending &^= p.bit
		if c.breaks(BreakAckBeforeAll) && o.changes() || c.breaks(BreakFlushBeforeAll) && o.req != nil && o.verb == VerbFlush {
			c.answer(o)
		}
	case o.pending&p.bit == 0:
		// It does not matter any more.
	case out == Full && !p.copied():
		o.full |= p.bit
		o.retryAt = c.now + c.cfg.RetryAfter
		c.noteFull(o, p)
	case p.copied() || p.role == joining && !p.caughtUp:
		c.failCopy(p, err)
	case errors.Is(err, ErrDeposed):
		// The shell finds out and calls Deposed.
	case out == Missing:
		// The snapshot was deleted; whoever asked sees that in the record.
		o.pending, o.missing = o.pending&^p.bit, true
	case out == Damaged && o.verb == VerbRevert && !c.otherHealthy(p):
		c.note(argonv1.Severity_SEVERITY_ERROR, "rollback-damaged", fmt.Sprint(p.id, o.off), "replica %d: %v; the volume keeps what it had at %d", p.id, err, o.off)
		o.pending &^= p.bit
	case out == Damaged && o.verb == VerbMend:
		// What is damaged is the base's: a scrub of the volume that has it mends it.
		o.pending, o.err = o.pending&^p.bit, err
	default:
		c.loseDisk(p, "its disk", err)
		if c.breaks(BreakIgnoreFailure) {
			o.pending &^= p.bit
		}
	}
	c.settle(o)
}
