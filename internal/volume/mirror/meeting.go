package mirror

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Meeting is the Group of one server: its attachments wait for each other here,
// for as long as all of them can stand still. Safe for concurrent use.
type Meeting struct {
	// Patience is how long the first one waits for the last.
	Patience time.Duration

	mu     sync.Mutex
	groups map[string]*gathering
}

// Alone is the Group of a volume that no machine writes to: there is no order of
// writes to keep.
type Alone struct{}

// Meet does not wait.
func (Alone) Meet(context.Context, string, int) error { return nil }

// gathering is who has come so far.
type gathering struct {
	present int
	all     chan struct{}
	// one is closed when one more comes, and when the last one leaves: those who
	// come later gather anew.
	one chan struct{}
}

// Meet waits until size volumes have come.
func (m *Meeting) Meet(ctx context.Context, name string, size int) error {
	ctx, cancel := context.WithTimeout(ctx, m.Patience)
	defer cancel()
	g := m.join(name, size)
	select {
	case <-g.all:
		return nil
	case <-ctx.Done():
		return m.leave(name, g, size)
	}
}

func (m *Meeting) join(name string, size int) *gathering {
	m.mu.Lock()
	defer m.mu.Unlock()
	g := m.groups[name]
	if g == nil {
		g = m.begin(name)
	}
	g.tell()
	if g.present++; g.present >= size {
		close(g.all)
		delete(m.groups, name)
	}
	return g
}

// tell wakes those who wait for somebody to come, or for all to have left; the caller
// holds mu.
func (g *gathering) tell() {
	close(g.one)
	g.one = make(chan struct{})
}

// begin makes a gathering; the caller holds mu.
func (m *Meeting) begin(name string) *gathering {
	g := &gathering{all: make(chan struct{}), one: make(chan struct{})}
	if m.groups == nil {
		m.groups = map[string]*gathering{}
	}
	m.groups[name] = g
	return g
}

// Instant takes part in a snapshot of a group besides its volumes, which is of
// one more than there are. It calls stop once all volumes have their generations,
// while writes still go on, and returns when all of them stand still: whatever
// stop has stopped is then of the same instant as the snapshots.
func (m *Meeting) Instant(ctx context.Context, group string, volumes int, stop func(context.Context) error) error {
	if err := m.awaitAll(ctx, group+"/"+whenReady, volumes); err != nil {
		return err
	}
	if err := stop(ctx); err != nil {
		return err
	}
	if err := m.Meet(ctx, group+"/"+whenReady, volumes+1); err != nil {
		return err
	}
	return m.Meet(ctx, group+"/"+whenStill, volumes+1)
}

// awaitAll waits until so many volumes have come, without being one.
func (m *Meeting) awaitAll(ctx context.Context, name string, volumes int) error {
	ctx, cancel := context.WithTimeout(ctx, instantPatience)
	defer cancel()
	for {
		m.mu.Lock()
		g := m.groups[name]
		if g == nil {
			g = m.begin(name)
		}
		present, one := g.present, g.one
		m.mu.Unlock()
		if present >= volumes {
			return nil
		}
		select {
		case <-one:
		case <-ctx.Done():
			m.mu.Lock()
			defer m.mu.Unlock()
			if g.present == 0 && m.groups[name] == g {
				delete(m.groups, name)
			}
			return fmt.Errorf("%d of %d volumes are ready for their snapshots: %w", present, volumes, ctx.Err())
		}
	}
}

// instantPatience is how long volumes may take to get ready.
const instantPatience = 30 * time.Second

// leave gives up, unless the last one has come this very moment.
func (m *Meeting) leave(name string, g *gathering, size int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-g.all:
		return nil
	default:
	}
	present := g.present
	if g.present--; g.present == 0 {
		delete(m.groups, name)
		g.tell()
	}
	return fmt.Errorf("%d of %d volumes stand still", present, size)
}
