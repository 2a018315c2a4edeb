package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// This file sees guests end, and clears up after them.

// watchGuests begins to watch the guests that are ours and not watched yet.
func (p *plan) watchGuests(ctx context.Context) {
	for _, m := range p.agent.machines {
		for _, g := range m.guests {
			if g.adopted && !g.watched {
				g.watched = true
				p.agent.wg.Go(func() { p.agent.watch(ctx, g) })
				p.agent.wg.Go(func() { p.agent.listen(ctx, g) })
			}
		}
	}
}

// watch follows how a guest does until it is gone.
func (a *Agent) watch(ctx context.Context, g *guest) {
	tick := time.NewTicker(a.Tick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.handle.Done():
			last, err := g.handle.Status(ctx)
			a.note(func() {
				g.exited = true
				g.poweredOff = g.status.State == hypervisor.ShutDown || (err == nil && last.State == hypervisor.ShutDown)
			})
			return
		case <-tick.C:
			if now, err := g.handle.Status(ctx); err == nil {
				a.observe(g, now)
			}
		}
	}
}

// observe notes how a guest does now, if that is new.
func (a *Agent) observe(g *guest, now hypervisor.Status) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now == g.status {
		return
	}
	g.status, g.haltedAt = now, time.Time{}
	if now.State == hypervisor.Halted {
		g.haltedAt = a.Now()
	}
	a.nudge()
}

// note changes what is known of a guest.
func (a *Agent) note(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	a.nudge()
}

// reap forgets a guest whose process is gone. One that powered itself off by
// its own will is wanted stopped from now on, as its user did not want it back
// at once; one that just went is started again, after pauses that grow.
func (a *Agent) reap(ctx context.Context, m *argonv1.Machine, g *guest, allowed bool) error {
	byItself := belongs(m, a.ServerID) && m.GetPlacement() == g.placement &&
		wanted(m) == argonv1.Wanted_WANTED_RUNNING && g.powerDownAt.IsZero() && !g.killed
	var crash string
	switch {
	case byItself && g.poweredOff:
		if err := a.stayOff(ctx, m); err != nil {
			return err
		}
	case byItself && allowed:
		crash = "the guest's process ended unexpectedly"
		a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_ERROR, "machine-crashed", crash+"; it is started again"))
	}
	a.clearAway(g)
	a.mu.Lock()
	defer a.mu.Unlock()
	machineID, _, _ := parseGuestID(g.id)
	local := a.machine(machineID)
	delete(local.guests, g.placement)
	if a.Now().Sub(g.since) >= longRun || crash == "" {
		local.crashes = 0
	}
	if crash != "" {
		local.crashes++
		local.crashedAt, local.crash = a.Now(), crash
	}
	return nil
}

// stayOff makes a guest's own power-off the machine's wanted state.
func (a *Agent) stayOff(ctx context.Context, m *argonv1.Machine) error {
	const why = "powered off from inside"
	placement := m.GetPlacement()
	_, err := a.Store.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error {
		if !belongs(m, a.ServerID) || m.GetPlacement() != placement || wanted(m) != argonv1.Wanted_WANTED_RUNNING {
			return ErrOvertaken
		}
		m.Wanted = argonv1.Wanted_WANTED_STOPPED
		observation{state: stateStopping, reason: why}.apply(m, a.ServerID, a.Now())
		return nil
	})
	if errors.Is(err, ErrOvertaken) || errors.Is(err, catalog.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record that the guest powered itself off: %w", err)
	}
	a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-powered-off", why))
	return nil
}
