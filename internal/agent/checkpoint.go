package agent

import (
	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file decides about checkpoints, and about machines that go on from one:
// functions without effects.
//
// A checkpoint is taken by one run of one server's agent, from its beginning to
// its end, or not at all: what an earlier run has begun is given up. It counts
// from the change of the records on that says so; that of a machine which is
// suspended also makes the machine one that goes on from there, and the guest,
// which has stood still since its memory was saved, is killed only after that.
// So there is the guest or the memory, never none and never both.

const (
	cpWanted = argonv1.CheckpointState_CHECKPOINT_STATE_WANTED
	cpTaking = argonv1.CheckpointState_CHECKPOINT_STATE_TAKING
	cpReady  = argonv1.CheckpointState_CHECKPOINT_STATE_READY
	cpFailed = argonv1.CheckpointState_CHECKPOINT_STATE_FAILED

	forSuspend = argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND
)

// checkpointStep is what to do next with a checkpoint.
type checkpointStep uint8

const (
	letBe checkpointStep = iota
	take
	// abandon ends one that an earlier run has begun.
	abandon
)

func (s checkpointStep) String() string {
	return [...]string{"let be", "take", "abandon"}[s]
}

// nextForCheckpoint names a checkpoint's next step. begun: this run is taking it.
func nextForCheckpoint(c *argonv1.Checkpoint, m *argonv1.Machine, serverID string, seen machineSeen, begun, allowed bool) checkpointStep {
	switch {
	case begun && (c.GetState() == cpWanted || c.GetState() == cpTaking):
		return take
	case c.GetState() == cpTaking && c.GetServerId() == serverID:
		return abandon
	case c.GetState() == cpWanted && allowed && belongs(m, serverID) && canBeSaved(c, m, seen):
		return take
	}
	return letBe
}

// canBeSaved tells whether the machine's guest is here, runs, and is wanted so.
func canBeSaved(c *argonv1.Checkpoint, m *argonv1.Machine, seen machineSeen) bool {
	want := argonv1.Wanted_WANTED_RUNNING
	if c.GetPurpose() == forSuspend {
		want = argonv1.Wanted_WANTED_SUSPENDED
	}
	if m.GetWanted() != want || m.GetWake() != nil || m.GetMigration() != nil || len(seen.guests) != 1 || !seen.disks.ready {
		return false
	}
	g := seen.guests[0]
	return g.adopted && !g.exited && g.placement == m.GetPlacement() && g.status.State == hypervisor.Running
}

// nextForSleeper decides about a machine without a guest that is to go on from a
// checkpoint.
func nextForSleeper(m *argonv1.Machine, disks disksSeen) machineStep {
	switch {
	case !m.GetWake().GetChecked():
		return check
	case disks.ready:
		return wake
	}
	return rest
}

// superseded tells whether the memory of a machine is in the store, so that a
// guest of it must not go on: it was saved for that, or was begun to be made of
// it and its maker is gone. A view that is behind still shows the order that the
// guest was made by.
func superseded(m *argonv1.Machine, g guestSeen) bool {
	return m.GetWake() != nil && m.GetWake().GetCheckpointId() != g.wokenFrom
}

// leftStanding tells whether a guest stands still and nobody is about to make it
// go on: whoever was is gone, or has failed.
func leftStanding(m *argonv1.Machine, g guestSeen) bool {
	return m.GetMigration() == nil && (g.status.Detail == "paused" || g.status.State == hypervisor.Left || neverRan(g))
}

// beingSuspended tells whether a machine's memory is being saved to suspend it, by
// whichever run of the daemon. Its guest may go on only once the record says that
// it was not: the change that says it was could still be on its way.
func beingSuspended(st *catalog.State, m *argonv1.Machine) bool {
	if m.GetWanted() != argonv1.Wanted_WANTED_SUSPENDED {
		return false
	}
	c := placement.BeingSaved(st, m)
	return c.GetState() == cpTaking && c.GetPurpose() == forSuspend
}

// sleepsAfter tells whether a machine's disks are to be let alone until its
// checkpoint was looked at.
func sleepsAfter(m *argonv1.Machine) bool { return m.GetWake() != nil && !m.GetWake().GetChecked() }
