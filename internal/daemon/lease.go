package daemon

import (
	"context"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/catalog"
)

// gate says whether this server may start workloads: it holds its lease, and
// knows what the catalog said after the lease began. While it held none, the
// others may have taken its machines; it must not start them by what it knew
// before. See agent.Gate.
type gate struct {
	now func() time.Duration

	mu    sync.Mutex
	until time.Duration // the end of the lease
	// from is the first revision that was read in this lease; 0: none yet.
	from  int64
	lease uint64 // counts the leases
	began chan struct{}
}

func newGate(now func() time.Duration) *gate {
	return &gate{now: now, began: make(chan struct{}, 1)}
}

// renewed is told each time the lease was renewed. It never blocks.
func (g *gate) renewed(until time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.now() >= g.until {
		g.from = 0
		g.lease++
		select {
		case g.began <- struct{}{}:
		default:
		}
	}
	g.until = max(g.until, until)
}

// Allowed implements agent.Gate.
func (g *gate) Allowed(revision int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now() < g.until && g.from > 0 && revision >= g.from
}

// opened is told that the revision was read in this lease.
func (g *gate) opened(lease uint64, revision int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.lease == lease {
		g.from = revision
	}
}

func (g *gate) current() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lease
}

// run reads the catalog at the beginning of each lease.
func (g *gate) run(ctx context.Context, view *catalog.View) error {
	for {
		select {
		case <-g.began:
		case <-ctx.Done():
			return nil
		}
		lease := g.current()
		for view.Sync(ctx) != nil {
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return nil
			}
		}
		g.opened(lease, view.State().Revision)
	}
}
