package agent

import (
	"context"
	"errors"
	"fmt"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// errNotProbed: guests wait for the probe.
var errNotProbed = errors.New("it is still being found out what runs guests on this server")

// planProbe finds out once in each run, before any guest is to be started,
// what really runs guests here. That can take a while.
func (p *plan) planProbe() {
	a := p.agent
	server := p.st.Servers[a.ServerID]
	if a.probe != nil || server == nil || server.GetWitness() {
		return
	}
	p.add("probe", job{step: "probe", waits: true, run: func(ctx context.Context) error { return a.findAcceleration(ctx, server) }})
}

func (a *Agent) findAcceleration(ctx context.Context, server *argonv1.Server) error {
	probe, err := a.Monitor.Probe(ctx)
	if err != nil {
		return fmt.Errorf("find out what runs guests here: %w", err)
	}
	_, err = a.Store.Servers.Update(ctx, a.ServerID, func(s *argonv1.Server) error {
		if s.GetAcceleration() == string(probe.Acceleration) && s.GetAccelerationDetail() == probe.Reason {
			return ErrOvertaken
		}
		s.Acceleration, s.AccelerationDetail = string(probe.Acceleration), probe.Reason
		return nil
	})
	if err != nil && !errors.Is(err, ErrOvertaken) {
		return fmt.Errorf("record the acceleration: %w", err)
	}
	a.mu.Lock()
	a.probe = &probe
	a.mu.Unlock()
	if probe.Reason != "" {
		a.tellOnce(ctx, &argonv1.Event{
			Severity: argonv1.Severity_SEVERITY_WARNING, Kind: "server", SubjectId: a.ServerID, SubjectName: server.GetMeta().GetName(),
			Reason: "acceleration-fallback", Message: fmt.Sprintf("guests run on %s, slowly: %s", probe.Acceleration, probe.Reason),
		})
	}
	return nil
}

// tellOnce appends an event unless one that says the same is among the newest
// about its subject: each run of the daemon finds out the same.
func (a *Agent) tellOnce(ctx context.Context, e *argonv1.Event) {
	last, err := a.Store.Events.List(ctx, 20, catalog.EventFilter{Kind: e.GetKind(), Name: e.GetSubjectName()})
	if err != nil {
		a.Log.Warn("events can't be read", "err", err)
	}
	for _, old := range last {
		if old.GetReason() == e.GetReason() && old.GetMessage() == e.GetMessage() {
			return
		}
	}
	a.tell(ctx, e)
}

// probed is what the probe found; an error while that is not known.
func (a *Agent) probed() (hypervisor.Probe, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.accelerates()
}

// accelerates is probed for callers that hold mu.
func (a *Agent) accelerates() (hypervisor.Probe, error) {
	if a.probe != nil {
		return *a.probe, nil
	}
	if r := a.retries["probe"]; r.err != nil {
		return hypervisor.Probe{}, r.err
	}
	return hypervisor.Probe{}, errNotProbed
}
