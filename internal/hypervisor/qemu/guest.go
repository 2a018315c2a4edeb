package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
)

// guest is one QEMU; see hypervisor.Guest.
type guest struct {
	id, dir  string
	spoolDir string
	pid      int
	launcher Launcher
	done     <-chan struct{}
	console  *console
	// agent and screen are held by who uses them, dialling by who connects to the
	// monitor: one at a time.
	agent, screen, dialling chan struct{}
	// news has something when a transfer of the guest's state has changed, or a
	// device has gone.
	news chan struct{}
	// noWayOut is Options.NoWayOut.
	noWayOut bool

	mu  sync.Mutex
	qmp *qmp.Client // nil: let go of
	// pausedAt is when it was told to stand still last.
	pausedAt time.Time
	// spool is where its memory is to be saved; nil: not got ready.
	spool *os.File
}

func (g *guest) ID() string            { return g.id }
func (g *guest) PID() int              { return g.pid }
func (g *guest) Done() <-chan struct{} { return g.done }

// letGo ends the connection to the monitor.
func (g *guest) letGo() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.qmp != nil {
		_ = g.qmp.Close()
		g.qmp = nil
	}
	if g.spool != nil {
		_ = g.spool.Close()
		g.spool = nil
	}
}

// execute runs a command of the monitor.
func (g *guest) execute(ctx context.Context, command string, result any) error {
	return g.executeWith(ctx, command, nil, result)
}

// executeWith runs a command that has arguments.
func (g *guest) executeWith(ctx context.Context, command string, args, result any) error {
	client, err := g.monitor(ctx)
	if err == nil {
		err = client.Execute(ctx, command, args, result)
	}
	if err != nil {
		return fmt.Errorf("guest %s: %w", g.id, err)
	}
	return nil
}

var errGone = errors.New("it is gone")

// monitor is the connection, made anew if it broke while the guest runs on. That may
// take as long as ctx lets it, where QEMU hangs: others wait no longer than their own
// lets them.
func (g *guest) monitor(ctx context.Context) (*qmp.Client, error) {
	if client, err := g.connected(); client != nil || err != nil {
		return client, err
	}
	select {
	case g.dialling <- struct{}{}:
		defer func() { <-g.dialling }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for QEMU's monitor: %w", ctx.Err())
	}
	if client, err := g.connected(); client != nil || err != nil {
		return client, err // somebody else has made it
	}
	client, err := dialMonitor(ctx, g.dir, g.pid, g.done, heard(g.news))
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.qmp == nil {
		return nil, errors.Join(errGone, client.Close())
	}
	_ = g.qmp.Close()
	g.qmp = client
	return client, nil
}

// connected is the connection if it is there; nil if it broke.
func (g *guest) connected() (*qmp.Client, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.qmp == nil {
		return nil, errGone
	}
	select {
	case <-g.qmp.Done():
		return nil, nil
	default:
		return g.qmp, nil
	}
}

// statusTimeout bounds how long QEMU may take to say how its guest does.
const statusTimeout = time.Second

// Status implements hypervisor.Guest. A QEMU that says nothing may be busy, or may
// stand still itself.
func (g *guest) Status(ctx context.Context) (hypervisor.Status, error) {
	bounded, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	s, err := g.status(bounded)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil && isStopped(g.pid) {
		return hypervisor.Status{State: hypervisor.Halted, Detail: "stopped by a signal"}, nil
	}
	return s, err
}

// isStopped reports whether a signal has stopped all threads of a process (state T
// of proc_pid_stat(5)). Threads that a debugger holds are in another state.
func isStopped(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if err != nil {
			return false
		}
		// The name before it, in brackets, may hold anything.
		_, after, _ := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " ")
		if !strings.HasPrefix(after, "T ") {
			return false
		}
	}
	return true
}

func (g *guest) status(ctx context.Context) (hypervisor.Status, error) {
	var answer struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	if err := g.execute(ctx, "query-status", &answer); err != nil {
		return hypervisor.Status{}, err
	}
	return hypervisor.Status{State: runState(answer.Status), Detail: answer.Status}, nil
}

// runState translates QEMU's RunState (qapi/run-state.json).
func runState(s string) hypervisor.RunState {
	switch s {
	case "running", "suspended": // asleep by its own will
		return hypervisor.Running
	case "shutdown":
		return hypervisor.ShutDown
	case "inmigrate":
		return hypervisor.Receiving
	case "finish-migrate":
		return hypervisor.Leaving
	case "postmigrate":
		return hypervisor.Left
	}
	return hypervisor.Paused
}

// Resume implements hypervisor.Guest. A disk that waits in an I/O error tries
// again.
func (g *guest) Resume(ctx context.Context) error { return g.execute(ctx, "cont", nil) }

// Reset implements hypervisor.Guest.
func (g *guest) Reset(ctx context.Context) error { return g.execute(ctx, "system_reset", nil) }

// Kill implements hypervisor.Guest.
func (g *guest) Kill(ctx context.Context) error {
	if err := g.launcher.Kill(ctx, g.id); err != nil {
		return fmt.Errorf("guest %s: %w", g.id, err)
	}
	return nil
}

// Console implements hypervisor.Guest.
func (g *guest) Console(context.Context) (io.ReadWriteCloser, error) { return g.console.open() }
