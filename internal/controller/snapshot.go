package controller

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file looks after volumes' snapshots and bases, and has them scrubbed.

// snapshots takes replicas that are gone off the records of snapshots, drops
// those that no replica has any more, and those that are being removed once
// nothing depends on them.
func (p *planner) snapshots(v *argonv1.Volume) []*argonv1.Event {
	var events []*argonv1.Event
	v.Snapshots = slices.DeleteFunc(v.Snapshots, func(s *argonv1.Snapshot) bool {
		if s.GetState() != argonv1.SnapshotState_SNAPSHOT_STATE_READY {
			return false
		}
		s.ReplicaIds = slices.DeleteFunc(s.ReplicaIds, func(id uint32) bool {
			return !slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return r.GetId() == id })
		})
		switch {
		case len(s.GetReplicaIds()) == 0:
			events = append(events, p.lose(v, s))
			return true
		case s.GetRemoving() && len(placement.Clones(p.st, v.GetMeta().GetId(), s.GetId())) == 0:
			events = append(events, volumeEvent(v, argonv1.Severity_SEVERITY_INFO, "snapshot-removed",
				fmt.Sprintf("snapshot %s is removed; no volume needs it any more", s.GetName())))
			return true
		}
		return false
	})
	return events
}

// lose tells of a snapshot that went with the last replica that had it. A
// rollback to it can't be carried out any more.
func (p *planner) lose(v *argonv1.Volume, s *argonv1.Snapshot) *argonv1.Event {
	message := fmt.Sprintf("snapshot %s is lost: every replica that had it is gone", s.GetName())
	if v.GetRollbackTo() == s.GetId() {
		v.RollbackTo = 0
		message += "; the volume was to be rolled back to it, and is served as it is"
	}
	return volumeEvent(v, argonv1.Severity_SEVERITY_ERROR, "snapshot-lost", message)
}

// depended tells whether others would miss a replica that the volume itself can
// do without: a clone's replica on the same server reads from it, or it alone
// has a snapshot.
func (p *planner) depended(v *argonv1.Volume, r *argonv1.Replica) bool {
	if placement.ParentNeeded(p.st, v.GetMeta().GetId(), r.GetServerId()) {
		return true
	}
	return slices.ContainsFunc(v.GetSnapshots(), func(s *argonv1.Snapshot) bool {
		if !slices.Contains(s.GetReplicaIds(), r.GetId()) {
			return false
		}
		return !slices.ContainsFunc(v.GetReplicas(), func(o *argonv1.Replica) bool {
			return o.GetId() != r.GetId() && o.GetState() != removing && slices.Contains(s.GetReplicaIds(), o.GetId())
		})
	})
}

// base forgets what a volume was made from once no replica reads from it.
// Before the first attachment a missing replica would be made from the base:
// without it the volume counts as attached before, and such a replica is
// copied to instead.
func (p *planner) base(v *argonv1.Volume) {
	if v.GetBase() == nil || !slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return r.GetState() == inSync }) {
		return
	}
	for _, r := range v.GetReplicas() {
		if placement.MadeFromBase(v, r) || r.GetBased() && r.GetState() != removing {
			return
		}
	}
	v.Base = nil
	if v.GetEpoch() == 0 {
		v.Epoch, v.Clean = 1, true
	}
}

// scrub asks for a scrub of a volume that had none for long, one volume after
// the other.
func (p *planner) scrub(v *argonv1.Volume) {
	settings := p.st.Cluster.GetSettings()
	if settings.GetScrubOff() || p.scrubbing || v.GetEpoch() == 0 || scrubPending(v) || !scrubable(p.st, v) {
		return
	}
	last := v.GetScrub().GetFinishedAt()
	if last == nil {
		last = v.GetMeta().GetCreated()
	}
	interval := time.Duration(cmp.Or(settings.GetScrubIntervalHours(), 168)) * time.Hour
	if !p.due(last, interval) {
		return
	}
	if v.Scrub == nil {
		v.Scrub = &argonv1.Scrub{}
	}
	v.Scrub.Wanted++
	p.scrubbing = true
}

// scrubbing tells whether a scrub is under way, or can begin.
func scrubbing(st *catalog.State) bool {
	for _, v := range st.Volumes {
		if scrubPending(v) && scrubable(st, v) {
			return true
		}
	}
	return false
}

func scrubPending(v *argonv1.Volume) bool {
	return v.GetScrub().GetWanted() > v.GetScrub().GetFinished()
}

// scrubable: somebody could attach the volume.
func scrubable(st *catalog.State, v *argonv1.Volume) bool {
	return !v.GetRemoving() && slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool {
		return r.GetState() == inSync && placement.Alive(st, r.GetServerId())
	})
}
