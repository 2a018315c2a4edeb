package replica

import (
	"math"
	"sync/atomic"
	"time"
)

// stuckAfter is how long a worker that has the turn may wait for the disk before
// another one gets the turn; at most twice that.
const stuckAfter = 100 * time.Millisecond

// turn watches the worker that reads a connection while it carries out what
// should not wait for the disk. If that does wait, another worker must read: a
// holder whose pings are not answered takes the whole replica for lost.
type turn struct {
	lost  func() // gives the turn away
	timer *time.Timer

	step     atomic.Uint64 // odd while an operation is under way
	watching atomic.Bool
	seen     uint64 // the step when it was last looked at
}

func newTurn(lost func()) *turn {
	t := &turn{lost: lost}
	// Its callback uses it, so it is there before it runs.
	t.timer = time.AfterFunc(math.MaxInt64, t.look)
	return t
}

// begin is called before an operation.
func (t *turn) begin() (mark uint64) {
	mark = t.step.Add(1)
	t.watch()
	return mark
}

// end is called after it, and tells whether the worker still has the turn.
func (t *turn) end(mark uint64) (kept bool) { return t.step.CompareAndSwap(mark, mark+1) }

// watch makes sure that somebody looks; while nothing happens nobody does.
func (t *turn) watch() {
	if t.watching.CompareAndSwap(false, true) {
		t.timer.Reset(stuckAfter)
	}
}

func (t *turn) look() {
	s := t.step.Load()
	under := s%2 == 1
	if under && s == t.seen && t.step.CompareAndSwap(s, s+1) {
		t.lost()
	}
	if !under && s == t.seen {
		t.watching.Store(false)
		if t.step.Load() != s {
			t.watch() // an operation began meanwhile
		}
		return
	}
	t.seen = s
	t.timer.Reset(stuckAfter)
}

func (t *turn) stop() { t.timer.Stop() }
