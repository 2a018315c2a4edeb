package mirror

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file takes snapshots that the record asks for, one at a time:
//
//	prepare    the replicas make what a new layer needs, while writes go on
//	generation the next one is recorded: what is written after the snapshot is
//	           stamped with it, or a later one. The volumes of a group wait here
//	           for each other, so that none stands still for long
//	still      nothing is written anywhere, for as long as a message takes. The
//	           volumes of a group wait here again: now all stand still at once
//	snapshot   every replica in sync begins a new layer
//	flush      what was written before is made durable, while writes go on
//	proposal   the catalog says that the snapshot is ready, and who has it

// taking is the snapshot under way.
type taking struct {
	under      *argonv1.Snapshot
	prepared   bool
	rolling    bool // its generation was proposed
	generation uint64
	meeting    bool // waits for the others of the group ...
	still      *op  // ... while this stands still, if it is not nil
	refused    bool
	taken      bool
	flushed    bool
	nextTry    time.Duration
}

// Taken is a snapshot that is ready.
type Taken struct {
	ID         uint32
	Generation uint64
	Size       uint64
}

// tryTake begins a snapshot that is due, and goes on with one under way.
func (c *Core) tryTake() {
	t := &c.take
	switch {
	case t.under == nil:
		if s := c.dueSnapshot(); s != nil && c.now >= t.nextTry && c.atEase() {
			t.under = proto.CloneOf(s)
			c.submit(&op{verb: VerbPrepare, who: members, then: func(*op) { t.prepared = true }})
		}
	case !t.prepared || t.begun():
	case c.snapshotRecord(t.under.GetId()) == nil:
		c.take = taking{}
	case c.proposed == nil && c.clock.rollingTo == 0 && c.atEase():
		t.rolling = true
		c.propose(Proposal{InSync: c.set, Generation: c.clock.generation + 1})
	}
}

// begun tells whether a snapshot is being taken, so that nobody may enter the
// set who might not have it.
func (t *taking) begun() bool { return t.rolling || t.generation != 0 }

// dueSnapshot is the oldest one that was asked for.
func (c *Core) dueSnapshot() *argonv1.Snapshot {
	if c.rollback.due(c.volume) {
		return nil
	}
	for _, s := range c.volume.GetSnapshots() {
		if s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_CREATING {
			return s
		}
	}
	return nil
}

// atEase tells whether the in-sync set is what it should be, and nobody is
// about to enter it.
func (c *Core) atEase() bool {
	return sameSet(c.wantedSet(), c.set) && !slices.ContainsFunc(c.peers, func(p *peer) bool { return p.role == joining })
}

// takeRolled goes on when the generation is recorded.
func (c *Core) takeRolled(generation uint64) {
	t := &c.take
	if !t.rolling {
		return
	}
	t.rolling, t.generation = false, generation
	if t.under.GetGroup() == "" {
		c.standStill()
		return
	}
	c.meet(whenReady)
}

// standStill locks the volume.
func (c *Core) standStill() {
	t := &c.take
	o := &op{
		verb: VerbSnapshot, who: members, lock: still, len: c.cfg.Size,
		snapshot: t.under.GetId(), generation: t.generation, then: c.snapshotMade,
	}
	if t.under.GetGroup() != "" {
		o.begun = func(o *op) {
			t.still = o
			c.meet(whenStill)
		}
	}
	if c.breaks(BreakSnapshotUnlocked) {
		o.lock = unlocked
	}
	c.submit(o)
}

// Where the volumes of a group wait for each other.
const (
	whenReady = "ready"
	whenStill = "still"
)

// meet waits for the other volumes of the group.
func (c *Core) meet(where string) {
	s := c.take.under
	c.take.meeting = true
	c.emit(Effect{Meet: &Rendezvous{Snapshot: s.GetId(), Name: s.GetGroup() + "/" + where, Size: int(s.GetGroupSize())}})
}

// Met tells that all volumes of the snapshot's group have come, or why they will
// not: then it is tried again later.
func (c *Core) Met(now time.Duration, snapshot uint32, err error) []Effect {
	return c.event(now, func() {
		t := &c.take
		if !t.meeting || t.under.GetId() != snapshot {
			return
		}
		t.meeting = false
		if err != nil {
			c.note(argonv1.Severity_SEVERITY_WARNING, "snapshot-delayed", fmt.Sprint(snapshot), "snapshot %s waits for the other volumes of its group: %v", t.under.GetName(), err)
		}
		switch o := t.still; {
		case err == nil && o == nil:
			c.standStill()
		case err == nil:
			c.ask(o)
		case o == nil:
			c.take = taking{nextTry: c.now + c.cfg.RetryAfter}
		default:
			t.refused = true
			c.finish(o)
		}
	})
}

// snapshotMade goes on when every replica in sync has begun a new layer.
func (c *Core) snapshotMade(*op) {
	t := &c.take
	if t.refused {
		c.take = taking{nextTry: c.now + c.cfg.RetryAfter}
		return
	}
	t.taken = true
	t.under.Generation, t.under.SizeBytes = t.generation, uint64(c.cfg.Size)
	c.snapshotTaken(t.under)
	if c.breaks(BreakSnapshotUnflushed) {
		t.flushed = true
		return
	}
	c.submit(&op{verb: VerbFlush, who: members, then: func(*op) { t.flushed = true }})
}

// outcome is what there is to record of a snapshot; nil: nothing yet.
func (t *taking) outcome() *Taken {
	if !t.flushed {
		return nil
	}
	return &Taken{ID: t.under.GetId(), Generation: t.under.GetGeneration(), Size: t.under.GetSizeBytes()}
}

// takeRecorded ends a snapshot.
func (c *Core) takeRecorded(taken *Taken) {
	if taken == nil || c.take.under.GetId() != taken.ID {
		return
	}
	if s := c.snapshotRecord(taken.ID); s != nil {
		c.tell(argonv1.Severity_SEVERITY_INFO, "snapshot-taken", "snapshot %s was taken", s.GetName())
	}
	c.take = taking{}
}

func (c *Core) snapshotRecord(id uint32) *argonv1.Snapshot {
	for _, s := range c.volume.GetSnapshots() {
		if s.GetId() == id {
			return s
		}
	}
	return nil
}

// readySnapshots are those that a replica in sync has, oldest first, also the
// one that the catalog has not been told of.
func (c *Core) readySnapshots() []*argonv1.Snapshot {
	var ready []*argonv1.Snapshot
	for _, s := range c.volume.GetSnapshots() {
		if s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_READY {
			ready = append(ready, s)
		}
	}
	if t := &c.take; t.taken && c.snapshotRecord(t.under.GetId()).GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_CREATING {
		ready = append(ready, t.under)
	}
	slices.SortStableFunc(ready, func(a, b *argonv1.Snapshot) int { return int(int64(a.GetGeneration() - b.GetGeneration())) })
	return ready
}
