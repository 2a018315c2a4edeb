package controller

import (
	"context"
	"sync"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// Observation is what one observer has seen in the catalog, and when by its own
// clock. Whether a server lives is decided by it alone: the times in records are
// of other hosts' clocks, which may be wrong by any amount and are set right at
// any moment. It is a value; Observe makes the next one.
type Observation struct {
	// Lost are the servers that are lost, with the instant since when this
	// observer knows. A server that is not, may still be without a lease: see
	// Observe.
	Lost map[string]time.Time

	// servers and leases are by the server's id, checkpoints by theirs.
	servers, leases, checkpoints map[string]sighting
}

// sighting is when a record was first seen as it is.
type sighting struct {
	// version differs when the record became another one, in the sense of who
	// keeps the sighting.
	version int64
	at      time.Time
}

// Observe compares with the catalog as it is now. now must come from one clock
// that never jumps, as time.Now with its monotonic reading does.
//
// A server is lost when its lease has ended, which etcd declares a full lease
// time after the last renewal: so it has stopped its guests by then (guard).
//
// Nobody is lost while every lease is young: then the whole cluster has just
// come back, from a power cut or a lost majority, and the others get the time
// of two leases to arrive before their machines are moved. The same time is
// given to a server that has just joined. To an observer that has just begun
// all are young.
func (o Observation) Observe(st *catalog.State, now time.Time) Observation {
	next := Observation{
		Lost:        map[string]time.Time{},
		servers:     map[string]sighting{},
		leases:      map[string]sighting{},
		checkpoints: map[string]sighting{},
	}
	settled := false
	for id, l := range st.Leases {
		next.leases[id] = saw(o.leases, id, l.GetRevision(), now)
		settled = settled || !young(next.leases[id], st, now)
	}
	for id := range st.Servers {
		next.servers[id] = saw(o.servers, id, 0, now)
		if placement.Alive(st, id) || !settled || young(next.servers[id], st, now) {
			continue
		}
		next.Lost[id] = now
		if since, known := o.Lost[id]; known {
			next.Lost[id] = since
		}
	}
	for id, c := range st.Checkpoints {
		next.checkpoints[id] = saw(o.checkpoints, id, int64(c.GetState()), now)
	}
	return next
}

// saw is the sighting of a record that is here now.
func saw(before map[string]sighting, id string, version int64, now time.Time) sighting {
	if s, known := before[id]; known && s.version == version {
		return s
	}
	return sighting{version: version, at: now}
}

func young(s sighting, st *catalog.State, now time.Time) bool {
	return now.Sub(s.at) < 2*leaseTime(st)
}

// checkpointIs is for how long the observer has seen a checkpoint in its state.
func (o Observation) checkpointIs(c *argonv1.Checkpoint, now time.Time) time.Duration {
	s, known := o.checkpoints[c.GetMeta().GetId()]
	if !known {
		return 0
	}
	return now.Sub(s.at)
}

// observeEvery is how often an observer looks that does not lead.
const observeEvery = time.Second

// Observer keeps an Observation up to date. Each server has one, whether it
// leads or not: a new leader that had just begun to look would wait for the
// time of two leases before it took anybody for lost, and the old one may have
// gone with the server whose machines are to be moved. Safe for concurrent use.
type Observer struct {
	view *catalog.View
	now  func() time.Time

	mu   sync.Mutex
	seen Observation
}

// NewObserver makes one that has seen nothing. now is as for Observe.
func NewObserver(view *catalog.View, now func() time.Time) *Observer {
	return &Observer{view: view, now: now}
}

// Run looks until ctx ends, whose error it returns.
func (o *Observer) Run(ctx context.Context) error {
	tick := time.NewTicker(observeEvery)
	defer tick.Stop()
	for {
		o.Look()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// Look looks once, in between.
func (o *Observer) Look() { o.look() }

// look observes the catalog as it is now: the state, nil before the first was
// read, the instant, and what has been seen by then.
func (o *Observer) look() (*catalog.State, time.Time, Observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	st, now := o.view.State(), o.now()
	if st != nil {
		o.seen = o.seen.Observe(st, now)
	}
	return st, now, o.seen
}
