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
		g = &gathering{all: make(chan struct{})}
		if m.groups == nil {
			m.groups = map[string]*gathering{}
		}
		m.groups[name] = g
	}
	if g.present++; g.present >= size {
		close(g.all)
		delete(m.groups, name)
	}
	return g
}

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
	}
	return fmt.Errorf("%d of %d volumes stand still", present, size)
}
