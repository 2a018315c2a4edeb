package agent

import (
	"cmp"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

const (
	statePending  = argonv1.MachineState_MACHINE_STATE_PENDING
	stateStarting = argonv1.MachineState_MACHINE_STATE_STARTING
	stateRunning  = argonv1.MachineState_MACHINE_STATE_RUNNING
	statePaused   = argonv1.MachineState_MACHINE_STATE_PAUSED
	stateStopping = argonv1.MachineState_MACHINE_STATE_STOPPING
	stateStopped  = argonv1.MachineState_MACHINE_STATE_STOPPED
	stateFailed   = argonv1.MachineState_MACHINE_STATE_FAILED

	stateSuspending = argonv1.MachineState_MACHINE_STATE_SUSPENDING
	stateSuspended  = argonv1.MachineState_MACHINE_STATE_SUSPENDED
)

// observation is a machine's state as this server sees it.
type observation struct {
	state        argonv1.MachineState
	reason       string
	acceleration hypervisor.Acceleration
	machineType  string
	guest        *argonv1.GuestInfo
	// shares says what of its shares can't be.
	shares string
	// devices says why its devices are not as wanted yet.
	devices string
}

// observe says how a machine that belongs here does. ok is false while
// nothing can be said: a guest was found and has not answered yet, or the
// server may not start anything and somebody else may know better.
func observe(m *argonv1.Machine, serverID string, seen machineSeen, allowed bool) (o observation, ok bool) {
	if !belongs(m, serverID) {
		return observation{}, false
	}
	if len(seen.guests) > 0 {
		// One that has exited, or is of another placement, is about to be
		// forgotten or killed.
		g := seen.guests[0]
		if g.exited || g.placement != m.GetPlacement() || !g.adopted || inTransit(g) || beingSent(m, g) {
			return observation{}, false
		}
		return observeGuest(m, g, seen.disks), true
	}
	switch {
	case m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED:
		return observeSuspended(m, seen.disks)
	case wanted(m) != argonv1.Wanted_WANTED_RUNNING && seen.disks.held:
		return observation{state: stateStopping, reason: whyStopped(m)}, true
	case wanted(m) != argonv1.Wanted_WANTED_RUNNING:
		return observation{state: stateStopped, reason: whyStopped(m)}, true
	case !allowed:
		return observation{}, false
	case seen.failure != "":
		return observation{state: stateFailed, reason: seen.failure}, true
	}
	return observation{state: stateStarting, reason: cmp.Or(seen.doing, seen.disks.waits)}, true
}

// observeSuspended says how a machine without a guest does that is to be
// suspended. One whose memory is not in the store has lost it, and is about to be
// wanted running again.
func observeSuspended(m *argonv1.Machine, disks disksSeen) (o observation, ok bool) {
	switch {
	case m.GetWake() == nil:
		return observation{}, false
	case disks.held:
		return observation{state: stateSuspending}, true
	}
	return observation{state: stateSuspended}, true
}

// whyStopped keeps the reason of a stop until the next start.
func whyStopped(m *argonv1.Machine) string {
	if s := m.GetStatus(); s.GetState() == stateStopping || s.GetState() == stateStopped {
		return s.GetReason()
	}
	return ""
}

func observeGuest(m *argonv1.Machine, g guestSeen, disks disksSeen) observation {
	o := observation{state: stateRunning, acceleration: g.acceleration, machineType: g.machineType, guest: g.info, shares: g.sharesDetail, devices: g.devicesDetail}
	switch {
	case m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED:
		o.state = stateSuspending
	case g.saving:
		// It stands still for a moment only.
	case wanted(m) != argonv1.Wanted_WANTED_RUNNING || !g.powerDownAt.IsZero():
		o.state = stateStopping
	case g.status.State == hypervisor.ShutDown:
		o.state, o.reason = stateStopping, "powered off from inside"
	case g.status.State == hypervisor.Halted:
		o.state, o.reason = statePaused, "its process was "+g.status.Detail
	case g.status.State == hypervisor.Paused:
		o.state, o.reason = statePaused, cmp.Or(disks.waits, g.status.Detail)
	case disks.waits != "":
		o.state, o.reason = statePaused, disks.waits
	}
	return o
}

// apply writes an observation into a machine's status and reports whether that
// changed anything.
func (o observation) apply(m *argonv1.Machine, serverID string, now time.Time) bool {
	old := m.GetStatus()
	next := &argonv1.MachineStatus{
		State: o.state, ServerId: serverID, Placement: m.GetPlacement(), Reason: o.reason,
		Acceleration: string(o.acceleration), MachineType: o.machineType, Starts: old.GetStarts(), Since: old.GetSince(),
		Guest:        o.guest,
		SharesDetail: o.shares, DevicesDetail: o.devices,
	}
	if runs(o.state) && next.Acceleration == "" {
		next.Acceleration = old.GetAcceleration()
	}
	if runs(o.state) && next.MachineType == "" {
		next.MachineType = old.GetMachineType()
	}
	same := old.GetState() == next.State && old.GetServerId() == serverID && old.GetPlacement() == next.Placement
	if same && old.GetReason() == next.Reason && old.GetAcceleration() == next.Acceleration && proto.Equal(old.GetGuest(), next.Guest) &&
		old.GetSharesDetail() == o.shares && old.GetDevicesDetail() == o.devices && old.GetMachineType() == next.MachineType {
		return false
	}
	if !same {
		next.Since = timestamppb.New(now)
	}
	if o.hasGuest() && (!runs(old.GetState()) || old.GetPlacement() != next.Placement) {
		next.Starts++
	}
	m.Status = next
	return true
}

// hasGuest tells whether a guest was seen. A machine that is told to stop before
// its guest was started stops without one, as long as it has its disks.
func (o observation) hasGuest() bool {
	return runs(o.state) && (o.state != stateStopping || o.acceleration != "")
}

// runs tells whether a guest exists in a state.
func runs(s argonv1.MachineState) bool {
	return s == stateRunning || s == statePaused || s == stateStopping || s == stateSuspending
}

// tell is the event that goes with a change of status; nil if none does.
func tell(m *argonv1.Machine, old *argonv1.MachineStatus, serverName string) *argonv1.Event {
	now := m.GetStatus()
	if now.GetState() == old.GetState() && now.GetPlacement() == old.GetPlacement() {
		return nil
	}
	started := !runs(old.GetState()) || old.GetPlacement() != now.GetPlacement()
	switch now.GetState() {
	case stateRunning:
		if started {
			return machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-started",
				fmt.Sprintf("runs on %s (%s)", serverName, now.GetAcceleration()))
		}
		if old.GetState() == statePaused {
			return machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-resumed", "goes on")
		}
	case statePaused:
		if started { // its disk was not there at once
			return machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-started",
				fmt.Sprintf("runs on %s (%s), and stands still: %s", serverName, now.GetAcceleration(), now.GetReason()))
		}
		return machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-paused", "stands still: "+now.GetReason())
	case stateSuspended:
		return machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-suspended", "its memory is in the store")
	case stateStopped:
		return machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-stopped", cmp.Or(now.GetReason(), "stopped"))
	case stateFailed:
		return machineEvent(m, argonv1.Severity_SEVERITY_ERROR, "machine-failed", now.GetReason())
	}
	return nil
}

func machineEvent(m *argonv1.Machine, severity argonv1.Severity, reason, message string) *argonv1.Event {
	return &argonv1.Event{
		Severity: severity, Kind: "machine", SubjectId: m.GetMeta().GetId(), SubjectName: m.GetMeta().GetName(),
		Reason: reason, Message: message,
	}
}
