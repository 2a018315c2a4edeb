package guard

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// alarm rings at an instant of CLOCK_BOOTTIME. Go's own timers stand still
// while the host sleeps, so that they would ring too late after that; this one
// rings at once when the host wakes.
type alarm struct{ file *os.File }

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("making a timer: %w", err)
	}
	return &alarm{os.NewFile(uintptr(fd), "timerfd")}, nil
}

// set moves it.
func (a *alarm) set(at time.Duration) error {
	conn, err := a.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("setting a timer: %w", err)
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(at.Nanoseconds())}
	var serr error
	if err := conn.Control(func(fd uintptr) {
		serr = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME, &spec, nil)
	}); err != nil {
		serr = err
	}
	if serr != nil {
		return fmt.Errorf("setting a timer: %w", serr)
	}
	return nil
}

// wait returns when it has rung, or was closed.
func (a *alarm) wait() error {
	var expirations [8]byte
	_, err := a.file.Read(expirations[:])
	return err
}

func (a *alarm) close() { _ = a.file.Close() }
