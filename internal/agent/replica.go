package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// replicaStep is what to do next with a replica on this server.
type replicaStep uint8

const (
	keep replicaStep = iota
	// fetchImage asks for a copy of the image that it is made from.
	fetchImage
	createReplica
	// giveUpReplica takes what does not lie here off the in-sync set.
	giveUpReplica
	removeReplica
	// leaveReplica has one deleted later: its disk can't be used.
	leaveReplica
)

func (s replicaStep) String() string {
	return [...]string{"keep", "fetch image", "create", "give up", "remove", "leave"}[s]
}

// replicaSeen is what is known here of a replica, and of what it could be made
// from.
type replicaSeen struct {
	// exists: it lies here.
	exists bool
	// spare: nobody has the volume attached, and another replica is in sync, on
	// a server that lives.
	spare bool
	// bad: the disk here can't be used.
	bad bool
	// baseRecorded: the volume's base has a record; hasBase: it lies here, too;
	// fetchable: it is on its way here, or can be fetched from another server.
	baseRecorded, hasBase, fetchable bool
}

// nextForReplica names a replica's next step. behind: the new replica has nothing
// in common with the others, and the holder copies all to it.
//
// A replica that begins with the volume's base is equal to all others but for what
// was written since the first attachment. An image is fetched for that; a snapshot of
// another volume is where it is, and where it is not the replica is made empty. So is
// one of a volume that is in use, if its image can't be had.
func nextForReplica(v *argonv1.Volume, r *argonv1.Replica, seen replicaSeen) (step replicaStep, behind bool) {
	fresh, base := v.GetEpoch() == 0, v.GetBase()
	removing := r.GetState() == argonv1.ReplicaState_REPLICA_STATE_REMOVING
	switch {
	case removing && seen.bad:
		return leaveReplica, false
	case removing:
		return removeReplica, false
	case seen.bad:
		return keep, false // the controller has another one made elsewhere
	}
	switch r.GetState() {
	case argonv1.ReplicaState_REPLICA_STATE_CREATING:
		switch {
		case base == nil:
			return createReplica, !fresh
		case !placement.MadeFromBase(v, r):
			return createReplica, true
		case seen.hasBase:
			return createReplica, false
		case base.GetImageId() == "":
			return createReplica, true
		case !fresh && !seen.fetchable:
			return createReplica, true
		case !seen.baseRecorded:
			return keep, false // nothing to make it from; the controller knows
		}
		return fetchImage, false
	case argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC:
		if !seen.exists {
			return createReplica, true // its disk was replaced
		}
	case argonv1.ReplicaState_REPLICA_STATE_IN_SYNC:
		// A holder would find out; until there is one, the volume would pass for
		// one that survives a loss.
		if !seen.exists && seen.spare {
			return giveUpReplica, false
		}
	}
	return keep, false
}

func (p *plan) planReplicas() {
	a := p.agent
	for id, v := range p.st.Volumes {
		for _, r := range v.GetReplicas() {
			if r.GetServerId() != a.ServerID {
				continue
			}
			seen := p.seeBase(v)
			seen.bad = p.bad
			seen.exists = slices.Contains(a.replicas[id], r.GetId())
			seen.spare = v.GetAttachment() == nil && slices.ContainsFunc(v.GetReplicas(), func(o *argonv1.Replica) bool {
				return o.GetId() != r.GetId() && inSync(o) && placement.Alive(p.st, o.GetServerId())
			})
			step, behind := nextForReplica(v, r, seen)
			p.addReplica(step, v, r, behind)
		}
	}
}

// seeBase looks whether what a volume is made from lies here.
func (p *plan) seeBase(v *argonv1.Volume) replicaSeen {
	a, base := p.agent, v.GetBase()
	if id := base.GetImageId(); id != "" {
		image := p.st.Images[id]
		return replicaSeen{baseRecorded: image != nil, hasBase: a.images[id], fetchable: len(p.imageSources(image)) > 0}
	}
	parent := p.st.Volumes[base.GetVolumeId()]
	snapshot := placement.Snapshot(parent, base.GetSnapshotId())
	return replicaSeen{
		baseRecorded: snapshot != nil,
		hasBase:      slices.Contains(placement.SnapshotServers(parent, snapshot), a.ServerID),
	}
}

func (p *plan) addReplica(step replicaStep, v *argonv1.Volume, r *argonv1.Replica, behind bool) {
	a := p.agent
	j, key := job{step: step.String()}, fmt.Sprintf("replica/%s/%d", v.GetMeta().GetId(), r.GetId())
	switch step {
	case keep:
		return
	case fetchImage:
		j.run = func(ctx context.Context) error { return a.askForImage(ctx, v.GetBase().GetImageId()) }
	case createReplica:
		j.waits, j.run = true, func(ctx context.Context) error { return a.createReplica(ctx, v, r.GetId(), behind) }
	case giveUpReplica:
		j.run = func(ctx context.Context) error { return a.giveUpReplica(ctx, v, r) }
	case removeReplica:
		j.run = func(ctx context.Context) error { return a.removeReplica(ctx, v, r.GetId()) }
	case leaveReplica:
		// What was begun with it before may hang.
		key = "leave/" + key
		j.run = func(ctx context.Context) error { return a.leaveReplica(ctx, v, r.GetId()) }
	}
	p.add(key, j)
}

// askForImage records that this server needs an image; fetching it is the
// image's own step.
func (a *Agent) askForImage(ctx context.Context, imageID string) error {
	_, err := a.Store.Images.Update(ctx, imageID, func(i *argonv1.Image) error {
		if copyOn(i, a.ServerID) != nil {
			return ErrOvertaken
		}
		i.Copies = append(i.Copies, &argonv1.ImageCopy{ServerId: a.ServerID})
		return nil
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return ErrOvertaken
	}
	if err != nil {
		return fmt.Errorf("ask for a copy of the image: %w", err)
	}
	return nil
}

func (a *Agent) createReplica(ctx context.Context, v *argonv1.Volume, replicaID uint32, behind bool) error {
	volumeID := v.GetMeta().GetId()
	req := CreateReplica{VolumeID: volumeID, ReplicaID: replicaID, SizeBytes: v.GetSizeBytes(), Behind: behind}
	if !behind {
		req.Base = v.GetBase()
	}
	made, err := a.Replicas.Create(ctx, req)
	if err != nil {
		err = fmt.Errorf("make replica %d: %w", replicaID, err)
		a.explain(ctx, v, replicaID, err.Error())
		return err
	}
	a.mu.Lock()
	if !slices.Contains(a.replicas[volumeID], replicaID) {
		a.replicas[volumeID] = append(a.replicas[volumeID], replicaID)
	}
	a.mu.Unlock()
	return a.enlist(ctx, v, req, made)
}

// enlist records that a replica has been made. One that begins as all others did
// equals them as long as nobody ever attached the volume; the compare-and-swap
// makes sure of that, since attaching takes the first epoch. Else it lacks what was
// written since, or, if it has nothing in common with them, all. The base that it
// reads from must still be the record's: what no replica needs may be deleted.
func (a *Agent) enlist(ctx context.Context, v *argonv1.Volume, req CreateReplica, made Made) error {
	bounded, cancel := recording(ctx)
	defer cancel()
	_, err := a.updateReplica(bounded, v, req.ReplicaID, func(v *argonv1.Volume, r *argonv1.Replica) error {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_CREATING || req.Base != nil && !proto.Equal(req.Base, v.GetBase()) {
			return ErrOvertaken
		}
		r.Incarnation, r.Based, r.EqualBefore, r.Since = made.Incarnation, req.Base != nil, 0, timestamppb.New(a.Now())
		switch {
		case v.GetEpoch() == 0 && !req.Behind:
			r.State, r.Reason = argonv1.ReplicaState_REPLICA_STATE_IN_SYNC, ""
		case made.EqualBefore > 0:
			r.State, r.Reason = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC, "new: it is given next what was written meanwhile"
			r.EqualBefore = made.EqualBefore
		default:
			r.State, r.Reason = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC, "new: it is copied to next"
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("record replica %d: %w", req.ReplicaID, err)
	}
	a.tell(ctx, volumeEvent(v, argonv1.Severity_SEVERITY_INFO, "replica-created", fmt.Sprintf("replica %d was made", req.ReplicaID)))
	return nil
}

// explain records why a replica can't be made, once.
func (a *Agent) explain(ctx context.Context, v *argonv1.Volume, replicaID uint32, why string) {
	_, err := a.updateReplica(ctx, v, replicaID, func(_ *argonv1.Volume, r *argonv1.Replica) error {
		if r.GetReason() == why {
			return ErrOvertaken
		}
		r.Reason = why
		return nil
	})
	switch {
	case errors.Is(err, ErrOvertaken):
	case err != nil:
		a.Log.Warn("the record does not say why a replica can't be made", "volume", v.GetMeta().GetName(), "replica", replicaID, "err", err)
	default:
		a.tell(ctx, volumeEvent(v, argonv1.Severity_SEVERITY_ERROR, "replica-failed", why))
	}
}

// giveUpReplica records that a replica does not lie here any more: its disk was
// replaced, or what was found there is damaged. That nobody attached the volume
// meanwhile, and that another replica is in sync, is part of the change.
func (a *Agent) giveUpReplica(ctx context.Context, v *argonv1.Volume, missing *argonv1.Replica) error {
	const why = "it does not lie on its server's disk any more; a new one is made"
	bounded, cancel := recording(ctx)
	defer cancel()
	_, err := a.updateReplica(bounded, v, missing.GetId(), func(v *argonv1.Volume, r *argonv1.Replica) error {
		other := slices.ContainsFunc(v.GetReplicas(), func(o *argonv1.Replica) bool { return o != r && inSync(o) })
		if !inSync(r) || r.GetIncarnation() != missing.GetIncarnation() || v.GetAttachment() != nil || !other {
			return ErrOvertaken
		}
		r.State, r.Reason, r.Since = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC, why, timestamppb.New(a.Now())
		return nil
	})
	if err != nil {
		return fmt.Errorf("record that replica %d is missing: %w", missing.GetId(), err)
	}
	a.tell(ctx, volumeEvent(v, argonv1.Severity_SEVERITY_WARNING, "replica-missing", fmt.Sprintf("replica %d: %s", missing.GetId(), why)))
	return nil
}

func (a *Agent) removeReplica(ctx context.Context, v *argonv1.Volume, replicaID uint32) error {
	volumeID := v.GetMeta().GetId()
	if err := a.Replicas.Remove(ctx, volumeID, replicaID); err != nil {
		return fmt.Errorf("delete replica %d: %w", replicaID, err)
	}
	a.mu.Lock()
	a.replicas[volumeID] = slices.DeleteFunc(a.replicas[volumeID], func(id uint32) bool { return id == replicaID })
	a.mu.Unlock()
	return a.strikeReplica(ctx, v, replicaID)
}

// strikeReplica takes one off the record.
func (a *Agent) strikeReplica(ctx context.Context, v *argonv1.Volume, replicaID uint32) error {
	_, err := a.updateReplica(ctx, v, replicaID, func(v *argonv1.Volume, r *argonv1.Replica) error {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_REMOVING {
			return ErrOvertaken
		}
		v.Replicas = slices.DeleteFunc(v.Replicas, func(o *argonv1.Replica) bool { return o == r })
		return nil
	})
	if err != nil {
		return fmt.Errorf("take deleted replica %d off the record: %w", replicaID, err)
	}
	return nil
}

// updateReplica changes this server's replica in the volume's record.
func (a *Agent) updateReplica(ctx context.Context, v *argonv1.Volume, replicaID uint32, change func(*argonv1.Volume, *argonv1.Replica) error) (*argonv1.Volume, error) {
	v, err := a.Store.Volumes.Update(ctx, v.GetMeta().GetId(), func(v *argonv1.Volume) error {
		for _, r := range v.GetReplicas() {
			if r.GetId() == replicaID && r.GetServerId() == a.ServerID {
				return change(v, r)
			}
		}
		return ErrOvertaken
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return nil, ErrOvertaken
	}
	return v, err
}

func volumeEvent(v *argonv1.Volume, severity argonv1.Severity, reason, message string) *argonv1.Event {
	return &argonv1.Event{
		Severity: severity, Kind: "volume", SubjectId: v.GetMeta().GetId(), SubjectName: v.GetMeta().GetName(),
		Reason: reason, Message: message,
	}
}
