package controller

import (
	"cmp"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file empties servers that are drained. How a machine gets from one server
// to another is its agent's: the plan only gives the order, to go while it runs
// (Machine.migration), or, where that can't be, to stop here and start elsewhere
// (Machine.move), which it takes back once the machine has arrived.

// defaultParallel is how many machines leave a server at once.
const defaultParallel = 2

// running sees to it that a machine that should run has a server, and another
// one when that is drained.
func (p *planner) running(m *argonv1.Machine) {
	switch {
	case m.GetServerId() == "", p.lost(m.GetServerId()):
		p.place(m)
	case restarts(m) && p.atRest(m):
		p.place(m)
	case p.leaves(m) && p.atRest(m):
		if why := p.nowhere(m); why != "" {
			p.goBack(m, why)
			return
		}
		p.place(m)
	case p.arrived(m):
		p.endMove(m)
	case p.drained(m.GetServerId()) && m.GetMove() == nil && m.GetMigration() == nil:
		p.beginMove(m)
	}
}

// leaves tells whether a machine has the order to leave the server that it is on.
func (p *planner) leaves(m *argonv1.Machine) bool {
	return m.GetMove() != nil && m.GetMove().GetPlacement() == m.GetPlacement()
}

// arrived tells whether a machine that moved has settled where it was placed,
// well or not: its place among those that move at once is free again.
func (p *planner) arrived(m *argonv1.Machine) bool {
	if m.GetMove() == nil || p.leaves(m) || m.GetStatus().GetPlacement() != m.GetPlacement() {
		return false
	}
	switch m.GetStatus().GetState() {
	case argonv1.MachineState_MACHINE_STATE_RUNNING, argonv1.MachineState_MACHINE_STATE_PAUSED, argonv1.MachineState_MACHINE_STATE_FAILED:
		return true
	}
	return false
}

func (p *planner) drained(serverID string) bool { return p.st.Servers[serverID].GetDrain() != nil }

// badDisk tells whether a server's disk is not used.
func (p *planner) badDisk(serverID string) bool {
	return placement.BadDisk(p.st.Servers[serverID]) != ""
}

// evacuated tells whether replicas are to leave a server, too.
func (p *planner) evacuated(serverID string) bool {
	return p.st.Servers[serverID].GetDrain().GetEvacuate()
}

// beginMove orders a machine to leave, if there is a place for it and not too many
// are under way already. A machine that fits nowhere stays and runs.
func (p *planner) beginMove(m *argonv1.Machine) {
	from := m.GetServerId()
	limit := int(cmp.Or(p.st.Servers[from].GetDrain().GetParallel(), defaultParallel))
	if p.moving(from) >= limit || placement.RunsNow(m) && placement.BeingSaved(p.st, m) != nil {
		return
	}
	if placement.KeptFromLeaving(p.st.Servers[from], m) {
		p.stays(m, "its migration was cancelled: stop it, or migrate it again")
		return
	}
	next := proto.CloneOf(m)
	message := fmt.Sprintf("leaves server %s, which is drained", p.name(from))
	to, err := p.whileItRuns(m)
	if err == nil {
		placement.Migrate(next, catalog.NewID(), to, p.now, placement.MigrationTime)
		message += ", and runs on"
		p.putMachine(m, next, message, machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-moves", message))
		return
	}
	if why := p.nowhere(m); why != "" {
		p.stays(m, why)
		return
	}
	next.Move = &argonv1.Move{FromServerId: from, Placement: m.GetPlacement(), Since: timestamppb.New(p.now)}
	message += fmt.Sprintf(": it is stopped here and started elsewhere, as %v", err)
	p.putMachine(m, next, message, machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-moves", message))
}

// whileItRuns chooses the server that a machine can go to while it runs, or says
// why it can't. One attempt that failed is enough, unless it failed with the
// server that it went to.
func (p *planner) whileItRuns(m *argonv1.Machine) (serverID string, err error) {
	failed := placement.FailedToLeave(p.st.Servers[m.GetServerId()], m)
	switch {
	case !placement.RunsNow(m):
		return "", errors.New("it does not run")
	case failed != nil && placement.Alive(p.st, failed.GetToServerId()):
		return "", fmt.Errorf("its migration failed: %s", failed.GetFailure())
	}
	return placement.PlaceElsewhere(p.settled(m), m)
}

// nowhere says why a machine could not run elsewhere now; empty if it could.
func (p *planner) nowhere(m *argonv1.Machine) string {
	if waits := p.waitsForDisk(m); waits != "" {
		return waits
	}
	if _, err := placement.PlaceMachine(p.settled(m), m); err != nil {
		return err.Error()
	}
	return ""
}

// settled is the cluster as it will be once those on their way, but one, have a
// place: what they will take is not free.
func (p *planner) settled(but *argonv1.Machine) *catalog.State {
	st := scratch(p.st)
	for _, id := range sortedKeys(st.Machines) {
		m := st.Machines[id]
		if id == but.GetMeta().GetId() || !p.leaves(m) {
			continue
		}
		if to, err := placement.PlaceMachine(st, m); err == nil {
			next := proto.CloneOf(m)
			next.ServerId = to
			st.Machines[id] = next
		}
	}
	return st
}

// goBack takes the order back from a machine that was stopped, and now fits nowhere
// else: it starts again where it was.
func (p *planner) goBack(m *argonv1.Machine, why string) {
	next := proto.CloneOf(m)
	next.Move = nil
	message := fmt.Sprintf("starts again on server %s, which is drained: %s", p.name(m.GetServerId()), why)
	p.putMachine(m, next, message, machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-stays", message))
}

// moving counts the machines on their way from a server, running or not.
func (p *planner) moving(from string) int {
	n := 0
	for _, m := range p.st.Machines {
		if m.GetMove().GetFromServerId() == from || m.GetMigration() != nil && m.GetServerId() == from {
			n++
		}
	}
	return n
}

// stays tells why a machine can't leave a drained server, once.
func (p *planner) stays(m *argonv1.Machine, why string) {
	message := fmt.Sprintf("stays on server %s, which is drained: %s", p.name(m.GetServerId()), why)
	p.act(Action{
		Why: fmt.Sprintf("machine %s %s", m.GetMeta().GetName(), message), OnlyNews: true,
		Events: []*argonv1.Event{machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-stays", message)},
	})
}

// endMove takes the order back.
func (p *planner) endMove(m *argonv1.Machine) {
	next := proto.CloneOf(m)
	next.Move = nil
	message := fmt.Sprintf("moved from server %s to %s", p.name(m.GetMove().GetFromServerId()), p.name(m.GetServerId()))
	p.putMachine(m, next, message, machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-moved", message))
}
