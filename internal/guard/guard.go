package guard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/boottime"
	"github.com/argon-cluster/argon/internal/cgroup"
)

// Options are what a guard is started with.
type Options struct {
	// Daemon is the daemon's program and arguments.
	Daemon []string
	// Groups say how the guests' control groups are made.
	Groups cgroup.Options
	// Watchdog is the device that resets this host when it is not fed; empty:
	// none.
	Watchdog string
	// Restart asks for a new daemon in the place of the one that runs, such as
	// after an upgrade; guests run on.
	Restart <-chan os.Signal
	Log     *slog.Logger
}

// ExitError says that the daemon could not start at all: its own last words
// are all that the user needs to see.
type ExitError struct{ Code int }

func (e *ExitError) Error() string { return fmt.Sprintf("the daemon ended with code %d", e.Code) }

const (
	// fdName is the environment variable that tells the daemon its end of the
	// connection, and childFD is that.
	fdName  = "ARGON_GUARD_FD"
	childFD = 3
	// knowsName tells what else than at the beginning the guard understands:
	// after an upgrade the daemon is newer than it.
	knowsName = "ARGON_GUARD_KNOWS"
	knows     = "about,limit,user"

	// stopTimeout is how long a daemon may take to detach its volumes.
	stopTimeout = 10 * time.Second
	// firstPause and longestPause bound the growing pauses between the starts
	// of a daemon that keeps ending; one that ran for longRun begins anew.
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
	longRun      = time.Minute
)

// Run runs the daemon, again whenever it ends, and its guests, until ctx ends:
// then it stops the daemon and kills the guests. It returns an *ExitError when
// the daemon ends before one has ever started.
func Run(ctx context.Context, o Options) error {
	groups, err := cgroup.Open(o.Groups)
	if err != nil {
		return err
	}
	defer groups.Close()
	ring, err := newAlarm()
	if err != nil {
		return err
	}
	t := newThread()
	defer t.close()
	g := &guard{opts: o, thread: t}
	g.guests = &guests{
		now: boottime.Now, thread: t, groups: groups, alarm: ring, log: o.Log, byID: map[string]*guest{}, told: g.exited,
	}
	o.Log.Info("guests are ended and limited by " + groups.Describe())
	var watching sync.WaitGroup
	watching.Go(func() {
		for ring.wait() == nil {
			g.guests.enforce()
		}
	})
	err = g.watched(ctx)
	g.guests.close()
	ring.close()
	watching.Wait()
	return err
}

// watched runs the daemon while the watchdog, if there is one, is fed.
func (g *guard) watched(ctx context.Context) error {
	if g.opts.Watchdog == "" {
		return g.keepDaemon(ctx)
	}
	dog, err := openWatchdog(g.opts.Watchdog)
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	var feeding sync.WaitGroup
	feeding.Go(func() { dog.run(ended, g.guests.fenced, g.opts.Log) })
	err = g.keepDaemon(ctx)
	g.guests.close()
	close(ended)
	feeding.Wait()
	return err
}

// guard is one running guard.
type guard struct {
	opts   Options
	thread *thread
	guests *guests

	mu      sync.Mutex
	current *conn
	started bool // a daemon has started once
}

// exited tells the daemon that a guest has ended.
func (g *guard) exited(id string) {
	g.mu.Lock()
	c := g.current
	g.mu.Unlock()
	if c != nil {
		c.send(answer{Exited: id})
	}
}

func (g *guard) ready() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.started = true
}

func (g *guard) everStarted() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.started
}

// keepDaemon runs one daemon after the other.
func (g *guard) keepDaemon(ctx context.Context) error {
	pause := firstPause
	for {
		began := time.Now()
		err, asked := g.runDaemonUntilAsked(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if asked {
			g.opts.Log.Info("the daemon is started anew, as asked")
			continue
		}
		if exit := (*exec.ExitError)(nil); !g.everStarted() {
			if errors.As(err, &exit) && exit.Exited() {
				return &ExitError{Code: exit.ExitCode()}
			}
			if err != nil && exit == nil {
				return err
			}
		}
		if time.Since(began) > longRun {
			pause = firstPause
		}
		g.opts.Log.Error("the daemon has ended; it is started again", "err", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, longestPause)
	}
}

// runDaemonUntilAsked runs a daemon until it ends, a new one is asked for, or ctx
// ends.
func (g *guard) runDaemonUntilAsked(ctx context.Context) (err error, asked bool) {
	ctx, stop := context.WithCancel(ctx)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		select {
		case <-g.opts.Restart:
			asked = true
			stop()
		case <-ctx.Done():
		}
	})
	err = g.runDaemon(ctx)
	stop()
	waiting.Wait()
	return err, asked
}

// runDaemon runs a daemon until it ends, or ctx does.
func (g *guard) runDaemon(ctx context.Context) error {
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	cmd := exec.Command(g.opts.Daemon[0], g.opts.Daemon[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs} // becomes childFD
	cmd.Env = append(guestEnv(os.Environ()), fdName+"="+strconv.Itoa(childFD), knowsName+"="+knows)
	// A group of its own: a terminal's ctrl-C is for the guard, which stops the
	// daemon in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	err = g.thread.do(cmd.Start)
	_ = theirs.Close()
	if err != nil {
		return errors.Join(fmt.Errorf("starting the daemon: %w", err), ours.Close())
	}

	c := &conn{nc: ours, guests: g.guests, ready: g.ready}
	g.mu.Lock()
	g.current = c
	g.mu.Unlock()
	ended := make(chan struct{})
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := c.serve(context.WithoutCancel(ctx)); err != nil {
			// It can't be led any more: a new one can.
			g.opts.Log.Error("the daemon sends what it should not", "err", err)
			_ = cmd.Process.Kill()
		}
	})
	serving.Go(func() { stopWhenDone(ctx, cmd.Process, ended) })
	err = cmd.Wait()
	close(ended)
	_ = ours.Close()
	serving.Wait()
	return err
}

// stopWhenDone asks the daemon to stop when ctx ends, and then insists.
func stopWhenDone(ctx context.Context, p *os.Process, ended <-chan struct{}) {
	select {
	case <-ctx.Done():
	case <-ended:
		return
	}
	_ = p.Signal(unix.SIGTERM) // it may have ended already
	select {
	case <-time.After(stopTimeout):
		_ = p.Kill()
	case <-ended:
	}
}

// socketPair makes a connection: the guard's end, and the one to hand down.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a connection for the daemon: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "guard connection")
	ours, err := connOf(fds[0])
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}

// connOf makes a connection of a socket, which it owns.
func connOf(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "guard connection")
	defer f.Close()
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("using the connection between guard and daemon: %w", err)
	}
	return nc, nil
}
