package guard

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watchdog resets this host unless it is fed: the last resort for guests that
// nobody could end. It is fed as long as no guest runs without a lease; so when
// this process hangs or dies, or a guest can't be killed, the host goes.
type watchdog struct {
	file  *os.File
	every time.Duration
}

const (
	// feedEvery is how often it is fed when it does not say how long it waits.
	feedEvery = time.Second
	// feedsInTime is how many times it is fed in the time that it waits.
	feedsInTime = 4
	// disarm, written last, tells the driver that all is well
	// (Documentation/watchdog/watchdog-api.rst).
	disarm = "V"
)

func openWatchdog(path string) (*watchdog, error) {
	// Not for reading: a pipe in its place needs a reader already.
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the watchdog: %w", err)
	}
	w := &watchdog{file: f, every: feedEvery}
	if seconds, err := timeoutOf(f); err == nil && seconds > 0 {
		w.every = min(w.every, time.Duration(seconds)*time.Second/feedsInTime)
	}
	return w, nil
}

// timeoutOf asks the driver how long it waits.
func timeoutOf(f *os.File) (seconds int, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := conn.Control(func(fd uintptr) { seconds, err = unix.IoctlGetInt(int(fd), unix.WDIOC_GETTIMEOUT) })
	return seconds, errors.Join(err, cerr)
}

// run feeds it until ended is closed, while safe says that it may; then it
// disarms it, if all is well.
func (w *watchdog) run(ended <-chan struct{}, safe func() bool, log *slog.Logger) {
	defer w.file.Close()
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	fed := true
	for {
		ok := safe()
		if ok {
			if _, err := w.file.Write([]byte{0}); err != nil {
				log.Error("the watchdog can't be fed", "err", err)
			}
		} else if fed {
			log.Error("a guest runs without a lease; the watchdog is not fed any more")
		}
		fed = ok
		select {
		case <-tick.C:
		case <-ended:
			if safe() {
				_, _ = w.file.WriteString(disarm)
			}
			return
		}
	}
}
