package daemon

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/controller"
)

// runMember runs what only a member of a cluster has. The order of the end is
// that of what needs what: first the agent, which detaches volumes from
// replicas here and elsewhere, then what it needs for that.
func (s *server) runMember(ctx context.Context, data net.Listener) error {
	background := context.WithoutCancel(ctx)
	if err := s.await(ctx, func() error { return s.member.Start(ctx) }); err != nil {
		return err
	}
	defer s.stopMember()
	m, err := s.build(ctx)
	if err != nil {
		return err
	}
	defer m.close(s.Log)
	if err := s.Guard.Ready(ctx); err != nil {
		return err
	}

	below, endBelow := context.WithCancel(background)
	defer endBelow()
	base, below := errgroup.WithContext(below)
	base.Go(func() error { return m.view.Run(below) })
	base.Go(func() error { return m.news.run(below) })
	base.Go(func() error { return m.gate.run(below, m.view) })
	base.Go(func() error { return s.member.KeepLease(below, s.limitLease(below), m.renewed(below, s)) })
	base.Go(func() error { return m.data.run(below, data) })
	base.Go(func() error { return s.disk.run(below) })

	above, endAbove := context.WithCancel(below)
	defer endAbove()
	leaving := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(leaving)
		defer endAbove()
		// Not when another daemon follows, nor when this one has failed: guests
		// run on then.
		if errors.Is(context.Cause(ctx), context.Canceled) {
			s.leave(above, m)
		}
	})
	err = s.runAbove(above, m)
	endAbove()
	if !stop() {
		<-leaving
	}
	if errors.Is(context.Cause(ctx), ErrRestart) {
		s.holdLease(below, m)
	}
	endBelow()
	return errors.Join(err, ignoreCancel(base.Wait()))
}

// restartTime is how long the next daemon may take until it holds the lease.
const restartTime = 15 * time.Second

// holdLease keeps the guests' right to run over a restart. If that fails, the
// lease that there is may be long enough.
func (s *server) holdLease(ctx context.Context, m *memberParts) {
	if err := s.member.HoldLease(ctx, restartTime, m.renewed(ctx, s)); err != nil {
		s.Log.Warn("the lease was not made longer for the restart", "err", err)
	}
}

// limitLease tells the guard that guests may run no longer than by a lease of the
// usual length.
func (s *server) limitLease(ctx context.Context) func(time.Duration) error {
	return func(until time.Duration) error { return s.Guard.LimitDeadline(ctx, until) }
}

// runAbove runs what stops first.
func (s *server) runAbove(ctx context.Context, m *memberParts) error {
	if err := s.waitForCatalog(ctx, m.view); err != nil {
		return nil
	}
	s.mu.Lock()
	s.parts = s.rpcParts(m)
	s.mu.Unlock()
	close(s.ready)
	g, ctx := errgroup.WithContext(ctx)
	for _, loop := range []func(context.Context) error{
		m.agent.Run,
		m.ports.Run,
		m.observer.Run,
		func(ctx context.Context) error { return s.arrive(ctx, m) },
		func(ctx context.Context) error { return s.member.RunVoters(ctx, m.view) },
		func(ctx context.Context) error { return s.member.RunUpkeep(ctx, m.view) },
		func(ctx context.Context) error { return s.member.KeepCopies(ctx, m.view) },
		s.member.WatchSuccession,
		func(ctx context.Context) error { return s.reportUsage(ctx, m) },
		func(ctx context.Context) error {
			return s.member.Lead(ctx, func(ctx context.Context) error { return s.lead(ctx, m) })
		},
	} {
		g.Go(func() error { return ignoreCancel(loop(ctx)) })
	}
	return g.Wait()
}

// lead runs what only the leader does.
func (s *server) lead(ctx context.Context, m *memberParts) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.member.LeadVoters(ctx, m.view) })
	g.Go(func() error { return s.member.LeadIntroductions(ctx, m.view) })
	g.Go(func() error {
		return controller.Run(ctx, controller.Options{
			ServerID: s.member.ID(), Store: s.member.Store(), Observer: m.observer, Log: s.Log,
		})
	})
	return g.Wait()
}

// stopMember closes the catalog and stops etcd.
func (s *server) stopMember() {
	if err := s.member.Stop(); err != nil {
		s.Log.Warn("leaving the catalog", "err", err)
	}
}

func ignoreCancel(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (s *server) waitForCatalog(ctx context.Context, view *catalog.View) error {
	for {
		changed := view.Changed()
		if view.State() != nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
