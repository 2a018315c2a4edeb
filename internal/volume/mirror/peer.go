package mirror

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// role is what a replica is to the holder.
type role uint8

const (
	// outside: not in the set; nothing is sent to it.
	outside role = iota
	// starting: it was asked to begin a copy.
	starting
	// catching: it is given the content of snapshots that it does not have, and
	// receives no new writes.
	catching
	// syncing: it is copied to, and receives every new write.
	syncing
	// joining: the copy is complete; it must answer everything from now on,
	// and enters the set once all that is flushed.
	joining
	// member: in the set.
	member
	// leaving: still in the recorded set, so nothing is acknowledged without
	// it; a proposal without it is under way or will be.
	leaving
)

// peer is one replica as the holder sees it.
type peer struct {
	id       uint32
	serverID string
	bit      uint32
	role     role

	// The connection: session is 0 while there is none.
	session   uint64
	info      Info
	downSince time.Duration
	hanging   bool // its session is being ended
	unwanted  bool // no longer in the record: goes once its session is over
	gone      bool // its server has no lease
	owes      int  // messages it has not answered
	heard     time.Duration

	// A member's: the incarnation in the set; why it cannot stay.
	incarnation uint64
	lost        bool
	failed      bool
	reason      string

	// retiring: the record wants it out of the set.
	retiring bool

	// A copy's. run tells the operations of one from an earlier one's.
	behind   bool // the record wants it copied to
	run      int
	copy     *copying // nil if outside, member or leaving
	nextCopy time.Duration
	caughtUp bool // joining: it may enter the set
}

func (p *peer) healthy() bool {
	return p.session != 0 && !p.lost && !p.hanging && (p.role == member || p.role == joining && p.caughtUp)
}

func (c *Core) peer(id uint32) *peer {
	for _, p := range c.peers {
		if p.id == id {
			return p
		}
	}
	return nil
}

func (c *Core) addPeer(r *argonv1.Replica) *peer {
	var used uint32
	for _, p := range c.peers {
		used |= p.bit
	}
	for _, o := range c.inflight {
		used |= o.pending | o.held
	}
	p := &peer{
		id:        r.GetId(),
		serverID:  r.GetServerId(),
		bit:       1 << bits.TrailingZeros32(^used),
		downSince: c.now,
	}
	p.follow(r)
	c.peers = append(c.peers, p)
	return p
}

// follow takes over what others want of a replica.
func (p *peer) follow(r *argonv1.Replica) {
	p.retiring = r.GetRetiring()
	p.behind = r.GetState() == argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC && !p.retiring
}

// syncPeers follows what others changed in the record: replicas that were
// added, and replicas outside the set that are to go.
func (c *Core) syncPeers(v *argonv1.Volume) {
	there := map[uint32]*argonv1.Replica{}
	for _, r := range v.GetReplicas() {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_REMOVING {
			there[r.GetId()] = r
		}
		p := c.peer(r.GetId())
		switch {
		case p == nil && there[r.GetId()] != nil:
			p = c.addPeer(r)
			c.emit(Effect{Dial: true, Peer: p.id})
		case p != nil:
			p.follow(r)
		}
	}
	for _, p := range slices.Clone(c.peers) {
		if there[p.id] == nil && p.role != member && p.role != leaving && !p.caughtUp {
			c.remove(p)
		}
	}
}

// remove forgets a replica that the record does not have any more, when its
// session is over: until then its connection may touch buffers.
func (c *Core) remove(p *peer) {
	p.unwanted, p.behind = true, false
	if p.role != outside {
		c.abortCopy(p)
	}
	if p.session != 0 {
		c.hangUp(p)
		return
	}
	c.peers = slices.DeleteFunc(c.peers, func(x *peer) bool { return x == p })
	c.emit(Effect{Drop: true, Peer: p.id})
}

func (c *Core) hangUp(p *peer) {
	if !p.hanging {
		p.hanging = true
		c.emit(Effect{Hangup: true, Peer: p.id, Session: p.session})
	}
}

// requiredMask has the peers without whose answer nothing is acknowledged
// (I1): the recorded set, and any that a proposal may be adding to it (I5).
func (c *Core) requiredMask() uint32 {
	var m uint32
	for _, p := range c.peers {
		switch p.role {
		case member, joining, leaving:
			if c.breaks(BreakAckBeforeShrink) && (p.session == 0 || p.role == leaving) {
				continue
			}
			m |= p.bit
		}
	}
	return m
}

// wantedMask has the peers that wantedSet has.
func (c *Core) wantedMask() uint32 {
	var m uint32
	for _, p := range c.peers {
		if p.role == member || p.role == joining && p.caughtUp {
			m |= p.bit
		}
	}
	return m
}

func (c *Core) roleMask(r role) uint32 {
	var m uint32
	for _, p := range c.peers {
		if p.role == r {
			m |= p.bit
		}
	}
	return m
}

func (c *Core) anyRole(r role) bool { return c.roleMask(r) != 0 }

func (c *Core) otherHealthy(p *peer) bool {
	return slices.ContainsFunc(c.peers, func(o *peer) bool { return o != p && o.healthy() })
}

// PeerUp tells that a replica was sealed in this epoch and reached.
func (c *Core) PeerUp(now time.Duration, id uint32, session uint64, info Info) []Effect {
	return c.event(now, func() {
		p := c.peer(id)
		if p == nil {
			return
		}
		if p.session != 0 {
			c.down(p)
		}
		p.session, p.info, p.hanging, p.owes, p.heard = session, info, false, 0, c.now
		if p.unwanted {
			c.hangUp(p)
			return
		}
		if p.role != member && p.role != leaving {
			return
		}
		switch {
		case info.Health != Good && !c.breaks(BreakIgnoreFailure):
			c.loseDisk(p, "its disk", errors.New("earlier"))
			return
		case info.Incarnation != p.incarnation && !c.breaks(BreakIgnoreIncarnation):
			c.lose(p, "it was restarted and may have lost writes")
			return
		}
		c.sendPending(p)
		for _, o := range slices.Clone(c.inflight) {
			if o.who == oneMember && o.reader == nil && o.held == 0 {
				c.assignReader(o)
			}
		}
	})
}

func (c *Core) sendPending(p *peer) {
	for _, o := range slices.Clone(c.inflight) {
		switch {
		case o.pending&p.bit == 0 || o.held&p.bit != 0:
		case p.info.Old && (o.verb == VerbSums && o.snapshot != 0 || o.verb == VerbMend):
			// It was newer when this began.
			o.pending, o.missing = o.pending&^p.bit, true
			c.settle(o)
		default:
			c.send(o, p)
		}
	}
}

// PeerDown tells that a session is over, and that nothing of it touches a
// buffer any more. What it had not answered is asked again when it is back.
func (c *Core) PeerDown(now time.Duration, id uint32, session uint64) []Effect {
	return c.event(now, func() {
		p := c.peer(id)
		if p == nil || p.session != session || session == 0 {
			return
		}
		c.down(p)
		if p.unwanted {
			c.remove(p)
		}
	})
}

func (c *Core) down(p *peer) {
	p.session, p.hanging, p.owes, p.downSince = 0, false, 0, c.now
	for _, o := range c.inflight {
		o.held &^= p.bit
		o.full &^= p.bit
		if o.reader == p {
			o.reader = nil
		}
	}
	switch {
	case p.role == joining && p.caughtUp:
		c.leave(p, "its connection broke")
	case p.copied(), p.role == joining:
		c.abortCopy(p)
	}
	c.settleAll()
}

// PeerAhead tells that a replica has sealed a higher epoch than the catalog
// has: the catalog was put back to an older state (I9).
func (c *Core) PeerAhead(now time.Duration, id uint32, sealed uint64) []Effect {
	return c.event(now, func() {
		if c.breaks(BreakIgnoreAhead) {
			return
		}
		c.end(fmt.Errorf("replica %d has seen epoch %d, the catalog says %d: see `argon volume promote`: %w", id, sealed, c.cfg.Epoch, ErrCatalogBehind), false)
	})
}

// ServerGone tells whether a replica's server is known to be down, so that
// there is no use in waiting for it. A hint: nothing is acknowledged by it.
func (c *Core) ServerGone(now time.Duration, serverID string, gone bool) []Effect {
	return c.event(now, func() {
		for _, p := range c.peers {
			if p.serverID == serverID {
				p.gone = gone
			}
		}
	})
}

// lose notes that a member cannot stay in the set.
func (c *Core) lose(p *peer, reason string) {
	if p.role != member && p.role != leaving && !p.caughtUp {
		return
	}
	p.lost, p.reason = true, reason
}

// loseDisk notes that a member said that its disk failed (I8).
func (c *Core) loseDisk(p *peer, what string, err error) {
	p.failed, p.info.Health = true, Failed
	c.lose(p, fmt.Sprintf("%s failed: %v", what, err))
}

// leave takes a peer out, as soon as the catalog agrees.
func (c *Core) leave(p *peer, reason string) {
	p.role, p.reason, p.caughtUp, p.copy = leaving, reason, false, nil
	p.run++
	c.barrier, c.flushed = nil, false
	if !c.inSet(p.id) && c.proposed == nil {
		c.putOutside(p)
	}
}

func (c *Core) putOutside(p *peer) {
	p.role, p.lost, p.failed, p.nextCopy, p.copy = outside, false, false, c.now, nil
	c.forget(p)
}

// forget makes no operation wait for the peer.
func (c *Core) forget(p *peer) {
	for _, o := range c.inflight {
		o.pending &^= p.bit
		o.full &^= p.bit
	}
}

// review finds the members that have to leave. One may do so only while
// another can carry on.
func (c *Core) review() {
	c.takeBack()
	members, hopeless, failed := 0, 0, 0
	for _, p := range c.peers {
		if p.role != member {
			continue
		}
		away := p.session == 0 && (p.gone || c.now-p.downSince >= c.cfg.DropAfter)
		if (p.lost || away) && c.otherHealthy(p) {
			reason := p.reason
			if !p.lost {
				reason = "it could not be reached"
			}
			c.leave(p, reason)
			continue
		}
		members++
		if p.lost {
			hopeless++
		}
		if p.failed {
			failed++
		}
	}
	if members == 0 && c.proposed == nil && c.phase == serving && len(c.wantedSet()) == 0 {
		// The one that was to carry on went before the record had it: those that
		// were to leave are all there is, and takeBack wants none of them.
		for _, p := range c.peers {
			if p.role == leaving && p.lost && c.inSet(p.id) {
				members, hopeless = members+1, hopeless+1
				if p.failed {
					failed++
				}
			}
		}
	}
	switch {
	case members == 0 || hopeless < members:
	case failed > 0:
		c.end(fmt.Errorf("the disk of the last replica in sync failed: see `argon volume promote`: %w", ErrReplicasLost), false)
	default:
		c.end(ErrRestarted, false)
	}
}

// retire lets a member go that the record wants out of the set, if as many as
// are wanted stay that can carry on. It leaves as any other does: by a change of
// the record, before anything is acknowledged without it (I3).
func (c *Core) retire() {
	if c.phase != serving || c.proposed != nil || c.anyLeaving() {
		return
	}
	stay := 0
	var goes *peer
	for _, p := range c.peers {
		switch {
		case p.role == member && p.retiring:
			goes = p
		case p.role == member && p.healthy():
			stay++
		}
	}
	if goes != nil && stay >= max(1, int(c.volume.GetReplicasWanted())) {
		c.leave(goes, retired)
	}
}

// retired is the reason of a replica that was asked to leave.
const retired = "there are enough others"

// takeBack keeps those in the set that were to leave, when none that was to
// stay is healthy any more. The record still has them. While settling they may
// differ from the source: then another source is looked for (reopen).
func (c *Core) takeBack() {
	if c.phase == settling || c.proposed != nil || slices.ContainsFunc(c.peers, (*peer).healthy) {
		return
	}
	for _, p := range c.peers {
		if p.role == leaving && !p.lost && c.inSet(p.id) && !c.breaks(BreakAckBeforeShrink) {
			p.role = member
			c.sendPending(p)
		}
	}
}

// tickPeer ends the session of a peer that has owed an answer for too long.
func (c *Core) tickPeer(p *peer) {
	if p.session != 0 && p.owes > 0 && c.now-p.heard >= c.cfg.StallAfter {
		c.hangUp(p)
	}
}
