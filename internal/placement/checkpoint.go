package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/checkpoint"
)

// This file says what a checkpoint is made of in the records, and what it needs.

// MemoryVolume is the volume for the memory of a checkpoint of a machine: thin,
// as large as the memory could become, and with as many replicas as the machine's
// disks have. The error says what no server has room for.
func MemoryVolume(st *catalog.State, m *argonv1.Machine, checkpointID, volumeID string, now time.Time) (*argonv1.Volume, error) {
	replicas := uint32(1)
	for _, id := range m.GetVolumeIds() {
		replicas = max(replicas, st.Volumes[id].GetReplicasWanted())
	}
	memory := m.GetMemoryBytes()
	size := (memory + checkpoint.Overhead(memory) + 1<<20 - 1) &^ (1<<20 - 1)
	// All that it may come to is there soon, unlike with a disk.
	servers, err := PlaceReplicas(st, Replicas{Count: int(replicas), NeedBytes: size, SizeBytes: size})
	if len(servers) == 0 {
		return nil, fmt.Errorf("there is no room for its memory: %w", err)
	}
	v := &argonv1.Volume{
		Meta:      &argonv1.Meta{Id: volumeID, Name: "memory-" + strings.ToLower(checkpointID)},
		SizeBytes: size, ReplicasWanted: replicas, NextReplicaId: 1, CheckpointId: checkpointID,
	}
	for _, id := range servers {
		v.Replicas = append(v.Replicas, &argonv1.Replica{
			Id: v.NextReplicaId, ServerId: id, State: argonv1.ReplicaState_REPLICA_STATE_CREATING, Since: timestamppb.New(now),
		})
		v.NextReplicaId++
	}
	return v, nil
}

// CheckpointIDs are new ones.
type CheckpointIDs struct{ Checkpoint, Memory string }

// NewCheckpoint makes the records of a checkpoint that is to be taken, and of
// the volume for its memory. An empty name: the machine's, with the time.
func NewCheckpoint(st *catalog.State, m *argonv1.Machine, name string, purpose argonv1.CheckpointPurpose, ids CheckpointIDs, now time.Time) (*argonv1.Checkpoint, *argonv1.Volume, error) {
	memory, err := MemoryVolume(st, m, ids.Checkpoint, ids.Memory, now)
	if err != nil {
		return nil, nil, err
	}
	return &argonv1.Checkpoint{
		Meta:      &argonv1.Meta{Id: ids.Checkpoint, Name: cmp.Or(name, nameAt(m, now)), Created: timestamppb.New(now)},
		MachineId: m.GetMeta().GetId(), State: argonv1.CheckpointState_CHECKPOINT_STATE_WANTED, Purpose: purpose,
		MemoryVolumeId: ids.Memory,
	}, memory, nil
}

// nameAt names a machine's checkpoint after its time.
func nameAt(m *argonv1.Machine, now time.Time) string {
	const most = 63 - len("-20060102-150405")
	name := m.GetMeta().GetName()
	return name[:min(len(name), most)] + now.UTC().Format("-20060102-150405")
}

// CheckpointsOf lists a machine's checkpoints, oldest first.
func CheckpointsOf(st *catalog.State, machineID string) []*argonv1.Checkpoint {
	var found []*argonv1.Checkpoint
	for _, c := range st.Checkpoints {
		if c.GetMachineId() == machineID {
			found = append(found, c)
		}
	}
	slices.SortFunc(found, func(a, b *argonv1.Checkpoint) int {
		// Ids sort by the clocks of those who made them.
		return cmp.Or(cmp.Compare(a.GetMeta().GetCreatedRevision(), b.GetMeta().GetCreatedRevision()),
			cmp.Compare(a.GetMeta().GetId(), b.GetMeta().GetId()))
	})
	return found
}

// LastCheckpoint is the newest that a machine can be resumed from; nil if there
// is none.
func LastCheckpoint(st *catalog.State, machineID string) *argonv1.Checkpoint {
	has := st.Machines[machineID].GetVolumeIds()
	for _, c := range slices.Backward(CheckpointsOf(st, machineID)) {
		gone := without(AsStarted(c.GetMachine()).GetVolumeIds(), has) // its memory knows a disk that it has no more
		if c.GetPurpose() != argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND && len(gone) == 0 && Unusable(st, c) == "" {
			return c
		}
	}
	return nil
}

// Unusable says in one line why nothing can go on from a checkpoint; empty if
// something can, as far as the records tell.
func Unusable(st *catalog.State, c *argonv1.Checkpoint) string {
	if c.GetState() != argonv1.CheckpointState_CHECKPOINT_STATE_READY {
		return "it is " + strings.ToLower(strings.TrimPrefix(c.GetState().String(), "CHECKPOINT_STATE_"))
	}
	memory := st.Volumes[c.GetMemoryVolumeId()]
	if memory == nil || memory.GetRemoving() {
		return "the volume with its memory is gone"
	}
	if why := unserved(st, memory); why != "" {
		return "the volume with its memory " + why
	}
	if c.GetPurpose() == argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND {
		return ""
	}
	for _, id := range AsStarted(c.GetMachine()).GetVolumeIds() {
		v := st.Volumes[id]
		s := Snapshot(v, c.GetSnapshots()[id])
		switch {
		case v == nil || v.GetRemoving():
			return fmt.Sprintf("its disk %s is gone", cmp.Or(v.GetMeta().GetName(), id))
		case s == nil || s.GetRemoving() || s.GetState() != argonv1.SnapshotState_SNAPSHOT_STATE_READY:
			return fmt.Sprintf("the snapshot of its disk %s is gone", v.GetMeta().GetName())
		}
	}
	return ""
}

// NextGeneration is the generation of a machine that goes on from a checkpoint,
// fresh being one that nobody has: none if the machine had none at the checkpoint,
// as its memory knows no such device.
func NextGeneration(was *argonv1.Machine, fresh string) string {
	if was.GetGenerationId() == "" {
		return ""
	}
	return fresh
}

// unserved says why no server could serve a volume now; empty if one could.
func unserved(st *catalog.State, v *argonv1.Volume) string {
	inSync := 0
	for _, r := range v.GetReplicas() {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
			continue
		}
		if Alive(st, r.GetServerId()) {
			return ""
		}
		inSync++
	}
	if inSync == 0 {
		return "has no replica in sync"
	}
	return "is in sync only on servers that are down"
}

// PlaceAwake chooses the server that a machine should go on on from a checkpoint:
// as PlaceMachine does, with the acceleration that its memory is of, and the
// server that its order names, if that one lives.
func PlaceAwake(st *catalog.State, m *argonv1.Machine) (serverID string, err error) {
	wake := m.GetWake()
	woken := proto.CloneOf(m)
	if st.Checkpoints[wake.GetCheckpointId()].GetPlatform().GetAcceleration() == "kvm" {
		woken.Acceleration = "kvm"
	}
	to := wake.GetServerId()
	if to == "" || !Alive(st, to) || to == m.GetServerId() {
		return PlaceMachine(st, woken)
	}
	one := *st
	one.Leases = map[string]*argonv1.Lease{to: st.Leases[to]}
	return PlaceMachine(&one, woken)
}
