package agent

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// listen asks a guest's agent now and then how the guest is, until it is gone.
// One that a daemon before this one froze, and had no time to thaw, is thawed.
func (a *Agent) listen(ctx context.Context, g *guest) {
	if g.found {
		if err := g.handle.Thaw(ctx); err != nil && !errors.Is(err, hypervisor.ErrNoAgent) {
			a.Log.Debug("a guest that was found running could not be thawed", "guest", g.id, "err", err)
		}
	}
	for pause := a.Tick; ; {
		select {
		case <-ctx.Done():
			return
		case <-g.handle.Done():
			return
		case <-time.After(pause):
		}
		found, err := g.handle.Info(ctx)
		info := &argonv1.GuestInfo{Hostname: found.Hostname, Os: found.OS, Addresses: found.Addresses}
		switch {
		case err == nil:
			pause = askAgain * a.Tick
		case errors.Is(err, hypervisor.ErrNoAgent):
			info, pause = nil, askEvery*a.Tick
		default: // it is busy, or frozen
			pause = askEvery * a.Tick
			continue
		}
		a.mu.Lock()
		same := proto.Equal(g.info, info)
		a.mu.Unlock()
		if !same {
			a.note(func() { g.info = info })
		}
	}
}
