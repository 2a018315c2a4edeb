package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
)

// DefaultBinary is QEMU's program for guests of this kind.
const DefaultBinary = "qemu-system-x86_64"

// Options are what a Monitor needs.
type Options struct {
	// Binary is QEMU; empty: DefaultBinary.
	Binary   string
	Launcher Launcher
	// Dir is the directory of a guest.
	Dir func(guestID string) string
	// Credential is what the probe runs guests with; nil: this process's. It
	// should be what real ones have.
	Credential *syscall.Credential
	// SpoolDir is where the memory of guests is kept while it is saved, in files
	// without names: as large as the guest's. Empty: the system's.
	SpoolDir string
	// NoWayOut: guests' networks lead nowhere but to their published ports. QEMU
	// would lead them to this host's loopback addresses, too.
	NoWayOut bool
	Log      *slog.Logger
}

// Monitor runs guests with QEMU; see hypervisor.Monitor. Safe for concurrent
// use.
type Monitor struct {
	opts Options
	// ctx ends with Close; wg has what runs on behalf of guests.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// New makes a Monitor.
func New(o Options) *Monitor {
	if o.Binary == "" {
		o.Binary = DefaultBinary
	}
	m := &Monitor{opts: o}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// Close lets go of all guests; they run on.
func (m *Monitor) Close() {
	m.cancel()
	m.wg.Wait()
}

// binary finds QEMU.
func (m *Monitor) binary() (string, error) {
	path, err := exec.LookPath(m.opts.Binary)
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%s was not found: install QEMU (Debian: qemu-system-x86), or name it with `argon server --qemu`", m.opts.Binary)
	}
	if err != nil {
		return "", fmt.Errorf("looking for QEMU: %w", err)
	}
	return path, nil
}

// Start implements hypervisor.Monitor.
func (m *Monitor) Start(ctx context.Context, spec hypervisor.Spec) (hypervisor.Guest, error) {
	ctx, cancel := context.WithTimeout(ctx, hypervisor.StartTimeout)
	defer cancel()
	g, err := m.launch(ctx, spec)
	if err != nil {
		return nil, err
	}
	if spec.Incoming {
		err = g.receive(ctx)
	} else {
		err = g.Resume(ctx)
	}
	if err != nil {
		return nil, m.giveUp(ctx, spec, err)
	}
	return g, nil
}

// launch starts QEMU, with arguments beyond those of every guest, and connects
// to it. Nothing is left behind on an error.
func (m *Monitor) launch(ctx context.Context, spec hypervisor.Spec, more ...string) (*guest, error) {
	path, err := m.binary()
	if err != nil {
		return nil, err
	}
	args, err := commandLine(spec, m.opts.NoWayOut)
	if err != nil {
		return nil, err
	}
	pid, err := m.opts.Launcher.Start(ctx, Process{
		ID: spec.ID, Path: path, Args: append(args, more...), Dir: spec.Dir, LogPath: ownLog(spec.Dir), Limits: limits(spec),
	})
	if err != nil {
		// It may run all the same: nobody has heard how that went.
		return nil, m.giveUp(ctx, spec, fmt.Errorf("starting QEMU: %w", err))
	}
	g, err := m.takeUp(ctx, spec.ID, pid)
	if err != nil {
		return nil, m.giveUp(ctx, spec, err)
	}
	return g, nil
}

// giveUp ends a guest that can't be used, and returns why.
func (m *Monitor) giveUp(ctx context.Context, spec hypervisor.Spec, why error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
	defer cancel()
	return errors.Join(explain(why, ownLog(spec.Dir)), m.opts.Launcher.Kill(ctx, spec.ID))
}

// killTimeout bounds how long the end of a guest that can't be used is waited for.
const killTimeout = 10 * time.Second

// explain puts QEMU's own last words before an error that only says that it is
// gone.
func explain(err error, log string) error {
	data, rerr := readOwn(log)
	if rerr != nil {
		return err
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	last := printable(string(lines[len(lines)-1]), mostSaid)
	if last == "" {
		return err
	}
	return fmt.Errorf("QEMU says: %s: %w", last, err)
}

// mostSaid bounds what is told of QEMU's last words, in bytes: they become a part of
// the machine's record, and a guest may have had a hand in them.
const mostSaid = 500

// Adopt implements hypervisor.Monitor.
func (m *Monitor) Adopt(ctx context.Context, id string) (hypervisor.Guest, error) {
	list, err := m.opts.Launcher.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("looking for guest %s: %w", id, err)
	}
	for _, r := range list {
		if r.ID == id {
			return m.takeUp(ctx, id, r.PID)
		}
	}
	return nil, fmt.Errorf("guest %s: %w", id, os.ErrNotExist)
}

// List implements hypervisor.Monitor.
func (m *Monitor) List(ctx context.Context) ([]string, error) {
	list, err := m.opts.Launcher.List(ctx)
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(list))
	for i, r := range list {
		ids[i] = r.ID
	}
	return ids, nil
}

// lookEvery is how often a socket is looked for that QEMU is about to make.
const lookEvery = 10 * time.Millisecond

// takeUp connects to a guest that runs or is about to.
func (m *Monitor) takeUp(ctx context.Context, id string, pid int) (*guest, error) {
	dir := m.opts.Dir(id)
	done := m.opts.Launcher.Done(id)
	news := make(chan struct{}, 1)
	client, err := dialMonitor(ctx, dir, pid, done, heard(news))
	if err != nil {
		return nil, err
	}
	g := &guest{
		id: id, pid: pid, dir: dir, spoolDir: m.opts.SpoolDir, launcher: m.opts.Launcher, done: done, qmp: client, console: newConsole(dir, pid, m.opts.Log),
		agent: make(chan struct{}, 1), screen: make(chan struct{}, 1), dialling: make(chan struct{}, 1), news: news, noWayOut: m.opts.NoWayOut,
	}
	m.wg.Go(func() { g.console.run(m.ctx, done) })
	m.wg.Go(func() {
		select {
		case <-done:
		case <-m.ctx.Done():
		}
		g.letGo()
	})
	return g, nil
}

// dialMonitor connects as soon as QEMU listens.
func dialMonitor(ctx context.Context, dir string, pid int, done <-chan struct{}, onEvent func(qmp.Event)) (*qmp.Client, error) {
	for {
		conn, err := dial(ctx, monitorSocket(dir), pid)
		if err == nil {
			var client *qmp.Client
			if client, err = qmp.New(ctx, conn, onEvent); err == nil {
				return client, nil
			}
		}
		select {
		case <-done:
			return nil, errors.New("it has ended")
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for QEMU's monitor: %w", err)
		case <-time.After(lookEvery):
		}
	}
}
