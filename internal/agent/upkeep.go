package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file looks after what lies inside the replicas here: snapshots that the
// record does not have any more, their space, and bases that are to be copied.

// upkeepStep is what to do next inside a replica.
type upkeepStep uint8

const (
	settled upkeepStep = iota
	// forgetSnapshots takes the names off those that the record does not have.
	forgetSnapshots
	// recordDetached records that the replica does not read from its base.
	recordDetached
	// copyBase copies what the replica still reads from its base.
	copyBase
	// tidyUp gives back what deleted snapshots took.
	tidyUp
)

func (s upkeepStep) String() string {
	return [...]string{"rest", "forget snapshots", "record detached", "copy base", "tidy up"}[s]
}

// nextInside names the next step inside a replica, and the snapshots to forget:
// those that lie here, that the record does not have, and that it has had. One
// with an id that the record does not know of yet is newer than what is known
// here.
func nextInside(v *argonv1.Volume, r *argonv1.Replica, seen Inside) (step upkeepStep, forget []uint32) {
	for _, id := range seen.Snapshots {
		recorded := slices.ContainsFunc(v.GetSnapshots(), func(s *argonv1.Snapshot) bool { return s.GetId() == id })
		if !recorded && id < v.GetNextSnapshotId() {
			forget = append(forget, id)
		}
	}
	switch {
	case v.GetRemoving() || r.GetState() == argonv1.ReplicaState_REPLICA_STATE_REMOVING || r.GetState() == argonv1.ReplicaState_REPLICA_STATE_CREATING:
		return settled, nil
	case len(forget) > 0:
		return forgetSnapshots, forget
	case r.GetBased() && !seen.Based:
		return recordDetached, nil
	case v.GetBase().GetDetaching() && seen.Based:
		return copyBase, nil
	case seen.Untidy:
		return tidyUp, nil
	}
	return settled, nil
}

func (p *plan) planUpkeep() {
	a := p.agent
	for id, v := range p.st.Volumes {
		for _, r := range v.GetReplicas() {
			if r.GetServerId() == a.ServerID && slices.Contains(a.replicas[id], r.GetId()) {
				p.planInside(v, r)
			}
		}
	}
}

func (p *plan) planInside(v *argonv1.Volume, r *argonv1.Replica) {
	a, id := p.agent, v.GetMeta().GetId()
	key := fmt.Sprintf("upkeep/%s/%d", id, r.GetId())
	seen, err := a.Replicas.Inside(id, r.GetId())
	if err != nil {
		return // it has just been removed
	}
	step, forget := nextInside(v, r, seen)
	j := job{step: step.String()}
	switch step {
	case settled:
		return
	case forgetSnapshots:
		j.waits, j.run = true, func(ctx context.Context) error { return a.forgetSnapshots(ctx, id, r.GetId(), forget) }
	case recordDetached:
		j.run = func(ctx context.Context) error { return a.recordDetached(ctx, v, r.GetId()) }
	case copyBase:
		j.waits, j.run = true, func(ctx context.Context) error { return a.copyBase(ctx, v, r.GetId()) }
	case tidyUp:
		j.waits, j.run = true, func(ctx context.Context) error { return a.tidyUp(ctx, id, r.GetId()) }
	}
	p.add(key, j)
}

func (a *Agent) tidyUp(ctx context.Context, volumeID string, replicaID uint32) error {
	return a.gently(ctx, func() (bool, error) { return a.Replicas.Tidy(ctx, volumeID, replicaID) })
}

// forgetSnapshots does what it can: one that a clone here still reads, as long as
// that can't be removed, must not hold up the others, nor what they took.
func (a *Agent) forgetSnapshots(ctx context.Context, volumeID string, replicaID uint32, ids []uint32) error {
	var failed error
	for _, id := range ids {
		if err := a.Replicas.Forget(volumeID, replicaID, id); err != nil {
			failed = errors.Join(failed, fmt.Errorf("delete snapshot %d: %w", id, err))
		}
	}
	if failed != nil {
		failed = errors.Join(failed, a.tidyUp(ctx, volumeID, replicaID))
	}
	return failed
}

func (a *Agent) copyBase(ctx context.Context, v *argonv1.Volume, replicaID uint32) error {
	err := a.gently(ctx, func() (bool, error) { return a.Replicas.DetachBase(ctx, v.GetMeta().GetId(), replicaID) })
	if err != nil {
		return fmt.Errorf("copy what replica %d needs of its base: %w", replicaID, err)
	}
	return a.recordDetached(ctx, v, replicaID)
}

func (a *Agent) recordDetached(ctx context.Context, v *argonv1.Volume, replicaID uint32) error {
	_, err := a.updateReplica(ctx, v, replicaID, func(_ *argonv1.Volume, r *argonv1.Replica) error {
		if !r.GetBased() {
			return ErrOvertaken
		}
		r.Based = false
		return nil
	})
	if err != nil {
		return fmt.Errorf("record that replica %d needs its base no more: %w", replicaID, err)
	}
	return nil
}

// gently does a long work step by step, one such work at a time on this
// server. After each step it pauses for as long as the step took, so that half
// of the disk's time at least is left to the guests.
func (a *Agent) gently(ctx context.Context, step func() (more bool, err error)) error {
	select {
	case a.mover <- struct{}{}:
		defer func() { <-a.mover }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		begun := a.Now()
		more, err := step()
		if err != nil || !more {
			return err
		}
		pause := time.NewTimer(min(max(a.Now().Sub(begun), shortestRest), longestRest))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return ctx.Err()
		}
	}
}
