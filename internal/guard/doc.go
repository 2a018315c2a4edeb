// Package guard is the small parent process of a server's daemon and of its
// guests. It outlives the daemon, starts it again when it ends, and ends the
// guests when the server's lease does, whatever state the daemon is in.
//
// What lives here: both ends of the connection between guard and daemon, and
// processes. What must not: what a guest is (hypervisor/), what a lease is
// (cluster/): the guard knows processes and an instant, and keeps nothing on
// disk.
//
// The daemon tells the guard at each renewal of the lease until when guests may
// run. When that instant has passed and no later one came, the guard kills them
// all: by their control groups, so that what they forked and what is stopped goes
// with them, and by their process groups where there are no control groups. If
// the guard itself ends, the kernel kills daemon and guests (PR_SET_PDEATHSIG): a
// guest that nobody would end in time must not run. If it hangs, the daemon kills
// them (fence.go); if neither can, the host's watchdog does (watchdog.go).
package guard

import "errors"

// Errors that callers decide by.
var (
	// ErrDeadline: no guest may run now; the server has no lease.
	ErrDeadline = errors.New("this server has no lease, so no guest may run")
	// ErrExists: a guest of this id runs.
	ErrExists = errors.New("a guest of this id runs already")
	// ErrCannotLimit: this host has nothing to limit guests with.
	ErrCannotLimit = errors.New("this server can't limit processors")
	// ErrOlder: the guard does not understand this.
	ErrOlder = errors.New("the guard is older than the daemon: restart the server as a whole to have a new one")
)
