package guard

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	// Final is the exit code of a daemon that would end so again: none follows.
	Final int
	// StopTimeout is how long the daemon may take for its machines when it is
	// stopped, before it detaches its volumes.
	StopTimeout time.Duration
	// Output gets what the daemon prints; nil: it goes where the guard's does.
	Output io.Writer
	Log    *slog.Logger
}

// ExitError says that the daemon could not start at all, or can't go on: its own
// last words are all that the user needs to see.
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
	knows     = "about,limit,user,keep,lower,status"
	// keptName has the names of what was kept for the daemon, as JSON; the
	// descriptors follow childFD.
	keptName = "ARGON_GUARD_KEPT"

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
// the daemon ends before one has ever started, or for good.
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
	g := &guard{opts: o, thread: t, manager: manager{o.Log}}
	defer context.AfterFunc(ctx, g.manager.stopping)()
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
	g.shelf.close()
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
	opts    Options
	thread  *thread
	guests  *guests
	shelf   shelf
	manager manager

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
		asked, err := g.runDaemonUntilAsked(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if asked {
			g.opts.Log.Info("the daemon is started anew, as asked")
			continue
		}
		exit := (*exec.ExitError)(nil)
		ended := errors.As(err, &exit) && exit.Exited()
		started := g.everStarted()
		switch {
		case ended && (!started || exit.ExitCode() == g.opts.Final):
			return &ExitError{Code: exit.ExitCode()}
		case err != nil && exit == nil && !started:
			return err
		}
		if time.Since(began) > longRun {
			pause = firstPause
		}
		g.manager.status(false, "the daemon has ended; it is started again")
		g.opts.Log.Error("the daemon has ended; it is started again", "err", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, longestPause)
	}
}

// errAsked: a new daemon was asked for.
var errAsked = errors.New("a new daemon was asked for")

// runDaemonUntilAsked runs a daemon until it ends, a new one is asked for, or ctx
// ends.
func (g *guard) runDaemonUntilAsked(ctx context.Context) (asked bool, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		select {
		case <-g.opts.Restart:
			g.manager.reloading()
			stop(errAsked)
		case <-ctx.Done():
		}
	})
	err = g.runDaemon(ctx)
	stop(nil)
	waiting.Wait()
	return errors.Is(context.Cause(ctx), errAsked), err
}

// runDaemon runs a daemon until it ends, or ctx does.
func (g *guard) runDaemon(ctx context.Context) error {
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	cmd := exec.Command(g.opts.Daemon[0], g.opts.Daemon[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if g.opts.Output != nil {
		cmd.Stdout, cmd.Stderr = g.opts.Output, g.opts.Output
		// What a daemon has started may outlive it, and hold its end of the pipe.
		cmd.WaitDelay = time.Second
	}
	names, files := g.shelf.all()
	cmd.ExtraFiles = append([]*os.File{theirs}, files...) // becomes childFD and what follows
	cmd.Env = append(guestEnv(os.Environ()), fdName+"="+strconv.Itoa(childFD), knowsName+"="+knows, keptName+"="+names)
	// A group of its own: a terminal's ctrl-C is for the guard, which stops the
	// daemon in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	err = g.thread.do(cmd.Start)
	_ = theirs.Close()
	if err != nil {
		return errors.Join(fmt.Errorf("starting the daemon: %w", err), ours.Close())
	}

	c := &conn{nc: ours, guests: g.guests, shelf: &g.shelf, ready: g.ready, manager: g.manager}
	g.mu.Lock()
	g.current = c
	g.mu.Unlock()
	ended := make(chan struct{})
	var serving sync.WaitGroup
	serving.Go(func() {
		err := c.serve(context.WithoutCancel(ctx))
		select {
		case <-ended: // and with it the connection
			return
		default:
		}
		if err != nil {
			// It can't be led any more: a new one can.
			g.opts.Log.Error("the daemon sends what it should not", "err", err)
			_ = cmd.Process.Kill()
		}
	})
	serving.Go(func() { stopWhenDone(ctx, cmd.Process, g.opts.StopTimeout, ended) })
	err = cmd.Wait()
	close(ended)
	_ = ours.Close()
	serving.Wait()
	return err
}

// stopWhenDone asks the daemon to stop when ctx ends, and then insists. SIGHUP
// tells it that another one follows, which finds the guests that run now.
func stopWhenDone(ctx context.Context, p *os.Process, machines time.Duration, ended <-chan struct{}) {
	select {
	case <-ctx.Done():
	case <-ended:
		return
	}
	how := unix.SIGTERM
	if errors.Is(context.Cause(ctx), errAsked) {
		how, machines = unix.SIGHUP, 0
	}
	_ = p.Signal(how) // it may have ended already
	select {
	case <-time.After(machines + stopTimeout):
		_ = p.Kill()
	case <-ended:
	}
}

// socketPair makes a connection: the guard's end, and the one to hand down.
func socketPair() (*net.UnixConn, *os.File, error) {
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
func connOf(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "guard connection")
	defer f.Close()
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("using the connection between guard and daemon: %w", err)
	}
	unixConn, ok := nc.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("the connection between guard and daemon is no unix socket"), nc.Close())
	}
	return unixConn, nil
}
