package controller

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file has checkpoints taken when it is time, ends those that can't be
// taken any more, and removes what is left of those that are not wanted.

const (
	beginsWithin = 5 * time.Minute
	// failureShown is how long the record of one that was not taken stays.
	failureShown = 10 * time.Minute

	cpWanted   = argonv1.CheckpointState_CHECKPOINT_STATE_WANTED
	cpTaking   = argonv1.CheckpointState_CHECKPOINT_STATE_TAKING
	cpReady    = argonv1.CheckpointState_CHECKPOINT_STATE_READY
	cpFailed   = argonv1.CheckpointState_CHECKPOINT_STATE_FAILED
	cpRemoving = argonv1.CheckpointState_CHECKPOINT_STATE_REMOVING

	forSuspend = argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND
	scheduled  = argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SCHEDULED
)

func (p *planner) checkpoint(c *argonv1.Checkpoint) {
	m := p.st.Machines[c.GetMachineId()]
	switch c.GetState() {
	case cpWanted, cpTaking:
		if why := p.hopeless(c, m); why != "" {
			p.failCheckpoint(c, m, why)
		}
	case cpReady:
		consumed := c.GetPurpose() == forSuspend && m.GetWake().GetCheckpointId() != c.GetMeta().GetId()
		if (m == nil || consumed) && !p.awaited(c) {
			p.setCheckpoint(c, cpRemoving, "")
		}
	case cpFailed, cpRemoving:
		p.discard(c)
	}
}

// hopeless says why a checkpoint can't be taken any more; empty while it can.
func (p *planner) hopeless(c *argonv1.Checkpoint, m *argonv1.Machine) string {
	want := argonv1.Wanted_WANTED_RUNNING
	if c.GetPurpose() == forSuspend {
		want = argonv1.Wanted_WANTED_SUSPENDED
	}
	server := cmp.Or(c.GetServerId(), m.GetServerId())
	switch {
	case m == nil:
		return "the machine is gone"
	case m.GetWanted() != want:
		return "the machine is to do something else now"
	case server == "":
		return "the machine does not run"
	case p.lost(server):
		return fmt.Sprintf("server %s is lost", p.name(server))
	case c.GetState() == cpTaking && (m.GetServerId() != c.GetServerId() || m.GetPlacement() != c.GetPlacement()):
		return "the machine has left the server that took it"
	case c.GetState() == cpWanted && p.seen.checkpointIs(c, p.now) > beginsWithin:
		return "it was not begun in time"
	}
	return ""
}

// failCheckpoint ends one that is not there yet. A machine that was to be
// suspended to it runs on, or starts again.
func (p *planner) failCheckpoint(c *argonv1.Checkpoint, m *argonv1.Machine, why string) {
	next := proto.CloneOf(c)
	next.State, next.Reason = cpFailed, why
	p.st.Checkpoints[c.GetMeta().GetId()] = next
	a := Action{Why: fmt.Sprintf("checkpoint %s is given up: %s", c.GetMeta().GetName(), why), Put: []proto.Message{next}}
	if m != nil {
		a.Events = []*argonv1.Event{machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "checkpoint-failed",
			fmt.Sprintf("checkpoint %s was not taken: %s", c.GetMeta().GetName(), why))}
	}
	if c.GetPurpose() == forSuspend && m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED && m.GetWake() == nil {
		runs := proto.CloneOf(m)
		runs.Wanted = argonv1.Wanted_WANTED_RUNNING
		p.st.Machines[m.GetMeta().GetId()] = runs
		a.Put = append(a.Put, runs)
	}
	p.act(a)
}

func (p *planner) setCheckpoint(c *argonv1.Checkpoint, state argonv1.CheckpointState, why string) {
	next := proto.CloneOf(c)
	next.State, next.Reason = state, why
	p.st.Checkpoints[c.GetMeta().GetId()] = next
	p.act(Action{Why: fmt.Sprintf("checkpoint %s goes", c.GetMeta().GetName()), Put: []proto.Message{next}})
}

// awaited tells whether a machine is to go on from a checkpoint.
func (p *planner) awaited(c *argonv1.Checkpoint) bool {
	for _, m := range p.st.Machines {
		if m.GetWake().GetCheckpointId() == c.GetMeta().GetId() {
			return true
		}
	}
	return false
}

// beingSuspended tells whether a machine's memory is being saved for that.
func (p *planner) beingSuspended(m *argonv1.Machine) bool {
	return slices.ContainsFunc(placement.CheckpointsOf(p.st, m.GetMeta().GetId()), func(c *argonv1.Checkpoint) bool {
		return c.GetPurpose() == forSuspend && (c.GetState() == cpWanted || c.GetState() == cpTaking)
	})
}

// discard removes what a checkpoint is made of, and then its record. Snapshots
// that other volumes are based on stay until those need them no more.
func (p *planner) discard(c *argonv1.Checkpoint) {
	if p.awaited(c) {
		return
	}
	left := false
	for _, id := range sortedKeys(c.GetSnapshots()) {
		v := p.st.Volumes[id]
		if placement.Snapshot(v, c.GetSnapshots()[id]) == nil {
			continue
		}
		left = true
		next := proto.CloneOf(v)
		dropSnapshot(next, c.GetSnapshots()[id])
		p.putVolume(v, next, "loses a checkpoint's snapshot")
	}
	if v := p.st.Volumes[c.GetMemoryVolumeId()]; v != nil {
		left = true
		next := proto.CloneOf(v)
		next.Removing = true
		p.putVolume(v, next, "is not needed any more")
	}
	shown := c.GetState() == cpFailed && p.seen.checkpointIs(c, p.now) < failureShown && p.st.Machines[c.GetMachineId()] != nil
	if left || shown {
		return
	}
	delete(p.st.Checkpoints, c.GetMeta().GetId())
	p.act(Action{Why: fmt.Sprintf("checkpoint %s is removed", c.GetMeta().GetName()), Delete: []proto.Message{c}})
}

// dropSnapshot takes a snapshot off the record at once if it was never taken;
// else it goes when nothing is based on it.
func dropSnapshot(v *argonv1.Volume, id uint32) {
	if s := placement.Snapshot(v, id); s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_READY {
		s.Removing = true
		return
	}
	v.Snapshots = slices.DeleteFunc(v.Snapshots, func(s *argonv1.Snapshot) bool { return s.GetId() == id })
}

func (p *planner) putVolume(old, next *argonv1.Volume, what string) {
	if proto.Equal(old, next) {
		return
	}
	p.st.Volumes[next.GetMeta().GetId()] = next
	p.act(Action{Why: fmt.Sprintf("volume %s %s", next.GetMeta().GetName(), what), Put: []proto.Message{next}})
}

// schedule asks for a checkpoint of a machine when it is time, and prunes the
// oldest ones that were taken so.
func (p *planner) schedule(m *argonv1.Machine) {
	every := seconds(m.GetCheckpointEverySeconds())
	busy, ready := placement.BeingSaved(p.st, m) != nil, []*argonv1.Checkpoint{}
	due := p.due(m.GetStatus().GetSince(), every)
	for _, c := range placement.CheckpointsOf(p.st, m.GetMeta().GetId()) {
		if c.GetPurpose() != scheduled {
			continue
		}
		due = due && p.due(c.GetMeta().GetCreated(), every)
		if c.GetState() == cpReady && !p.awaited(c) {
			ready = append(ready, c)
		}
	}
	for keep := int(max(1, m.GetCheckpointsKept())); len(ready) > keep; ready = ready[1:] {
		p.setCheckpoint(ready[0], cpRemoving, "")
	}
	runs := m.GetStatus().GetState() == argonv1.MachineState_MACHINE_STATE_RUNNING && m.GetStatus().GetPlacement() == m.GetPlacement()
	if every == 0 || busy || !runs || m.GetWanted() != argonv1.Wanted_WANTED_RUNNING || m.GetMigration() != nil || !due {
		return
	}
	c, memory, err := placement.NewCheckpoint(p.st, m, "", scheduled, placement.CheckpointIDs{Checkpoint: catalog.NewID(), Memory: catalog.NewID()}, p.now)
	if err != nil {
		p.act(Action{Why: "a checkpoint is due", OnlyNews: true, Events: []*argonv1.Event{
			machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "checkpoint-failed", "a checkpoint is due: "+err.Error()),
		}})
		return
	}
	p.act(Action{Why: fmt.Sprintf("checkpoint %s of machine %s is due", c.GetMeta().GetName(), m.GetMeta().GetName()), Create: []proto.Message{c, memory}})
}
