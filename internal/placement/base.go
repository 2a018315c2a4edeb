package placement

import (
	"cmp"
	"slices"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// This file says what needs what: a replica reads from its volume's base, an
// image or a snapshot on the same server, what it does not hold itself.

// OnImage lists the volumes that are based on an image, by name, without those
// that are being removed.
func OnImage(st *catalog.State, imageID string) []*argonv1.Volume {
	return based(st, func(b *argonv1.Base) bool { return b.GetImageId() == imageID })
}

// Clones lists the volumes that are based on a snapshot of another, by name;
// snapshotID 0: on any of them. Volumes that are being removed do not count.
func Clones(st *catalog.State, volumeID string, snapshotID uint32) []*argonv1.Volume {
	return based(st, func(b *argonv1.Base) bool {
		return b.GetVolumeId() == volumeID && (snapshotID == 0 || b.GetSnapshotId() == snapshotID)
	})
}

func based(st *catalog.State, on func(*argonv1.Base) bool) []*argonv1.Volume {
	var found []*argonv1.Volume
	for _, v := range st.Volumes {
		if v.GetBase() != nil && !v.GetRemoving() && on(v.GetBase()) {
			found = append(found, v)
		}
	}
	slices.SortFunc(found, func(a, b *argonv1.Volume) int { return cmp.Compare(a.GetMeta().GetName(), b.GetMeta().GetName()) })
	return found
}

// ImageNeeded tells whether a replica on a server reads from an image, or is to be
// made from it: the copy there must stay.
func ImageNeeded(st *catalog.State, imageID, serverID string) bool {
	return slices.ContainsFunc(OnImage(st, imageID), func(v *argonv1.Volume) bool { return readsBase(v, serverID) })
}

// ParentNeeded tells whether a replica on a server reads from the replica that
// another volume has there: it must stay.
func ParentNeeded(st *catalog.State, volumeID, serverID string) bool {
	return slices.ContainsFunc(Clones(st, volumeID, 0), func(v *argonv1.Volume) bool { return readsBase(v, serverID) })
}

func readsBase(v *argonv1.Volume, serverID string) bool {
	return slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool {
		return r.GetServerId() == serverID && r.GetState() != argonv1.ReplicaState_REPLICA_STATE_REMOVING && (r.GetBased() || MadeFromBase(v, r))
	})
}

// MadeFromBase reports whether a replica is to be made from its volume's base,
// rather than to be copied to. What has been written since does not matter: that is
// copied to it. A base that the volume is about to need no more is not worth it.
func MadeFromBase(v *argonv1.Volume, r *argonv1.Replica) bool {
	return r.GetState() == argonv1.ReplicaState_REPLICA_STATE_CREATING && v.GetBase() != nil &&
		(v.GetEpoch() == 0 || !v.GetBase().GetDetaching())
}

// Snapshot finds a volume's snapshot by its id; nil if there is none.
func Snapshot(v *argonv1.Volume, id uint32) *argonv1.Snapshot {
	for _, s := range v.GetSnapshots() {
		if s.GetId() == id {
			return s
		}
	}
	return nil
}

// SnapshotServers lists the servers whose replicas have a snapshot.
func SnapshotServers(v *argonv1.Volume, s *argonv1.Snapshot) []string {
	var ids []string
	for _, r := range v.GetReplicas() {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_REMOVING && slices.Contains(s.GetReplicaIds(), r.GetId()) {
			ids = append(ids, r.GetServerId())
		}
	}
	return ids
}

// BaseComing lists the servers that the image of a volume is on its way to.
func BaseComing(st *catalog.State, v *argonv1.Volume) []string {
	var ids []string
	for _, c := range st.Images[v.GetBase().GetImageId()].GetCopies() {
		if !c.GetReady() {
			ids = append(ids, c.GetServerId())
		}
	}
	return ids
}

// ImageUsers lists the servers that have replicas made from an image, or are to.
func ImageUsers(st *catalog.State, imageID string) []string {
	var ids []string
	for _, v := range OnImage(st, imageID) {
		for _, r := range v.GetReplicas() {
			if readsBase(v, r.GetServerId()) && !slices.Contains(ids, r.GetServerId()) {
				ids = append(ids, r.GetServerId())
			}
		}
	}
	return ids
}

// BaseServers lists the servers that have what a volume is based on, so that a
// new replica need not copy it.
func BaseServers(st *catalog.State, v *argonv1.Volume) []string {
	if id := v.GetBase().GetVolumeId(); id != "" {
		parent := st.Volumes[id]
		return SnapshotServers(parent, Snapshot(parent, v.GetBase().GetSnapshotId()))
	}
	var ids []string
	for _, c := range st.Images[v.GetBase().GetImageId()].GetCopies() {
		if c.GetReady() {
			ids = append(ids, c.GetServerId())
		}
	}
	return ids
}
