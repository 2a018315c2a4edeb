package agent

import (
	"context"
	"errors"
	"fmt"
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
		case after := <-g.stood:
			a.setClock(ctx, g, after)
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

// stop is how a guest stood still, and its clock with it: the machine, and when it
// began, if that is worth telling.
type stop struct {
	machine *argonv1.Machine
	since   time.Time
}

// goOn makes a guest run that stood still. Who listens to its agent sets its clock.
func (g *guest) goOn(ctx context.Context, after stop) error {
	if err := g.handle.Resume(ctx); err != nil {
		return err
	}
	select {
	case <-g.stood: // one that was not seen to yet
	default:
	}
	select {
	case g.stood <- after:
	default: // somebody else has just said so
	}
	return nil
}

// clockTries is how often a guest's agent is asked to set its clock, a tick apart: one
// that has just come back may take a moment.
const clockTries = 10

// setClock sets a guest's clock after it stood still. Nothing waits for that.
func (a *Agent) setClock(ctx context.Context, g *guest, after stop) {
	var err error
	for range clockTries {
		if err = g.handle.SetClock(ctx); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-g.handle.Done():
			return
		case <-time.After(a.Tick):
		}
	}
	if after.machine == nil {
		if err != nil {
			a.Log.Debug("a guest's clock was not set after it stood still", "guest", g.id, "err", err)
		}
		return
	}
	severity, reason, message := argonv1.Severity_SEVERITY_INFO, "machine-clock-set", "its clock, which stood still since %s, was set"
	if err != nil {
		severity, reason = argonv1.Severity_SEVERITY_WARNING, "machine-clock-behind"
		message = "its clock stood still since %s, and could not be set: " + err.Error() + ": set it from inside, or install the guest agent"
	}
	a.tell(ctx, machineEvent(after.machine, severity, reason, fmt.Sprintf(message, after.since.UTC().Format("2006-01-02 15:04:05 MST"))))
}
