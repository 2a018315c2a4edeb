package mirror

import (
	"fmt"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// Config is what a Core is made with.
type Config struct {
	Epoch uint64
	Size  int64
	// Clean: the last attachment ended clean (see Take).
	Clean bool
	// Generation is the volume's, EqualBefore when its replicas in sync were
	// last known to be equal and flushed.
	Generation, EqualBefore uint64
	// Near is the replica on the holder's own server; 0: none.
	Near uint32
	// Continue: what ran on the last attachment goes on with this one, so it
	// must find every acknowledged write, flushed or not.
	Continue bool
	// Patience is how long an attachment waits for in-sync replicas that do
	// not answer, once one has that could be the source.
	Patience time.Duration
	// DropAfter is how long an in-sync replica may be out of reach before the
	// holder takes it out of the set. Until then writes wait for it.
	DropAfter time.Duration
	// StallAfter is how long a replica that is in reach may owe an answer
	// before it counts as out of reach.
	StallAfter time.Duration
	// RetryAfter is the pause before a full disk, or a copy that failed, is
	// tried again.
	RetryAfter time.Duration
	// RollEvery is how long writes are stamped with one generation. What was
	// written since the last roll but one is copied after a failure.
	RollEvery time.Duration
	// Grain is the unit in which replicas say what changed and copies move, in
	// bytes; Chunks how many are under way at once, for each replica copied to,
	// while nobody uses the volume.
	Grain  int64
	Chunks int
	// ScrubPace is how much a scrub compares in a second, in bytes.
	ScrubPace int64
	// Break switches rules off, so that tests can see the checker notice.
	Break Breakage
}

// Breakage is a set of rules to break on purpose. For tests only.
type Breakage uint32

// One rule each, see docs/volumes.md.
const (
	BreakAckBeforeAll      Breakage = 1 << iota // I1: one replica's answer is enough
	BreakFlushBeforeAll                         // I1, flush
	BreakStaleSource                            // I2: any replica that answers is a source
	BreakAckBeforeShrink                        // I3: do not wait for the catalog
	BreakEnterEarly                             // I5: enter the set before the copy is done
	BreakNoOrder                                // I6: overlapping writes race
	BreakIgnoreIncarnation                      // I7: a restarted replica stays in the set
	BreakIgnoreFailure                          // I8: a failed replica stays in the set
	BreakIgnoreAhead                            // I9: serve though the catalog is behind
	BreakRollUnfinished                         // roll while writes of the old generation are under way
	BreakRollUnflushed                          // roll without a flush
	BreakSourceOnly                             // copy only what the source says has changed
	BreakSnapshotUnlocked                       // take snapshots while writes are under way
	BreakSnapshotUnflushed                      // call a snapshot ready before it is flushed
	BreakCopyUnverified                         // copy what differs from its recorded checksum
	BreakSumUnflushed                           // let checksums be recorded of what is not flushed
)

// DefaultConfig has the times of a production attachment.
func DefaultConfig() Config {
	return Config{
		Patience:   2 * time.Second,
		DropAfter:  time.Second,
		StallAfter: 20 * time.Second,
		RetryAfter: time.Second,
		RollEvery:  30 * time.Second,
		Grain:      wire.ChangedGrain,
		Chunks:     4,
		ScrubPace:  32 << 20,
	}
}

type phase uint8

const (
	opening phase = iota
	// settling: the source is chosen, the catalog not told yet. Replicas may
	// differ, and until the choice is recorded the next holder might choose
	// another: nothing may be read from this one.
	settling
	serving
	closing
	ended
)

// Core is the holder's protocol state machine. Each event method takes the
// time since some fixed instant, and returns the effects, valid until the next
// call. Not safe for concurrent use.
//
// Invariants:
//   - a request is answered only when every replica whose bit is in
//     requiredMask has answered it (I1);
//   - a bit leaves requiredMask only after a proposal without it was
//     committed (I3), or when the replica never was in the set;
//   - two operations in flight overlap only if both read (I6).
type Core struct {
	cfg   Config
	now   time.Duration
	phase phase
	err   error

	// At most 32; an operation's masks have one bit for each.
	peers []*peer
	set   []Member // as recorded
	// volume is the record, as far as it is known.
	volume *argonv1.Volume

	nextID   uint64
	ops      map[uint64]*op
	inflight []*op // in the order of their start
	blocked  []*op // in the order of their arrival, wait for a range

	clock    clock
	take     taking
	rollback rollback
	grow     growing
	scrub    scrubbing
	facts    []fact // to be recorded
	// lastRequest is when a user's request came; 0: none did.
	lastRequest time.Duration

	proposed  *Proposal
	barrier   *op // flushes those that stay, before others leave; nil: not begun
	flushed   bool
	patience  time.Duration // when waiting for more answers ends; 0: none came
	quiet     bool          // closing: everything was flushed
	untouched bool          // closing: nothing was served in this epoch
	noted     map[string]bool
	effects   []Effect
}

// NewCore begins an attachment whose epoch has been taken. v is the record as
// it was after Take.
func NewCore(cfg Config, v *argonv1.Volume) *Core {
	c := &Core{cfg: cfg, ops: map[uint64]*op{}, set: inSync(v), volume: v, noted: map[string]bool{}}
	c.clock = clock{generation: cfg.Generation, recorded: cfg.EqualBefore, equalBefore: cfg.EqualBefore}
	for _, r := range v.GetReplicas() {
		c.addPeer(r)
	}
	return c
}

// Start returns the first effects.
func (c *Core) Start(now time.Duration) []Effect {
	return c.event(now, func() {
		for _, p := range c.peers {
			c.emit(Effect{Dial: true, Peer: p.id})
		}
	})
}

// Err is why the attachment ended; nil while it has not, or after a release.
func (c *Core) Err() error { return c.err }

// Ended tells whether the attachment is over.
func (c *Core) Ended() bool { return c.phase == ended }

// Serving tells whether requests are carried out now.
func (c *Core) Serving() bool { return c.phase == serving && !c.rollback.due(c.volume) }

// Trusts tells whether a replica has every acknowledged write now.
func (c *Core) Trusts(id uint32) bool {
	p := c.peer(id)
	return c.phase == serving && p != nil && p.role == member && p.healthy()
}

// event runs one step and then whatever the step made possible.
func (c *Core) event(now time.Duration, step func()) []Effect {
	c.now = max(now, c.now)
	c.effects = c.effects[:0]
	if c.phase == ended {
		return nil
	}
	step()
	if c.phase == settling && c.proposed == nil {
		c.reopen()
	}
	if c.phase == opening {
		c.tryOpen()
	}
	if c.phase == settling || c.phase == serving || c.phase == closing {
		c.review()
		c.retire()
		c.tryPropose()
	}
	switch c.phase {
	case serving:
		c.tryRollback()
		c.tryCopy()
		c.tryTake()
		c.tryGrow()
		c.tryScrub()
		c.tryRoll()
		c.tryPropose()
	case closing:
		c.tryRelease()
	}
	return c.effects
}

func (c *Core) emit(e Effect) { c.effects = append(c.effects, e) }

func (c *Core) breaks(b Breakage) bool { return c.cfg.Break&b != 0 }

// tell tells the operator.
func (c *Core) tell(sev argonv1.Severity, reason, format string, args ...any) {
	c.emit(Effect{Note: &Note{Severity: sev, Reason: reason, Message: fmt.Sprintf(format, args...)}})
}

// note tells the operator once, until the reason was cleared.
func (c *Core) note(sev argonv1.Severity, reason, key, format string, args ...any) {
	if !c.noted[reason+key] {
		c.noted[reason+key] = true
		c.tell(sev, reason, format, args...)
	}
}

// Tick lets time-outs happen. Call it several times a second.
func (c *Core) Tick(now time.Duration) []Effect {
	return c.event(now, func() {
		for _, p := range c.peers {
			c.tickPeer(p)
		}
		for _, o := range c.inflight {
			c.retry(o)
		}
	})
}

// Deposed ends the attachment: there is a newer epoch.
func (c *Core) Deposed(now time.Duration, err error) []Effect {
	return c.event(now, func() { c.end(err, false) })
}

// RecordChanged tells what the catalog says now.
func (c *Core) RecordChanged(now time.Duration, v *argonv1.Volume) []Effect {
	return c.event(now, func() {
		if v.GetEpoch() > c.cfg.Epoch {
			c.end(fmt.Errorf("volume %s is in epoch %d, this holder's was %d: %w", v.GetMeta().GetName(), v.GetEpoch(), c.cfg.Epoch, ErrDeposed), false)
			return
		}
		if v.GetEpoch() == c.cfg.Epoch {
			c.volume = v
			c.syncPeers(v)
		}
	})
}

// Detach begins a clean end: no new requests, everything flushed, the record
// released. Ended is true when it is done.
func (c *Core) Detach(now time.Duration) []Effect {
	return c.event(now, func() {
		if c.phase == closing {
			return
		}
		c.untouched = c.phase < serving
		c.phase = closing
		for _, p := range c.peers {
			c.stopCopy(p)
		}
		if c.rollback.due(c.volume) {
			c.refuseBlocked(nil)
		}
	})
}

// refuseBlocked answers the requests that have not begun.
func (c *Core) refuseBlocked(err error) {
	c.blocked = slices.DeleteFunc(c.blocked, func(o *op) bool {
		if o.req != nil {
			c.emit(Effect{Complete: o.req, Err: fmt.Errorf("%w: %w", volume.ErrClosed, errOr(err, ErrAbandoned))})
		}
		return o.req != nil
	})
}

// tryRelease goes on with a clean end as far as it can.
func (c *Core) tryRelease() {
	switch {
	case c.proposed != nil:
	case c.untouched:
		c.propose(Proposal{InSync: c.set, Release: true, Clean: c.cfg.Clean})
	case c.quiet:
		c.propose(Proposal{InSync: c.wantedSet(), Release: true, Clean: true})
	case len(c.inflight) == 0 && len(c.blocked) == 0:
		c.start(&op{verb: VerbFlush, who: members, then: func(*op) { c.quiet = true }})
	}
}

// end stops everything. What was not answered is answered with ErrClosed;
// whether it happened is open.
func (c *Core) end(err error, clean bool) {
	if c.phase == ended {
		return
	}
	c.phase, c.err = ended, err
	for _, p := range c.peers {
		// Before any request is answered: its buffer may still be in use.
		c.emit(Effect{Drop: true, Peer: p.id, Session: p.session, Clean: clean && p.role == member})
	}
	for _, o := range append(slices.Clone(c.inflight), c.blocked...) {
		if o.req != nil && !o.answered {
			c.emit(Effect{Complete: o.req, Err: fmt.Errorf("%w: %w", volume.ErrClosed, errOr(err, ErrDeposed))})
		}
	}
	c.inflight, c.blocked = nil, nil
}

func errOr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// tryOpen starts to serve once the source is known.
func (c *Core) tryOpen() {
	answers := map[uint32]answer{}
	anyUp := false
	for _, p := range c.peers {
		if p.session != 0 && !p.hanging {
			answers[p.id] = answer{up: true, info: p.info, near: p.id == c.cfg.Near}
			anyUp = anyUp || c.inSet(p.id)
		} else {
			answers[p.id] = answer{gone: p.gone}
		}
	}
	if anyUp && c.patience == 0 {
		c.patience = c.now + c.cfg.Patience
	}
	set := c.set
	if c.breaks(BreakStaleSource | BreakIgnoreIncarnation | BreakIgnoreFailure) {
		set, answers = c.brokenAnswers(answers)
	}
	ch := choose(set, answers, c.cfg.Clean, !anyUp || c.now < c.patience)
	if ch.err != nil {
		c.end(ch.err, false)
		return
	}
	if ch.wait {
		return
	}
	if ch.afresh && c.cfg.Continue {
		c.end(ErrRestarted, false)
		return
	}
	for _, p := range c.peers {
		i := slices.IndexFunc(ch.keep, func(m Member) bool { return m.ID == p.id })
		switch {
		case i >= 0:
			p.role, p.incarnation = member, ch.keep[i].Incarnation
		case c.inSet(p.id):
			p.role = leaving
			p.reason = "may differ from the source after the last holder ended"
			if p.session == 0 {
				p.reason = "did not answer when the volume was attached"
			}
		}
	}
	if len(ch.keep) < len(c.set) {
		c.phase = settling
		return
	}
	c.phase = serving
	c.startBlocked()
}

// reopen takes back the choice of a source that was lost before the catalog
// was told: another one may have more.
func (c *Core) reopen() {
	for _, p := range c.peers {
		if p.role == member && !p.healthy() {
			c.phase = opening
		}
	}
	if c.phase == settling {
		return
	}
	c.barrier, c.flushed = nil, false
	for _, p := range c.peers {
		if c.inSet(p.id) {
			c.putOutside(p)
		}
	}
	c.settleAll()
}

// brokenAnswers makes choose see what it must not, for tests.
func (c *Core) brokenAnswers(answers map[uint32]answer) ([]Member, map[uint32]answer) {
	set := slices.Clone(c.set)
	for _, p := range c.peers {
		a := answers[p.id]
		i := slices.IndexFunc(set, func(m Member) bool { return m.ID == p.id })
		if i < 0 && c.breaks(BreakStaleSource) && a.up {
			set = append(set, Member{ID: p.id, Incarnation: a.info.Incarnation})
			i = len(set) - 1
		}
		if i < 0 {
			continue
		}
		if c.breaks(BreakIgnoreIncarnation) {
			set[i].Incarnation = a.info.Incarnation
		}
		if c.breaks(BreakIgnoreFailure | BreakStaleSource) {
			a.info.Health = Good
			answers[p.id] = a
		}
	}
	return set, answers
}

// replicaRecord is what the record says of a replica; nil: nothing.
func (c *Core) replicaRecord(id uint32) *argonv1.Replica {
	for _, r := range c.volume.GetReplicas() {
		if r.GetId() == id {
			return r
		}
	}
	return nil
}

func (c *Core) inSet(id uint32) bool {
	return slices.ContainsFunc(c.set, func(m Member) bool { return m.ID == id })
}

// Status is what an operator sees of the attachment.
func (c *Core) Status() *argonv1.VolumeStatus {
	st := &argonv1.VolumeStatus{Condition: "serving"}
	switch {
	case c.phase == ended:
		st.Condition, st.Detail = "refused", fmt.Sprint(errOr(c.err, ErrDeposed))
	case c.phase == opening || c.phase == settling:
		st.Condition, st.Detail = "waiting", "for replicas in sync to answer"
	case c.anyFull():
		st.Condition, st.Detail = "full", "a replica's disk has no room"
	}
	for _, p := range c.peers {
		if p.role == member && !p.healthy() || p.role == leaving {
			st.Condition, st.Detail = "waiting", fmt.Sprintf("for replica %d", p.id)
		}
		if cp := p.copy; cp != nil && p.role != starting {
			st.Resyncs = append(st.Resyncs, &argonv1.ResyncProgress{
				ReplicaId: p.id, DoneBytes: uint64(cp.done), TotalBytes: uint64(cp.total), Snapshot: cp.view.GetName(),
			})
		}
	}
	st.ScrubbedBytes, st.ScrubbedSnapshot = uint64(c.scrub.cursor), c.scrub.view.GetName()
	if c.rollback.due(c.volume) {
		st.Condition, st.Detail = "waiting", "for the rollback to be done"
		st.RollbackDoneBytes, st.RollbackTotalBytes = uint64(c.rollback.done), uint64(c.rollback.total)
	}
	return st
}
