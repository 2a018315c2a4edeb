package daemon

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

const (
	// leaveParallel is how many machines of a server that stops move at once.
	leaveParallel = 4
	// nothingMoves is after what time without a machine on its way those that are
	// left are taken to have nowhere to go.
	nothingMoves = 3 * time.Second
	// markTimeout bounds a change of this server's own record, and markPause is
	// between two attempts.
	markTimeout = 2 * time.Second
	markPause   = time.Second
)

// leave makes an orderly stop one that machines survive: those that can go
// elsewhere while they run do, the others are shut down through their guests.
// What takes too long is ended as by a power cut. The cluster starts again what
// was shut down: here when this server is back, or elsewhere, whichever is first.
func (s *server) leave(ctx context.Context, m *memberParts) {
	if s.StopTimeout <= 0 || m.view.State() == nil || machinesOn(m.view.State(), s.member.ID()) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.StopTimeout)
	defer cancel()
	if othersTake(m.view.State(), s.member.ID()) {
		s.Log.Info("this server stops: its machines move to others", "machines", machinesOn(m.view.State(), s.member.ID()))
		if err := s.mark(ctx, m.store, func(r *argonv1.Server) error {
			if r.GetDrain() != nil {
				return catalog.ErrUnchanged
			}
			r.Drain = &argonv1.Drain{Since: timestamppb.Now(), Parallel: leaveParallel, Leaving: true}
			return nil
		}); err != nil {
			s.Log.Warn("the cluster was not told that this server stops", "err", err)
		} else {
			// Half of the time is left for those that do not move.
			moving, cancel := context.WithTimeout(ctx, s.StopTimeout/2)
			awaitMoves(moving, m.view, s.member.ID(), nothingMoves)
			cancel()
		}
	}
	if n := machinesOn(m.view.State(), s.member.ID()); n > 0 && ctx.Err() == nil {
		s.Log.Info("this server stops: machines that did not move are shut down", "machines", n)
		m.agent.ShutDown(ctx)
	}
}

// arrive takes back that this server leaves, once it has started again.
func (s *server) arrive(ctx context.Context, m *memberParts) error {
	if !m.view.State().Servers[s.member.ID()].GetDrain().GetLeaving() {
		return nil
	}
	for {
		err := s.mark(ctx, m.store, func(r *argonv1.Server) error {
			if !r.GetDrain().GetLeaving() {
				return catalog.ErrUnchanged
			}
			r.Drain = nil
			return nil
		})
		if err == nil {
			return nil
		}
		s.Log.Warn("the cluster still takes this server for one that leaves; trying again", "err", err)
		select {
		case <-time.After(markPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// mark changes this server's own record.
func (s *server) mark(ctx context.Context, store *catalog.Store, change func(*argonv1.Server) error) error {
	ctx, cancel := context.WithTimeout(ctx, markTimeout)
	defer cancel()
	_, err := store.Servers.Update(ctx, s.member.ID(), change)
	return err
}

// awaitMoves waits until no machine is on a server any more, or until none has been
// on its way for a while. One may be for long without a change of the catalog, and
// others wait for their turn after it.
func awaitMoves(ctx context.Context, view *catalog.View, serverID string, idle time.Duration) {
	pause := time.NewTimer(idle)
	defer pause.Stop()
	for {
		changed := view.Changed()
		st := view.State()
		if machinesOn(st, serverID) == 0 {
			return
		}
		if machineMoves(st, serverID) {
			pause.Reset(idle)
		}
		select {
		case <-changed:
		case <-pause.C:
			if !machineMoves(view.State(), serverID) {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// machinesOn counts the machines that are to run on a server.
func machinesOn(st *catalog.State, serverID string) int {
	n := 0
	for _, m := range st.Machines {
		if m.GetServerId() == serverID {
			n++
		}
	}
	return n
}

// machineMoves reports whether a machine is on its way from a server.
func machineMoves(st *catalog.State, serverID string) bool {
	for _, m := range st.Machines {
		if m.GetServerId() == serverID && (m.GetMigration() != nil || m.GetMove() != nil) {
			return true
		}
	}
	return false
}

// othersTake reports whether any other server takes machines.
func othersTake(st *catalog.State, serverID string) bool {
	for id := range st.Servers {
		if id != serverID && placement.Takes(st, id) {
			return true
		}
	}
	return false
}
