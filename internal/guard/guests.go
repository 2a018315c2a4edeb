package guard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/cgroup"
)

// Process is what to run as a guest.
type Process struct {
	// ID names the guest: one process per id at a time.
	ID   string   `json:"id"`
	Path string   `json:"path"`
	Args []string `json:"args"`
	// Dir is its working directory.
	Dir string `json:"dir"`
	// LogPath is the file that its output is appended to.
	LogPath string `json:"log_path"`
	// User is whom it runs as, and Groups whose rights it has besides; 0: the
	// guard's own.
	User   uint32        `json:"user,omitempty"`
	Groups []uint32      `json:"groups,omitempty"`
	Limits cgroup.Limits `json:"limits,omitzero"`
}

// Running is a guest that runs.
type Running struct {
	ID  string `json:"id"`
	PID int    `json:"pid"`
}

// guests is every guest of this server, and until when they may run. Safe for
// concurrent use.
type guests struct {
	now    func() time.Duration
	thread *thread
	groups *cgroup.Tree
	alarm  alarmSetter
	log    *slog.Logger
	wg     sync.WaitGroup

	mu       sync.Mutex
	deadline time.Duration
	closed   bool // no more starts
	byID     map[string]*guest
	// told is called, unlocked, for each guest that has ended.
	told func(id string)
}

// alarmSetter is an alarm, as far as guests use it.
type alarmSetter interface {
	set(at time.Duration) error
}

// guest is one process with what it has started; without a pid it is being
// started, or its process has ended and the rest is being ended.
type guest struct {
	pid  int
	gone chan struct{}
	// group is nil where there are no control groups.
	group *cgroup.Group
	// doomed: it was to be killed while it was being started.
	doomed bool
}

// extend moves the deadline forward; it never goes back.
func (g *guests) extend(until time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if until <= g.deadline {
		return nil
	}
	g.deadline = until
	return g.alarm.set(until)
}

// lower moves the deadline back if it is later: the lease that follows a long one
// is shorter.
func (g *guests) lower(until time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if until >= g.deadline {
		return nil
	}
	g.deadline = until
	return g.alarm.set(until)
}

// enforce kills all guests if the deadline has passed.
func (g *guests) enforce() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.now() < g.deadline || len(g.byID) == 0 {
		return
	}
	g.log.Warn("the lease has ended; killing all guests", "guests", len(g.byID))
	g.killAll()
}

// fenced tells whether no guest runs that should not: what a watchdog is fed
// for.
func (g *guests) fenced() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.byID) == 0 || g.now() < g.deadline
}

// about is what the daemon is told of the control groups.
func (g *guests) about() *About {
	a := &About{Text: g.groups.Describe(), Groups: g.groups.Dirs()}
	a.CPU, a.Memory = g.groups.Limits()
	return a
}

// limit changes the limits of processors of a guest that runs.
func (g *guests) limit(id string, l cgroup.Limits) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	one := g.byID[id]
	switch {
	case one == nil || one.pid == 0:
		return fmt.Errorf("guest %s does not run", id)
	case !canLimit(g.groups):
		if l == (cgroup.Limits{}) {
			return nil
		}
		return fmt.Errorf("%w: it has %s", ErrCannotLimit, g.groups.Describe())
	}
	return one.group.SetProcessors(l)
}

func canLimit(t *cgroup.Tree) bool {
	processors, _ := t.Limits()
	return processors
}

// killAll sends the signals; the caller holds mu. All groups at once first: a
// thousand guests must not end one after the other.
func (g *guests) killAll() {
	if err := g.groups.KillAll(); err != nil {
		g.log.Error("the guests' control groups can't be killed", "err", err)
	}
	for id, one := range g.byID {
		if one.pid != 0 { // else start finds out itself
			g.signal(id, one)
		}
	}
}

// signal kills a guest and what it has started: all of its control group, and,
// where there is none or it fails, its process group. Its pid is its own until it
// was waited for, which the caller excludes by holding mu.
func (g *guests) signal(id string, one *guest) {
	if one.group != nil {
		if err := one.group.Kill(); err != nil {
			g.log.Error("a guest's control group can't be killed", "guest", id, "err", err)
		}
	}
	if err := unix.Kill(-one.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		g.log.Error("a guest can't be killed", "guest", id, "pid", one.pid, "err", err)
	}
}

// start runs a process in a place that was reserved for it. The deadline was looked
// at before, and is again once the process is there: no guest may outlive it.
func (g *guests) start(p Process, one *guest) (pid int, err error) {
	cmd, err := g.spawn(p, one)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		delete(g.byID, p.ID)
		close(one.gone)
		return 0, err
	}
	one.pid = cmd.Process.Pid
	g.wg.Go(func() { g.wait(p.ID, one, cmd) })
	switch {
	case one.doomed:
		g.signal(p.ID, one)
		return 0, fmt.Errorf("guest %s was killed while it was being started", p.ID)
	case g.closed || g.now() >= g.deadline:
		g.signal(p.ID, one)
		return 0, ErrDeadline
	}
	return one.pid, nil
}

// reserve makes a guest's place, if it may be started. From then on it can be
// killed.
func (g *guests) reserve(id string) (*guest, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case id == "":
		return nil, errors.New("a guest needs an id")
	case g.byID[id] != nil:
		return nil, ErrExists
	case g.closed || g.now() >= g.deadline:
		return nil, ErrDeadline
	}
	one := &guest{gone: make(chan struct{})}
	g.byID[id] = one
	return one, nil
}

// spawn starts a guest's process in a control group of its own.
func (g *guests) spawn(p Process, one *guest) (_ *exec.Cmd, err error) {
	log, err := os.OpenFile(p.LogPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of guest %s: %w", p.ID, err)
	}
	defer log.Close()
	cmd := exec.Command(p.Path, p.Args...)
	cmd.Dir, cmd.Env = p.Dir, guestEnv(os.Environ())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if p.User != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: p.User, Gid: p.User, Groups: p.Groups}
	}
	if one.group, err = g.group(p); err != nil {
		return nil, fmt.Errorf("starting guest %s: %w", p.ID, err)
	}
	start := cmd.Start
	if one.group != nil {
		start = func() error { return one.group.Start(cmd.SysProcAttr, cmd.Start) }
	}
	if err := g.thread.do(start); err != nil {
		if one.group != nil {
			err = errors.Join(err, one.group.End())
		}
		return nil, fmt.Errorf("starting guest %s: %w", p.ID, err)
	}
	return cmd, nil
}

// group makes a guest's control group; nil where there are none.
func (g *guests) group(p Process) (*cgroup.Group, error) {
	if !g.groups.Usable() {
		return nil, nil
	}
	group, err := g.groups.Make(p.ID)
	if err != nil {
		return nil, err
	}
	if err := group.Set(p.Limits); err != nil {
		return nil, errors.Join(err, group.End())
	}
	return group, nil
}

// guestEnv is the guard's own environment without what is for the daemon.
func guestEnv(env []string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if !slices.Contains([]string{fdName, knowsName, keptName, notifyName}, name) {
			kept = append(kept, e)
		}
	}
	return kept
}

// wait reaps a guest and ends what it left. Its pid may be another's once Wait has returned, so that
// must not overlap with a signal: first it is only seen to have ended.
func (g *guests) wait(id string, one *guest, cmd *exec.Cmd) {
	for {
		err := unix.Waitid(unix.P_PID, one.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	g.mu.Lock()
	pid := one.pid
	one.pid = 0
	_ = cmd.Wait() // how a guest ends is for its monitor to say
	g.mu.Unlock()
	// What it has started ends with it: only then may it run again.
	if one.group != nil {
		if err := one.group.End(); err != nil {
			g.log.Error("what a guest has started can't be ended", "guest", id, "err", err)
		}
	}
	g.mu.Lock()
	delete(g.byID, id)
	g.mu.Unlock()
	g.log.Info("a guest has ended", "guest", id, "pid", pid, "how", cmd.ProcessState.String())
	close(one.gone)
	g.told(id)
}

// kill ends a guest and returns when it is gone. One that is not there is gone.
func (g *guests) kill(ctx context.Context, id string) error {
	g.mu.Lock()
	one := g.byID[id]
	switch {
	case one == nil:
	case one.pid == 0:
		one.doomed = true
	default:
		g.signal(id, one)
	}
	g.mu.Unlock()
	if one == nil {
		return nil
	}
	select {
	case <-one.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the end of guest %s: %w", id, ctx.Err())
	}
}

func (g *guests) list() []Running {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := []Running{}
	for id, one := range g.byID {
		if one.pid != 0 {
			list = append(list, Running{ID: id, PID: one.pid})
		}
	}
	return list
}

// close kills all guests for good and waits until they are gone.
func (g *guests) close() {
	g.mu.Lock()
	g.closed = true
	g.killAll()
	g.mu.Unlock()
	g.wg.Wait()
}
