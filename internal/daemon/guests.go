package daemon

import (
	"context"
	"errors"
	"fmt"

	"github.com/argon-cluster/argon/internal/cgroup"
	"github.com/argon-cluster/argon/internal/guard"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu"
)

// RunUnderGuard runs a server whose guests are QEMUs and whose parent process
// is a guard; see Run. qemuBinary is empty for the one that is installed.
func RunUnderGuard(ctx context.Context, o Options, qemuBinary string) error {
	g, err := guard.Connect(ctx)
	if err != nil {
		return fmt.Errorf("connecting to the guard: %w", err)
	}
	defer g.Close()
	o.RunDir, o.Guard = o.runDir(), g
	p := paths{dir: o.Dir, runDir: o.RunDir}
	err = o.await(ctx, func() (err error) {
		if err := p.make(); err != nil {
			return err
		}
		o.confinement, err = findConfinement(o, g)
		return err
	})
	if ctx.Err() != nil {
		return nil // it was stopped while it waited
	}
	if err != nil {
		return err
	}
	about, err := g.About(ctx)
	if err != nil {
		return err
	}
	o.Containment, o.Confinement = about.Text, o.confinement.describe()
	o.ClosedNetwork = closeLoopback(about.Groups)
	o.Log.Info("guests are contained by " + o.Containment + "; " + o.Confinement)
	if o.ClosedNetwork != "" {
		o.Log.Warn("guests open no connections of their own, or they would reach what listens on this host's loopback addresses: " + o.ClosedNetwork)
	}
	monitor := qemu.New(qemu.Options{
		Binary: qemuBinary, Launcher: launcher{g, o.confinement}, Dir: p.machine, Credential: o.confinement.credential(),
		SpoolDir: p.spool(), NoWayOut: o.ClosedNetwork != "", Log: o.Log,
	})
	defer monitor.Close()
	o.Monitor, o.keeper = monitor, g

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := cancelWhen(g.Lost(), ctx.Done(), func() { cancel(errors.New("the guard is gone")) })
	defer stop()
	err = Run(ctx, o)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, ErrRestart) {
		err = errors.Join(err, cause)
	}
	return err
}

// cancelWhen calls cancel when lost is closed; the returned function waits for
// what does so.
func cancelWhen(lost, done <-chan struct{}, cancel func()) func() {
	ended, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-lost:
			cancel()
		case <-done:
		case <-stop:
		}
	}()
	return func() {
		close(stop)
		<-ended
	}
}

// launcher has the guard start guests; see qemu.Launcher.
type launcher struct {
	guard   *guard.Client
	confine confinement
}

func (l launcher) Start(ctx context.Context, p qemu.Process) (int, error) {
	user := l.confine.user(machineOf(p.ID))
	if err := l.confine.give(p.Dir, user); err != nil {
		return 0, err
	}
	return l.guard.Start(ctx, guard.Process{
		ID: p.ID, Path: p.Path, Args: p.Args, Dir: p.Dir, LogPath: p.LogPath, User: user, Groups: l.confine.groups, Limits: p.Limits,
	})
}

func (l launcher) Limit(ctx context.Context, id string, limits cgroup.Limits) error {
	err := l.guard.Limit(ctx, id, limits)
	switch {
	case errors.Is(err, guard.ErrOlder) && limits == (cgroup.Limits{}):
		return nil
	case errors.Is(err, guard.ErrOlder), errors.Is(err, guard.ErrCannotLimit):
		return fmt.Errorf("%w: %w", hypervisor.ErrCannotLimit, err)
	}
	return err
}

func (l launcher) Kill(ctx context.Context, id string) error { return l.guard.Kill(ctx, id) }

func (l launcher) List(ctx context.Context) ([]qemu.Running, error) {
	list, err := l.guard.List(ctx)
	if err != nil {
		return nil, err
	}
	running := make([]qemu.Running, len(list))
	for i, r := range list {
		running[i] = qemu.Running{ID: r.ID, PID: r.PID}
	}
	return running, nil
}

func (l launcher) Done(id string) <-chan struct{} { return l.guard.Done(id) }
