// Package boottime is the clock that leases are counted on.
//
// What lives here: reading CLOCK_BOOTTIME. What must not: timers, and any other
// clock.
package boottime

import (
	"time"

	"golang.org/x/sys/unix"
)

// Now is CLOCK_BOOTTIME, the time since this host was started. Nobody can set
// it, and unlike the monotonic clock it goes on while the host sleeps: the
// clocks of the other servers do not stop then.
func Now() time.Duration {
	var t unix.Timespec
	// It fails only for clocks that do not exist.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return time.Duration(t.Nano())
}
