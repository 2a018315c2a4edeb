package sim

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// Options choose a run. The same options give the same run.
type Options struct {
	Seed uint64
	// Length is how long faults happen, in the world's time [20 s].
	Length time.Duration
	// Break and Hooks switch rules off, in the holder and in the replicas.
	Break mirror.Breakage
	Hooks replica.Hooks
	// BreakLate has a replica that is made late pass for one that was in the set.
	BreakLate bool
	// Trace keeps what happened, for a reader.
	Trace bool
}

// Result is what a run came to.
type Result struct {
	// Violation is what the checker found; nil if the promise was kept.
	Violation error
	Trace     []string
	// Operations that were answered, attachments, faults that were made.
	Operations, Attachments, Faults int
	// Copies of a whole volume, and of what had changed.
	Whole, Partial int
	// What operators wanted and got.
	Snapshots, Rollbacks, Grown, Scrubs, Retired, Detached, Late int
}

// world is everything there is. One goroutine, one clock, one source of
// chance.
type world struct {
	opts  Options
	rng   *rand.Rand
	now   time.Duration
	queue eventQueue
	seq   int

	servers []*server
	cut     map[[2]int]bool // from, to: nothing gets through
	catalog *catalog
	holders []*holder
	current *holder
	quiet   bool // the faults are over
	// kept are the snapshots that were wanted; rollback are the writes that one
	// under way is to the checker.
	kept     map[uint32]*kept
	rollback []opID
	// fewer: replicas are asked to leave now and then.
	fewer bool
	// based: the volume begins with an image.
	based bool
	// late is the replica that is made of the image while the volume is used
	// already; 0: none is to be.
	late uint32
	// rotten: a disk changed what was written to it.
	rotten bool
	// untidy: no server gives back what deleted snapshots took.
	untidy bool
	// think is the longest that a client thinks. Where it is long, few regions
	// are written between two rolls.
	think time.Duration

	checker   *Checker
	values    value
	violation error
	stats     Result
}

type event struct {
	at  time.Duration
	seq int
	do  func()
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

// after lets something happen after d.
func (w *world) after(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.queue, event{at: w.now + d, seq: w.seq, do: do})
}

// between is a random duration.
func (w *world) between(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(w.rng.Int64N(int64(hi-lo)))
}

func (w *world) chance(p float64) bool { return w.rng.Float64() < p }

// run lets everything happen until the time, or until stop says so.
func (w *world) run(until time.Duration, stop func() bool) {
	for w.violation == nil && len(w.queue) > 0 && w.queue[0].at <= until && !stop() {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		e.do()
	}
	if w.now < until && !stop() {
		w.now = until
	}
}

func (w *world) trace(format string, args ...any) {
	if w.opts.Trace {
		w.stats.Trace = append(w.stats.Trace, fmt.Sprintf("%10s ", w.now.Round(time.Microsecond))+fmt.Sprintf(format, args...))
	}
}

func (w *world) fail(format string, args ...any) {
	if w.violation == nil {
		w.violation = fmt.Errorf(format, args...)
		w.trace("VIOLATION %v", w.violation)
	}
}

// delay is how long a message takes.
func (w *world) delay() time.Duration {
	if w.chance(0.02) {
		return w.between(time.Millisecond, 300*time.Millisecond)
	}
	return w.between(20*time.Microsecond, 2*time.Millisecond)
}

// reachable tells whether messages get from one server to another.
func (w *world) reachable(from, to int) bool { return from == to || !w.cut[[2]int{from, to}] }

// catalog is the cluster's record of the volume: linearizable, slow at times,
// away at times.
type catalog struct {
	w        *world
	volume   *argonv1.Volume
	revision int64
	away     bool
}

const catalogPause = 200 * time.Millisecond

// update changes the record as mirror.Catalog says: it is tried until the
// outcome is known, as long as alive says so. An answer may get lost after the
// change was made.
func (c *catalog) update(alive func() bool, change func(*argonv1.Volume) error, then func(*argonv1.Volume, error)) {
	w := c.w
	w.after(w.between(time.Millisecond, 30*time.Millisecond), func() {
		if !alive() {
			return
		}
		if c.away {
			w.after(catalogPause, func() { c.update(alive, change, then) })
			return
		}
		v := proto.CloneOf(c.volume)
		err := change(v)
		if err == nil {
			c.commit(v)
		}
		if w.chance(0.1) {
			w.after(catalogPause, func() { c.update(alive, change, then) })
			return
		}
		w.after(w.delay(), func() {
			if alive() {
				then(proto.CloneOf(v), err)
			}
		})
	})
}

// get reads the record.
func (c *catalog) get(alive func() bool, then func(*argonv1.Volume)) {
	c.update(alive, func(*argonv1.Volume) error { return errReadOnly }, func(_ *argonv1.Volume, _ error) {
		then(proto.CloneOf(c.volume))
	})
}

// alter changes the record at once, as somebody else than a holder does.
func (c *catalog) alter(change func(*argonv1.Volume)) {
	v := proto.CloneOf(c.volume)
	change(v)
	c.commit(v)
}

var errReadOnly = fmt.Errorf("read only")

// commit makes v the record, and tells the holders, some time.
func (c *catalog) commit(v *argonv1.Volume) {
	c.revision++
	v.Meta.Revision = c.revision
	before := c.volume
	c.w.settled(before, v)
	c.volume = v
	c.w.follow(before, v)
	for _, s := range c.w.servers {
		c.w.after(c.w.between(time.Millisecond, 500*time.Millisecond), func() { s.observe(v) })
	}
	for _, h := range c.w.holders {
		c.w.after(c.w.between(time.Millisecond, 500*time.Millisecond), func() { h.observe(v) })
	}
}

// settled notes which replicas begin anew in the in-sync set: what they lost
// before does not count any more.
func (w *world) settled(before, after *argonv1.Volume) {
	for _, r := range after.GetReplicas() {
		was := before.GetReplicas()[r.GetId()-1]
		if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC &&
			(was.GetState() != r.GetState() || was.GetIncarnation() != r.GetIncarnation()) {
			w.servers[r.GetId()-1].lostPower = false
		}
	}
	w.trace("catalog: epoch %d%s%s", after.GetEpoch(), replicaStates(after), cleanWord(after))
}

func cleanWord(v *argonv1.Volume) string {
	if v.GetClean() {
		return " clean"
	}
	return ""
}

func replicaStates(v *argonv1.Volume) string {
	s := ""
	for _, r := range v.GetReplicas() {
		s += fmt.Sprintf(" %d:%s/%d", r.GetId(), r.GetState().String()[len("REPLICA_STATE_"):], r.GetIncarnation())
	}
	return s
}
