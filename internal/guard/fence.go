package guard

import (
	"sync"
	"time"
)

// fence is the daemon's own watch over the deadline. The guard's comes first;
// this one is for a guard that stands still. It needs no answer of the guard's:
// it kills the control groups.
type fence struct {
	now   func() time.Duration
	alarm *alarm
	kill  func() error

	mu       sync.Mutex
	deadline time.Duration
}

// fenceAfter is what the guard gets to do it itself: less than the margin that
// every lease has.
const fenceAfter = 50 * time.Millisecond

// extend moves the deadline forward; it never goes back.
func (f *fence) extend(until time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if until <= f.deadline {
		return nil
	}
	f.deadline = until
	return f.alarm.set(until + fenceAfter)
}

// lower moves the deadline back if it is later.
func (f *fence) lower(until time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if until >= f.deadline {
		return nil
	}
	f.deadline = until
	return f.alarm.set(until + fenceAfter)
}

// enforce kills all guests if the deadline has passed. That it fails is for the
// guard to tell, and the watchdog to end.
func (f *fence) enforce() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now() >= f.deadline+fenceAfter {
		_ = f.kill()
	}
}
