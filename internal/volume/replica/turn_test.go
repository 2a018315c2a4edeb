package replica

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var losses atomic.Int32
		turn := newTurn(func() { losses.Add(1) })
		for range 100 {
			mark := turn.begin()
			time.Sleep(stuckAfter * 3 / 4)
			if !turn.end(mark) {
				t.Fatal("lost though it came back in time")
			}
		}
		for range 2 {
			mark := turn.begin()
			time.Sleep(10 * stuckAfter)
			if turn.end(mark) {
				t.Error("kept though it was stuck")
			}
		}
		if n := losses.Load(); n != 2 {
			t.Errorf("given away %d times, want 2", n)
		}
		time.Sleep(10 * stuckAfter)
		if turn.watching.Load() {
			t.Error("watched though nothing happens")
		}
		// The next is watched again.
		mark := turn.begin()
		time.Sleep(10 * stuckAfter)
		if turn.end(mark) {
			t.Error("kept though it was stuck, after a rest")
		}
		turn.stop()
	})
}
