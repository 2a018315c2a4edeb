package e2e_test

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// asUser does something with the rights that a user has to files. The thread is
// thrown away: it never gets all of its own rights back.
func asUser(user int, do func() error) error {
	runtime.LockOSThread() // and never unlocked
	for _, call := range []struct {
		number, argument uintptr
	}{{unix.SYS_SETGROUPS, 0}, {unix.SYS_SETRESGID, uintptr(user)}, {unix.SYS_SETRESUID, uintptr(user)}} {
		// The raw calls: those of package syscall are for all threads.
		if _, _, errno := unix.RawSyscall(call.number, call.argument, call.argument, call.argument); errno != 0 {
			return fmt.Errorf("becoming user %d: %w", user, errno)
		}
	}
	return do()
}
