package daemon

import (
	"context"
	"errors"
	"fmt"

	"github.com/argon-cluster/argon/internal/guard"
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
	dir := paths{dir: o.Dir, runDir: o.runDir()}.machine
	monitor := qemu.New(qemu.Options{Binary: qemuBinary, Launcher: launcher{g}, Dir: dir, Log: o.Log})
	defer monitor.Close()
	about, err := g.About(ctx)
	if err != nil {
		return err
	}
	o.Monitor, o.Guard, o.Containment = monitor, g, about.Text

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := cancelWhen(g.Lost(), ctx.Done(), func() { cancel(errors.New("the guard is gone")) })
	defer stop()
	err = Run(ctx, o)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
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
type launcher struct{ guard *guard.Client }

func (l launcher) Start(ctx context.Context, p qemu.Process) (int, error) {
	return l.guard.Start(ctx, guard.Process{ID: p.ID, Path: p.Path, Args: p.Args, Dir: p.Dir, LogPath: p.LogPath})
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
