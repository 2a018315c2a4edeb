package mirror

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file is what the holder does to a volume's record: pure functions,
// run inside a compare-and-swap by the shell, and by the simulated catalog.

// Member is a replica of the in-sync set, with the incarnation of it that
// the set agreed on (rule I7).
type Member struct {
	ID          uint32
	Incarnation uint64
}

// Holder names who attaches.
type Holder struct {
	ServerID  string
	MachineID string
}

// Proposal is a change of the record that the core wants. It holds only in the
// epoch that it was made in.
type Proposal struct {
	Epoch uint64
	// InSync is the whole in-sync set as it should be. Never empty.
	InSync []Member
	// Reasons say why replicas leave the set, by id.
	Reasons map[uint32]string
	// Generation, if not 0, is what the holder will stamp writes with.
	Generation uint64
	// EqualBefore, if not 0: everything of an earlier generation is on the
	// disk of all that are in the recorded set.
	EqualBefore uint64
	// Facts are what happened to replicas outside the set.
	Facts []fact
	// Taken, if not nil, is a snapshot that all of InSync have now, flushed.
	Taken *Taken
	// Size, if not 0, is what all of InSync have grown to.
	Size uint64
	// RolledBack, if not 0, is the snapshot that the volume is equal to again.
	RolledBack uint32
	// Scrubbed, if not nil, is what a scrub found.
	Scrubbed *argonv1.Scrub
	// Release ends the attachment. Clean says that all of InSync are equal
	// and flushed.
	Release, Clean bool
}

// FirstGeneration is that of a volume's first attachment: no change has an older
// stamp. A replica that holds what the volume began with, its base or nothing, is
// equal before it to every other one, whenever it is made.
const FirstGeneration = 1

// Take gives the volume to a holder with the next epoch. It returns whether
// the last attachment had ended clean, which only the taker gets to know: from
// now on the record says that it did not (rule I4, first half).
func Take(v *argonv1.Volume, h Holder, now time.Time) (wasClean bool, err error) {
	if v.GetRemoving() {
		return false, fmt.Errorf("volume %s is being removed", v.GetMeta().GetName())
	}
	if len(inSync(v)) == 0 {
		return false, fmt.Errorf("volume %s has no replica in sync yet: wait until one is made, or see `argon volume promote`", v.GetMeta().GetName())
	}
	wasClean = v.GetClean() || v.GetEpoch() == 0
	v.Epoch++
	v.Generation++
	if wasClean {
		v.EqualBefore = v.Generation
	}
	v.Clean = false
	v.Attachment = &argonv1.Attachment{
		ServerId:  h.ServerID,
		MachineId: h.MachineID,
		Since:     timestamppb.New(now),
	}
	return wasClean, nil
}

// Apply makes the proposed change. It returns ErrDeposed when the record is in
// another epoch: the volume has a newer holder (rules I3 and I4).
//
// Doing it twice is the same as once, so that an unknown outcome can be tried
// again.
func Apply(v *argonv1.Volume, p Proposal, now time.Time) error {
	if p.Release && v.GetEpoch() == p.Epoch && v.GetAttachment() == nil {
		return nil
	}
	if v.GetEpoch() != p.Epoch || v.GetAttachment() == nil {
		return fmt.Errorf("volume %s is in epoch %d, this holder's was %d: %w", v.GetMeta().GetName(), v.GetEpoch(), p.Epoch, ErrDeposed)
	}
	changed := false
	for _, r := range v.GetReplicas() {
		i := slices.IndexFunc(p.InSync, func(m Member) bool { return m.ID == r.GetId() })
		switch {
		case i >= 0 && r.GetState() != argonv1.ReplicaState_REPLICA_STATE_REMOVING:
			changed = changed || r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
			setState(r, argonv1.ReplicaState_REPLICA_STATE_IN_SYNC, "", now)
			r.Incarnation, r.CopiedTo, r.CopiedBase = p.InSync[i].Incarnation, 0, 0
		case r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC:
			changed = true
			setState(r, argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC, p.Reasons[r.GetId()], now)
			// Not the proposal's: the replica may have had no part in that.
			r.EqualBefore, r.CopiedTo, r.CopiedBase = v.GetEqualBefore(), 0, 0
		}
	}
	if changed {
		v.Generation++
	}
	v.Generation = max(v.GetGeneration(), p.Generation)
	v.EqualBefore = max(v.GetEqualBefore(), p.EqualBefore)
	applyNews(v, p, now)
	if p.Release {
		v.Attachment = nil
		v.Clean = p.Clean
	}
	return nil
}

// fact is one thing that happened to a replica outside the set.
type fact struct {
	// emptied is a replica that holds nothing any more, no snapshot either.
	emptied uint32
	// reached is a replica that has the snapshot, whole and flushed, and equals
	// it but for what it was given since.
	reached, snapshot uint32
	// copied is a replica that a copy has come so far with, in bytes: what lies
	// before that can differ only where it was written in base or later.
	copied uint32
	to     uint64
	base   uint64
}

func (f fact) about(id uint32) bool { return f.emptied == id || f.reached == id || f.copied == id }

// applyNews records what is not about the set. All of it can be done twice.
func applyNews(v *argonv1.Volume, p Proposal, now time.Time) {
	for _, s := range v.GetSnapshots() {
		if t := p.Taken; t != nil && s.GetId() == t.ID && s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_CREATING {
			s.State = argonv1.SnapshotState_SNAPSHOT_STATE_READY
			s.Generation, s.SizeBytes, s.Created = t.Generation, t.Size, timestamppb.New(now)
			s.ReplicaIds = nil
			for _, m := range p.InSync {
				s.ReplicaIds = append(s.ReplicaIds, m.ID)
			}
		}
	}
	for _, f := range p.Facts {
		applyFact(v, f)
	}
	v.SizeBytes = max(v.GetSizeBytes(), p.Size)
	if v.GetWantedBytes() <= v.GetSizeBytes() {
		v.WantedBytes = 0
	}
	if p.RolledBack != 0 && v.GetRollbackTo() == p.RolledBack {
		v.RollbackTo = 0
	}
	if s := p.Scrubbed; s != nil && v.GetScrub().GetFinished() < s.GetFinished() {
		done := proto.CloneOf(s)
		done.Wanted, done.FinishedAt = max(v.GetScrub().GetWanted(), s.GetFinished()), timestamppb.New(now)
		v.Scrub = done
	}
}

func applyFact(v *argonv1.Volume, f fact) {
	if r := behind(v, f.emptied); r != nil {
		r.EqualBefore, r.CopiedTo, r.CopiedBase, r.Based = 0, 0, 0, false
	}
	for _, s := range v.GetSnapshots() {
		if f.emptied != 0 {
			s.ReplicaIds = slices.DeleteFunc(s.ReplicaIds, func(id uint32) bool { return id == f.emptied })
		}
		if f.reached == 0 || s.GetId() != f.snapshot || s.GetState() != argonv1.SnapshotState_SNAPSHOT_STATE_READY {
			continue
		}
		if !slices.Contains(s.GetReplicaIds(), f.reached) {
			s.ReplicaIds = append(s.ReplicaIds, f.reached)
		}
		if r := behind(v, f.reached); r != nil {
			r.EqualBefore, r.CopiedTo, r.CopiedBase = s.GetGeneration(), 0, 0
		}
	}
	if r := behind(v, f.copied); r != nil {
		r.CopiedTo, r.CopiedBase = f.to, f.base
	}
}

// behind is a replica of the record that is out of sync; nil if there is none.
func behind(v *argonv1.Volume, id uint32) *argonv1.Replica {
	for _, r := range v.GetReplicas() {
		if r.GetId() == id && r.GetState() == argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC {
			return r
		}
	}
	return nil
}

// Promote makes one replica the whole in-sync set, in an epoch above every one
// that a replica has seen. It is an operator's explicit act: writes that only
// other replicas have are lost.
func Promote(v *argonv1.Volume, m Member, sealed uint64, now time.Time) error {
	if !slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return r.GetId() == m.ID }) {
		return fmt.Errorf("volume %s has no replica %d", v.GetMeta().GetName(), m.ID)
	}
	for _, r := range v.GetReplicas() {
		if r.GetId() == m.ID && r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
			// What it missed, it has not stamped: the others go back to when
			// they were equal to it.
			v.EqualBefore = min(v.GetEqualBefore(), r.GetEqualBefore())
		}
	}
	for _, r := range v.GetReplicas() {
		switch {
		case r.GetId() == m.ID:
			setState(r, argonv1.ReplicaState_REPLICA_STATE_IN_SYNC, "promoted by an operator", now)
			r.Incarnation = m.Incarnation
		case r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC:
			setState(r, argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC, "another replica was promoted", now)
			r.EqualBefore = v.GetEqualBefore()
		default:
			r.EqualBefore = min(r.GetEqualBefore(), v.GetEqualBefore())
		}
	}
	for _, r := range v.GetReplicas() {
		r.CopiedTo, r.CopiedBase = 0, 0
	}
	// What the good one does not have is lost.
	v.Snapshots = slices.DeleteFunc(v.Snapshots, func(s *argonv1.Snapshot) bool {
		return s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_READY && !slices.Contains(s.GetReplicaIds(), m.ID)
	})
	v.RollbackTo = 0
	v.Epoch = max(v.GetEpoch(), sealed) + 1
	v.Generation++
	v.Attachment = nil
	v.Clean = false
	return nil
}

func setState(r *argonv1.Replica, s argonv1.ReplicaState, reason string, now time.Time) {
	if r.GetState() == s {
		return
	}
	r.State, r.Reason, r.Since = s, reason, timestamppb.New(now)
}

// inSync lists the replicas that hold every acknowledged write.
func inSync(v *argonv1.Volume) []Member {
	var ms []Member
	for _, r := range v.GetReplicas() {
		if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
			ms = append(ms, Member{ID: r.GetId(), Incarnation: r.GetIncarnation()})
		}
	}
	return ms
}
