package fake

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// Census watches that no two guests run at once, on whatever servers. The zero
// value is ready; safe for concurrent use, and a nil one counts nothing.
type Census struct {
	mu      sync.Mutex
	running []*Guest
	wrong   []string
}

func (c *Census) note(g *Guest, runs bool) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running = slices.DeleteFunc(c.running, func(other *Guest) bool { return other == g })
	if !runs {
		return
	}
	for _, other := range c.running {
		c.wrong = append(c.wrong, g.id+" began to run while "+other.id+" did")
	}
	c.running = append(c.running, g)
}

// Wrong says where two ran at once.
func (c *Census) Wrong() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.wrong)
}

// Line leads a guest's state to another one.
type Line struct {
	net.Conn // none: nothing is carried
	To       *Guest
	// At, if it is set, is called when a transfer comes to a step, "send" or
	// "finish"; its error ends it. After "finish" follows "finished": what goes
	// wrong there comes when the other side has everything.
	At func(ctx context.Context, step string) error
}

// Close ends the line: who waits at its end and has not got all is gone.
func (l *Line) Close() error {
	l.To.mu.Lock()
	waits := l.To.status.State == hypervisor.Receiving
	l.To.mu.Unlock()
	if waits {
		l.To.Exit()
	}
	return nil
}

func (l *Line) at(ctx context.Context, step string) error {
	if l.At != nil {
		if err := l.At(ctx, step); err != nil {
			return err
		}
	}
	select {
	case <-l.To.done:
		return errors.New("the other side is gone")
	default:
		return ctx.Err()
	}
}

// Send implements hypervisor.Guest, over a Line.
func (g *Guest) Send(ctx context.Context, conn net.Conn, progress func(hypervisor.Transfer)) error {
	line, ok := conn.(*Line)
	if !ok {
		return errors.New("it is no line between fakes")
	}
	g.mu.Lock()
	g.line = line
	g.mu.Unlock()
	progress(hypervisor.Transfer{TotalBytes: 100, RemainingBytes: 50, SentBytes: 50})
	if err := line.at(ctx, "send"); err != nil {
		return errors.Join(err, g.StopSending(ctx))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.status.State != hypervisor.Running {
		return errors.New("the guest has stopped")
	}
	g.set(hypervisor.Status{State: hypervisor.Leaving})
	return nil
}

// Finish implements hypervisor.Guest. A real guest whose transfer fails goes on
// by itself.
func (g *Guest) Finish(ctx context.Context) (hypervisor.Transfer, error) {
	g.mu.Lock()
	line := g.line
	g.mu.Unlock()
	if line == nil {
		return hypervisor.Transfer{}, errors.New("nothing is being sent")
	}
	if err := line.at(ctx, "finish"); err != nil {
		g.Set(hypervisor.Status{State: hypervisor.Running})
		return hypervisor.Transfer{}, err
	}
	line.To.Set(hypervisor.Status{State: hypervisor.Paused, Detail: "paused"})
	if err := line.at(ctx, "finished"); err != nil {
		g.Set(hypervisor.Status{State: hypervisor.Running})
		return hypervisor.Transfer{}, err
	}
	g.Set(hypervisor.Status{State: hypervisor.Left})
	return hypervisor.Transfer{TotalBytes: 100, SentBytes: 100}, nil
}

// StopSending implements hypervisor.Guest.
func (g *Guest) StopSending(context.Context) error {
	g.mu.Lock()
	line := g.line
	g.line = nil
	if g.status.State == hypervisor.Leaving {
		g.set(hypervisor.Status{State: hypervisor.Running})
	}
	g.mu.Unlock()
	if line != nil {
		return line.Close()
	}
	return nil
}
