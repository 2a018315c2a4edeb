package mirror

import (
	"fmt"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file has the catalog told: of the in-sync set that is called for, and of
// facts. One proposal is under way at a time.

// tryPropose asks for the in-sync set that the peers' states call for.
//
// Before a replica leaves, those that stay are flushed, while nothing is
// acknowledged. One of them may have lost power a moment ago, unnoticed: then
// the flush does not succeed, and the one that was to leave is still in the
// set, with all it has. Once it has succeeded, losing power loses nothing that
// was acknowledged.
func (c *Core) tryPropose() {
	want := c.wantedSet()
	if c.proposed != nil || c.untouched || len(want) == 0 {
		return
	}
	if sameSet(want, c.set) {
		if c.hasNews() {
			c.propose(Proposal{InSync: c.set})
		}
		return
	}
	if c.removes(want) && !c.flushed {
		if c.barrier == nil {
			c.barrier = &op{verb: VerbFlush, who: stayers, then: func(o *op) { c.flushed = c.flushed || o == c.barrier }}
			c.start(c.barrier)
		}
		return
	}
	c.propose(Proposal{InSync: want, Reasons: c.reasons()})
}

// removes tells whether a recorded member is not wanted any more.
func (c *Core) removes(want []Member) bool {
	return slices.ContainsFunc(c.set, func(m Member) bool {
		return !slices.ContainsFunc(want, func(w Member) bool { return w.ID == m.ID })
	})
}

// anyLeaving tells whether a replica is on its way out of the set.
func (c *Core) anyLeaving() bool {
	return slices.ContainsFunc(c.peers, func(p *peer) bool { return p.role == leaving })
}

// hasNews tells whether there is something to record that is not about the set.
func (c *Core) hasNews() bool {
	return len(c.ripe()) > 0 || c.take.flushed || c.grow.done || c.rollback.flushed || c.scrub.flushed
}

// record lets the next proposal say something.
func (c *Core) record(f fact) { c.facts = append(c.facts, f) }

// ripe are the facts that can be recorded now. That a replica has a snapshot
// can only be once that is ready itself.
func (c *Core) ripe() []fact {
	for i, f := range c.facts {
		s := c.snapshotRecord(f.snapshot)
		if s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_CREATING && !(c.take.flushed && c.take.under.GetId() == s.GetId()) {
			return c.facts[:i]
		}
	}
	return c.facts
}

func (c *Core) propose(p Proposal) {
	p.Epoch, p.EqualBefore = c.cfg.Epoch, c.clock.equalBefore
	p.Facts, p.Taken, p.Scrubbed = slices.Clone(c.ripe()), c.take.outcome(), c.scrub.outcome()
	if c.grow.done {
		p.Size = c.grow.to
	}
	if c.rollback.flushed {
		p.RolledBack = c.volume.GetRollbackTo()
	}
	c.proposed = &p
	c.emit(Effect{Propose: &p})
}

// Committed tells that the proposal was carried out; v is the record after it.
func (c *Core) Committed(now time.Duration, v *argonv1.Volume) []Effect {
	return c.event(now, func() {
		p := c.proposed
		c.proposed = nil
		if p == nil {
			return
		}
		if p.Release {
			c.end(nil, p.Clean)
			return
		}
		if v.GetMeta().GetRevision() < c.volume.GetMeta().GetRevision() {
			v = c.volume // what others wanted since came here first
		}
		c.volume = v
		c.facts = c.facts[len(p.Facts):]
		c.rolled(p, v)
		c.set = inSync(v)
		c.barrier, c.flushed = nil, false
		c.adoptSet()
		c.syncPeers(v)
		c.takeRecorded(p.Taken)
		c.grown(v, p.Size)
		if p.Scrubbed != nil {
			c.scrubRecorded(p.Scrubbed)
		}
		if c.phase == settling {
			c.phase = serving
			c.startBlocked()
		}
		c.rollbackRecorded(p.RolledBack)
		c.settleAll()
	})
}

// adoptSet gives the peers the roles that the recorded set says.
func (c *Core) adoptSet() {
	for _, p := range c.peers {
		in := c.inSet(p.id)
		switch {
		case in && p.role == joining:
			p.role, p.copy = member, nil
			delete(c.noted, "resync-started"+fmt.Sprint(p.id))
			delete(c.noted, "resync-failed"+fmt.Sprint(p.id))
			c.tell(argonv1.Severity_SEVERITY_INFO, "replica-in-sync", "replica %d is in sync", p.id)
		case !in && p.role == leaving:
			c.putOutside(p)
			severity := argonv1.Severity_SEVERITY_WARNING
			if p.reason == retired {
				severity = argonv1.Severity_SEVERITY_INFO
			}
			c.tell(severity, "replica-out-of-sync", "replica %d left the in-sync set: %s", p.id, p.reason)
		}
	}
}

// wantedSet is the in-sync set as the peers' states call for it.
func (c *Core) wantedSet() []Member {
	var ms []Member
	for _, p := range c.peers {
		if p.role == member || (p.role == joining && p.caughtUp) {
			ms = append(ms, Member{ID: p.id, Incarnation: p.incarnation})
		}
	}
	return ms
}

func (c *Core) reasons() map[uint32]string {
	rs := map[uint32]string{}
	for _, p := range c.peers {
		if p.role == leaving {
			rs[p.id] = p.reason
		}
	}
	return rs
}

func sameSet(a, b []Member) bool {
	if len(a) != len(b) {
		return false
	}
	for _, m := range a {
		if !slices.Contains(b, m) {
			return false
		}
	}
	return true
}
