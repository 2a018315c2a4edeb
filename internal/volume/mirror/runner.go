package mirror

import (
	"context"
	"errors"
	"fmt"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
)

// runner keeps the connection to one replica: dials, reports, dials again.
type runner struct {
	a      *Attachment
	peer   uint32
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	hangup chan uint64 // the session to end
	clean  bool        // set before cancel

	// Guarded by a.mu.
	link    Link
	session uint64
}

const (
	dialTimeout = 2 * time.Second
	dialPause   = 100 * time.Millisecond
	maxPause    = time.Second
)

func (a *Attachment) dial(peer uint32) {
	r := &runner{a: a, peer: peer, done: make(chan struct{}), hangup: make(chan uint64, 1)}
	r.ctx, r.cancel = context.WithCancel(a.ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.runners[peer] != nil {
		r.cancel()
		return
	}
	a.runners[peer] = r
	a.wg.Add(1)
	go r.run()
}

// hangUp ends a session; with e.Drop also the runner, which it returns.
func (a *Attachment) hangUp(e Effect) *runner {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.runners[e.Peer]
	if r == nil {
		return nil
	}
	if e.Drop {
		delete(a.runners, e.Peer)
		r.clean = e.Clean
		r.cancel()
		return r
	}
	select {
	case r.hangup <- e.Session:
	default: // one is on its way
	}
	return r
}

// sending is a message on its way to a link.
type sending struct {
	link Link
	m    *Message
}

func (s sending) local() bool {
	_, is := s.link.(*localLink)
	return is
}

// delivery is a message and what its answer is for. It is used again: a garbage
// collector that runs often is felt by all requests.
type delivery struct {
	m           Message
	r           *runner
	session, id uint64
}

func newDelivery() any {
	d := &delivery{}
	d.m.Done = d.done
	return d
}

// message is the message of an effect, and where it goes. The lock is held.
func (a *Attachment) message(e Effect) (s sending, ok bool) {
	r := a.runners[e.Peer]
	if r == nil || r.link == nil || r.session != e.Session {
		return s, false // the session is over; PeerDown says so
	}
	d := a.deliveries.Get().(*delivery)
	d.r, d.session, d.id = r, e.Session, e.ID
	d.m = Message{
		Verb: e.Verb, Snapshot: e.Snapshot, Off: e.Off, Len: e.Len, Data: e.Data, FUA: e.FUA,
		Generation: e.Generation, Base: e.Base, Done: d.m.Done,
	}
	return sending{link: r.link, m: &d.m}, true
}

// done is the message's Done.
func (d *delivery) done(info Info, err error) {
	r, session, id := d.r, d.session, d.id
	d.r, d.m.Data = nil, nil
	r.a.deliveries.Put(d)
	if errors.Is(err, ErrSessionOver) {
		return // PeerDown says so
	}
	out := outcome(err)
	r.a.run(func(now time.Duration) []Effect {
		return r.a.core.Reply(now, r.peer, session, id, out, info, err)
	})
}

func outcome(err error) Outcome {
	switch {
	case err == nil:
		return Done
	case errors.Is(err, volume.ErrNoSpace):
		return Full
	case errors.Is(err, volume.ErrDamaged):
		return Damaged
	case errors.Is(err, volume.ErrNoSnapshot):
		return Missing
	default:
		return Broken
	}
}

func (r *runner) run() {
	defer r.a.wg.Done()
	defer close(r.done)
	pause := dialPause
	for r.ctx.Err() == nil {
		ok := r.connect()
		if ok {
			pause = dialPause
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-r.ctx.Done():
		}
		t.Stop()
		pause = min(2*pause, maxPause)
	}
}

// connect runs one session; false when there was none.
func (r *runner) connect() bool {
	a := r.a
	v := a.record()
	var rep *argonv1.Replica
	for _, x := range v.GetReplicas() {
		if x.GetId() == r.peer {
			rep = x
		}
	}
	if rep == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(r.ctx, dialTimeout)
	link, info, err := a.opts.Dialer.Dial(ctx, v, rep, a.opts.Config.Epoch)
	cancel()
	if err != nil {
		r.refused(err)
		return false
	}
	session := r.up(link, info)
	select {
	case <-link.Done():
	case <-r.hangup:
	case <-r.ctx.Done():
	}
	r.down(link, session)
	return true
}

func (r *runner) up(link Link, info Info) (session uint64) {
	r.a.run(func(now time.Duration) []Effect {
		r.a.sessions++
		session = r.a.sessions
		r.link, r.session = link, session
		return r.a.core.PeerUp(now, r.peer, session, info)
	})
	return session
}

func (r *runner) down(link Link, session uint64) {
	r.a.mu.Lock()
	r.link, r.session = nil, 0
	clean := r.clean
	r.a.mu.Unlock()
	link.Close(clean)
	select {
	case <-r.hangup: // for the session that is over
	default:
	}
	r.a.run(func(now time.Duration) []Effect { return r.a.core.PeerDown(now, r.peer, session) })
}

// refused finds out what a failed dial means: a newer holder, or a catalog
// that is behind.
func (r *runner) refused(err error) {
	a := r.a
	var sealed *SealedError
	if !errors.As(err, &sealed) {
		a.log.Debug("replica not in reach", "replica", r.peer, "err", err)
		return
	}
	v, gerr := a.opts.Catalog.GetVolume(r.ctx, a.opts.VolumeID)
	switch {
	case gerr != nil:
		a.log.Warn("a replica has a higher epoch and the catalog does not answer", "replica", r.peer, "err", gerr)
	case v.GetEpoch() != a.opts.Config.Epoch:
		a.run(func(now time.Duration) []Effect {
			return a.core.Deposed(now, fmt.Errorf("replica %d: %w: %w", r.peer, sealed, ErrDeposed))
		})
	default:
		a.run(func(now time.Duration) []Effect { return a.core.PeerAhead(now, r.peer, sealed.Epoch) })
	}
}
