package placement

import (
	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// This file says what a server's disk still has room for. Volumes are thin:
// their sizes are promises, and may come to more than there is
// (docs/decisions/0016-thin-volumes.md). What counts is what lies there, what is on its way
// there, and the reserve.

// Reserve is what is kept free of a disk of that size: a twentieth, at most
// 32 GiB, so that what is there can grow while an operator looks for room.
func Reserve(diskBytes uint64) uint64 { return min(diskBytes/20, 32<<30) }

// CopyBytes is what a new replica of a volume comes to take when all is copied
// to it: as much as the fullest replica in sync takes, and what that one reads
// from its base.
func CopyBytes(st *catalog.State, v *argonv1.Volume) uint64 {
	if v.GetEpoch() == 0 {
		return 0 // it is made empty, or reads from its base
	}
	var most uint64
	for _, r := range v.GetReplicas() {
		if u := ReplicaUsage(st, v, r); r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC && u != nil {
			most = max(most, u.GetUsedBytes()-u.GetSnapshotBytes())
		}
	}
	if most == 0 {
		return v.GetSizeBytes() // nothing is known
	}
	if b := v.GetBase(); b.GetVolumeId() != "" {
		most += st.Volumes[b.GetVolumeId()].GetSizeBytes()
	} else if b != nil {
		most += st.Images[b.GetImageId()].GetSizeBytes()
	}
	return min(most, v.GetSizeBytes())
}

// ReplicaUsage is what a replica was measured to take; nil if it was not.
func ReplicaUsage(st *catalog.State, v *argonv1.Volume, r *argonv1.Replica) *argonv1.ReplicaUsage {
	for _, u := range st.Usage[r.GetServerId()].GetReplicas() {
		if u.GetVolumeId() == v.GetMeta().GetId() && u.GetReplicaId() == r.GetId() {
			return u
		}
	}
	return nil
}

// awaited is what copies that are under way, or about to begin, are going to
// put on a server's disk.
func awaited(st *catalog.State, serverID string) uint64 {
	var sum uint64
	for _, v := range st.Volumes {
		for _, r := range v.GetReplicas() {
			behind := r.GetState() == argonv1.ReplicaState_REPLICA_STATE_CREATING || r.GetState() == argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
			if r.GetServerId() == serverID && behind {
				sum += less(CopyBytes(st, v), ReplicaUsage(st, v, r).GetUsedBytes())
			}
		}
	}
	for _, i := range st.Images {
		for _, c := range i.GetCopies() {
			if c.GetServerId() == serverID && !c.GetReady() {
				sum += i.GetSizeBytes()
			}
		}
	}
	return sum
}

// BadDisk is why a server's disk is not used; empty: it is, as far as is known.
func BadDisk(s *argonv1.Server) string {
	for _, d := range s.GetDisks() {
		if d.GetProblem() != "" {
			return d.GetProblem()
		}
	}
	return ""
}
