package controller

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// machine sees to it that a machine that should run has a server, and that
// one that should not gives its server back.
func (p *planner) machine(m *argonv1.Machine) {
	switch m.GetWanted() {
	case argonv1.Wanted_WANTED_REMOVED:
		if p.atRest(m) {
			p.removeMachine(m)
		}
	case argonv1.Wanted_WANTED_STOPPED:
		if p.atRest(m) {
			p.unplace(m)
		}
	case argonv1.Wanted_WANTED_SUSPENDED:
		switch {
		case m.GetWake() == nil && !p.beingSuspended(m):
			next := proto.CloneOf(m)
			next.Wanted = argonv1.Wanted_WANTED_RUNNING
			p.putMachine(m, next, "is not being suspended any more")
		case m.GetWake() != nil && m.GetServerId() != "" && p.atRest(m):
			p.unplace(m)
		}
	case argonv1.Wanted_WANTED_RUNNING:
		p.running(m)
	}
}

// atRest tells whether nothing of the machine can run: it has no server, its
// server is lost, or the agent there says that this placement has stopped.
func (p *planner) atRest(m *argonv1.Machine) bool {
	if m.GetServerId() == "" || p.lost(m.GetServerId()) {
		return true
	}
	s, rests := m.GetStatus(), argonv1.MachineState_MACHINE_STATE_STOPPED
	if m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED {
		rests = argonv1.MachineState_MACHINE_STATE_SUSPENDED
	}
	return s.GetState() == rests &&
		s.GetServerId() == m.GetServerId() && s.GetPlacement() == m.GetPlacement()
}

func (p *planner) removeMachine(m *argonv1.Machine) {
	delete(p.st.Machines, m.GetMeta().GetId())
	p.act(Action{
		Why:    fmt.Sprintf("machine %s is removed", m.GetMeta().GetName()),
		Delete: []proto.Message{m},
		Events: []*argonv1.Event{machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-removed", "removed")},
	})
}

// unplace takes a stopped machine off its server, so that others may have the
// memory.
func (p *planner) unplace(m *argonv1.Machine) {
	next := proto.CloneOf(m)
	reason := m.GetStatus().GetReason()
	if m.GetServerId() != "" && p.lost(m.GetServerId()) {
		reason = fmt.Sprintf("its server %s was lost", p.name(m.GetServerId()))
	}
	if m.GetServerId() != "" {
		next.RanOn = m.GetServerId()
	}
	next.ServerId, next.Move = "", nil
	p.endMigration(next, "the machine was stopped")
	state, what := argonv1.MachineState_MACHINE_STATE_STOPPED, "is stopped"
	if m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED {
		state, what = argonv1.MachineState_MACHINE_STATE_SUSPENDED, "is suspended"
	} else if next.GetWake() == nil {
		placement.Settle(next)
	}
	p.setStatus(next, state, reason)
	p.putMachine(m, next, what+" and gives its server back")
}

// place finds a server for a machine that has none, or whose server is lost.
func (p *planner) place(m *argonv1.Machine) {
	next := proto.CloneOf(m)
	p.endMigration(next, fmt.Sprintf("server %s was lost", p.name(m.GetServerId())))
	var events []*argonv1.Event
	prefix := ""
	switch {
	case restarts(m) && !p.lost(m.GetServerId()):
		prefix = "is restarted"
	case m.GetServerId() != "" && !p.lost(m.GetServerId()):
		prefix = fmt.Sprintf("moved off server %s", p.name(m.GetServerId()))
	case m.GetServerId() != "":
		prefix = fmt.Sprintf("server %s is lost", p.name(m.GetServerId()))
		if !strings.HasPrefix(m.GetStatus().GetReason(), prefix) {
			events = append(events, machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-lost", prefix))
		}
		events = append(events, p.onLoss(next)...)
	}
	if waits := p.waitsForDisk(m); waits != "" {
		p.setStatus(next, argonv1.MachineState_MACHINE_STATE_PENDING, join(prefix, waits))
		p.putMachine(m, next, "waits: "+waits, events...)
		return
	}
	serverID, err := p.placeFor(next)
	if err != nil {
		p.setStatus(next, argonv1.MachineState_MACHINE_STATE_PENDING, join(prefix, err.Error()))
		events = append(events, machineEvent(m, argonv1.Severity_SEVERITY_ERROR, "machine-unplaceable", err.Error()))
		p.putMachine(m, next, "has no server: "+err.Error(), events...)
		return
	}
	next.ServerId, next.Placement, next.StartOn = serverID, placement.NextPlacement(m), ""
	if restarts(m) {
		next.Move, next.ForceStop = nil, false
		prefix = "restarted"
	}
	to := "starting on " + p.name(serverID)
	p.setStatus(next, argonv1.MachineState_MACHINE_STATE_PENDING, join(prefix, to))
	events = append(events, machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-placed", to))
	p.putMachine(m, next, "is placed on "+p.name(serverID), events...)
}

// restarts tells whether a machine has stopped to be started again.
func restarts(m *argonv1.Machine) bool {
	return m.GetMove().GetRestart() && m.GetMove().GetPlacement() == m.GetPlacement()
}

// placeFor chooses a server for a machine that boots or goes on.
func (p *planner) placeFor(m *argonv1.Machine) (serverID string, err error) {
	if m.GetWake() != nil {
		return placement.PlaceAwake(p.st, m)
	}
	return placement.PlaceMachine(p.st, m)
}

// onLoss does what a machine's policy says when it is lost while it runs.
func (p *planner) onLoss(m *argonv1.Machine) []*argonv1.Event {
	ran := m.GetStatus().GetPlacement() == m.GetPlacement() && slices.Contains([]argonv1.MachineState{
		argonv1.MachineState_MACHINE_STATE_RUNNING, argonv1.MachineState_MACHINE_STATE_PAUSED, argonv1.MachineState_MACHINE_STATE_STOPPING,
		argonv1.MachineState_MACHINE_STATE_SUSPENDING,
	}, m.GetStatus().GetState())
	if m.GetOnLoss() != argonv1.OnLoss_ON_LOSS_RESUME || m.GetWake() != nil || !ran {
		return nil
	}
	c := placement.LastCheckpoint(p.st, m.GetMeta().GetId())
	if c == nil {
		return []*argonv1.Event{machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-not-resumed",
			"it has no checkpoint to be resumed from: it is started")}
	}
	m.Wake = &argonv1.Wake{CheckpointId: c.GetMeta().GetId(), OrStart: true}
	m.GenerationId = placement.NextGeneration(c.GetMachine(), catalog.NewGeneration())
	return []*argonv1.Event{machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-resumed-from",
		fmt.Sprintf("it goes on from checkpoint %s of %s: what it did since then is lost",
			c.GetMeta().GetName(), c.GetTaken().AsTime().UTC().Format("2006-01-02 15:04:05 MST")))}
}

// endMigration takes the order to migrate off a machine that its agent does not
// carry out any more: nothing of it is wanted on the other server.
func (p *planner) endMigration(m *argonv1.Machine, why string) {
	if mig := m.GetMigration(); mig != nil {
		m.LastMigration = &argonv1.MigrationReport{
			Id: mig.GetId(), FromServerId: m.GetServerId(), ToServerId: mig.GetToServerId(),
			Since: mig.GetSince(), Ended: timestamppb.New(p.now), Failure: why, Progress: mig.GetProgress(),
			DrainSince: p.st.Servers[m.GetServerId()].GetDrain().GetSince(),
		}
		m.Migration = nil
	}
}

// waitsForDisk says which of the machine's volumes no server could serve now;
// empty if none. There is no use in moving a machine away from its data.
func (p *planner) waitsForDisk(m *argonv1.Machine) string {
	for _, id := range m.GetVolumeIds() {
		v := p.st.Volumes[id]
		if p.beingMade(v) {
			return fmt.Sprintf("its volume %s is still being made", v.GetMeta().GetName())
		}
		var inSync, alive int
		var away []string
		for _, r := range v.GetReplicas() {
			if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
				continue
			}
			inSync++
			if placement.Alive(p.st, r.GetServerId()) {
				alive++
			} else {
				away = append(away, p.name(r.GetServerId()))
			}
		}
		name := v.GetMeta().GetName()
		switch {
		case v == nil:
			return fmt.Sprintf("its volume %s does not exist any more", id)
		case v.GetRemoving():
			return fmt.Sprintf("its volume %s is being removed", name)
		case inSync == 0 && v.GetEpoch() == 0:
			return fmt.Sprintf("its volume %s is still being made", name)
		case inSync == 0:
			return fmt.Sprintf("its volume %s has no replica in sync: see `argon volume show %s`", name, name)
		case alive == 0:
			return fmt.Sprintf("its volume %s is in sync only on %s: start that server", name, strings.Join(away, ", "))
		}
	}
	return ""
}

// beingMade tells whether a server is about to make a replica of a volume that
// was never attached, and has what it is made from: that takes a moment, and attached
// before, the volume would be without it for longer. An image that is still on its
// way there is not waited for, as long as another replica is in sync.
func (p *planner) beingMade(v *argonv1.Volume) bool {
	if v.GetEpoch() != 0 {
		return false
	}
	from := placement.BaseServers(p.st, v)
	return slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool {
		atHand := v.GetBase() == nil || slices.Contains(from, r.GetServerId())
		return r.GetState() == creating && r.GetReason() == "" && placement.Alive(p.st, r.GetServerId()) && atHand
	})
}

// putMachine plans the change from old to next, if there is one. Its events
// are told with the change only, so what stays the same is not told twice.
func (p *planner) putMachine(old, next *argonv1.Machine, what string, events ...*argonv1.Event) {
	if proto.Equal(old, next) {
		return
	}
	p.st.Machines[next.GetMeta().GetId()] = next
	p.act(Action{
		Why:    fmt.Sprintf("machine %s %s", next.GetMeta().GetName(), what),
		Put:    []proto.Message{next},
		Events: events,
	})
}

// setStatus describes a machine that runs nowhere. What stays the same keeps
// its time.
func (p *planner) setStatus(m *argonv1.Machine, state argonv1.MachineState, reason string) {
	old := m.GetStatus()
	next := &argonv1.MachineStatus{
		State: state, Reason: reason, ServerId: m.GetServerId(), Placement: m.GetPlacement(),
		Starts: old.GetStarts(), Since: timestamppb.New(p.now),
	}
	if old.GetState() == state && old.GetServerId() == next.GetServerId() && old.GetPlacement() == next.GetPlacement() {
		next.Since = old.GetSince()
	}
	m.Status = next
}

func machineEvent(m *argonv1.Machine, severity argonv1.Severity, reason, message string) *argonv1.Event {
	return &argonv1.Event{
		Severity: severity, Kind: "machine", SubjectId: m.GetMeta().GetId(), SubjectName: m.GetMeta().GetName(),
		Reason: reason, Message: message,
	}
}

func join(parts ...string) string {
	var said []string
	for _, s := range parts {
		if s != "" {
			said = append(said, s)
		}
	}
	return strings.Join(said, "; ")
}
