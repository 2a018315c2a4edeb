package mirror

import (
	"fmt"
	"math/bits"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// This file makes the volume what it was in a snapshot, when the record says
// so: each region that was written since is made so again, by every replica from
// its own layers, as an ordinary change. No request is carried out before it is
// done, so nobody sees a part of it; a holder that comes after a crash begins
// again.

// rollback is one under way.
type rollback struct {
	todo     []byte
	listing  bool
	listedTo int64
	nextTry  time.Duration
	cursor   int64
	chunks   int
	done     int64
	total    int64
	flushing bool
	flushed  bool
}

// due tells whether the record asks for a rollback that is not recorded as done.
func (*rollback) due(v *argonv1.Volume) bool { return v.GetRollbackTo() != 0 }

// tryRollback goes on with a rollback that is due.
func (c *Core) tryRollback() {
	r := &c.rollback
	if !r.due(c.volume) || r.flushed || r.flushing {
		return
	}
	s := c.snapshotRecord(c.volume.GetRollbackTo())
	if s.GetState() != argonv1.SnapshotState_SNAPSHOT_STATE_READY {
		c.note(argonv1.Severity_SEVERITY_ERROR, "rollback-failed", fmt.Sprint(c.volume.GetRollbackTo()), "the snapshot to roll back to is gone; the volume is as it was")
		r.flushed = true
		return
	}
	if r.listedTo < c.cfg.Size {
		c.listRollback(s)
		return
	}
	for ; r.chunks < c.cfg.Chunks && r.cursor < c.cfg.Size; r.cursor += c.cfg.Grain {
		if !has(r.todo, r.cursor/c.cfg.Grain) {
			continue
		}
		r.chunks++
		c.submit(&op{
			verb: VerbRevert, who: writers, lock: exclusive, snapshot: s.GetId(),
			off: r.cursor, len: min(c.cfg.Grain, c.cfg.Size-r.cursor), then: c.reverted,
		})
	}
	if r.chunks == 0 && r.cursor >= c.cfg.Size {
		r.flushing = true
		c.submit(&op{verb: VerbFlush, who: members, then: func(*op) { r.flushing, r.flushed = false, true }})
	}
}

// listRollback asks for the next part of what was written since the snapshot.
func (c *Core) listRollback(s *argonv1.Snapshot) {
	r := &c.rollback
	if r.listing || c.now < r.nextTry {
		return
	}
	r.listing = true
	n := min(maxList*c.cfg.Grain, c.cfg.Size-r.listedTo)
	c.submit(&op{
		verb: VerbChanged, generation: s.GetGeneration(), off: r.listedTo, len: n,
		data: make([]byte, wire.BitBytes(n, c.cfg.Grain)), read: c.finish, then: c.rollbackListed,
	})
}

func (c *Core) rollbackListed(o *op) {
	r := &c.rollback
	r.listing = false
	if o.err != nil {
		r.nextTry = c.now + c.cfg.RetryAfter
		return
	}
	for _, b := range o.data {
		r.total += int64(bits.OnesCount8(b)) * c.cfg.Grain
	}
	r.todo, r.listedTo = append(r.todo, o.data...), o.off+o.len
}

func (c *Core) reverted(o *op) {
	c.rollback.chunks--
	c.rollback.done += o.len
}

// rollbackRecorded ends a rollback, and lets requests begin.
func (c *Core) rollbackRecorded(snapshot uint32) {
	if snapshot == 0 {
		return
	}
	if s := c.snapshotRecord(snapshot); s != nil {
		c.tell(argonv1.Severity_SEVERITY_INFO, "rolled-back", "the volume is what it was in snapshot %s", s.GetName())
	}
	c.rollback = rollback{}
	c.startBlocked()
}
