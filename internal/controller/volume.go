package controller

import (
	"cmp"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

const (
	creating  = argonv1.ReplicaState_REPLICA_STATE_CREATING
	inSync    = argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
	outOfSync = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
	removing  = argonv1.ReplicaState_REPLICA_STATE_REMOVING
)

// volume keeps a volume at the number of replicas that is wanted, or finishes
// its removal.
func (p *planner) volume(v *argonv1.Volume) {
	next := proto.CloneOf(v)
	var events []*argonv1.Event
	if v.GetRemoving() {
		if !p.emptyVolume(next) {
			return
		}
		if len(next.GetReplicas()) == 0 {
			p.deleteVolume(v)
			return
		}
	} else {
		p.forget(next)
		events = p.replace(next)
		p.dropSurplus(next)
		events = append(events, p.snapshots(next)...)
		p.base(next)
		p.scrub(next)
	}
	if proto.Equal(v, next) {
		return
	}
	p.st.Volumes[v.GetMeta().GetId()] = next
	p.act(Action{
		Why:    fmt.Sprintf("volume %s has its replicas, snapshots or base changed", v.GetMeta().GetName()),
		Put:    []proto.Message{next},
		Events: events,
	})
}

// status clears what a holder said of a volume that nobody has attached now.
func (p *planner) status(volumeID string) {
	if v := p.st.Volumes[volumeID]; v.GetAttachment() == nil {
		p.act(Action{Why: "the status of a volume that is not attached is cleared", ClearStatus: volumeID})
	}
}

// emptyVolume asks every server to delete its replica. It reports false while
// somebody who lives still has the volume attached.
func (p *planner) emptyVolume(v *argonv1.Volume) bool {
	if a := v.GetAttachment(); a != nil {
		if !p.lost(a.GetServerId()) {
			return false
		}
		v.Attachment = nil
	}
	v.Replicas = slices.DeleteFunc(v.Replicas, func(r *argonv1.Replica) bool { return p.st.Servers[r.GetServerId()] == nil })
	for _, r := range v.GetReplicas() {
		p.setReplica(r, removing, "the volume is being removed")
	}
	return true
}

func (p *planner) deleteVolume(v *argonv1.Volume) {
	delete(p.st.Volumes, v.GetMeta().GetId())
	p.act(Action{
		Why:    fmt.Sprintf("volume %s is removed", v.GetMeta().GetName()),
		Delete: []proto.Message{v},
		Events: []*argonv1.Event{volumeEvent(v, argonv1.Severity_SEVERITY_INFO, "volume-removed", "removed")},
	})
}

// forget takes replicas off the record whose servers are not part of the
// cluster any more: nobody is left to delete them. One that is in sync stays
// unless another is.
func (p *planner) forget(v *argonv1.Volume) {
	for _, r := range slices.Clone(v.GetReplicas()) {
		if p.st.Servers[r.GetServerId()] == nil && p.mayLeave(v, r) {
			v.Replicas = slices.DeleteFunc(v.Replicas, func(x *argonv1.Replica) bool { return x == r })
		}
	}
}

// replace asks for new replicas where there are fewer than wanted, not
// counting those whose servers have been lost for longer than the grace time or
// are evacuated, or whose disks are not used any more.
// The old ones stay until the new ones are in sync: one that returns in time
// may still be the better copy.
func (p *planner) replace(v *argonv1.Volume) []*argonv1.Event {
	var stay []string
	var given []*argonv1.Replica
	for _, r := range v.GetReplicas() {
		switch {
		case r.GetState() == removing:
		case p.writtenOff(r.GetServerId()), p.evacuated(r.GetServerId()), p.badDisk(r.GetServerId()):
			given = append(given, r)
		default:
			stay = append(stay, r.GetServerId())
		}
	}
	missing := int(v.GetReplicasWanted()) - len(stay)
	if missing <= 0 || !p.copyable(v) {
		return nil
	}
	// An error says that there are too few servers: then those found have to
	// do, and the rest is asked for again in the next plan.
	found, _ := placement.PlaceReplicas(p.st, placement.Replicas{
		Count: missing, NeedBytes: placement.CopyBytes(p.st, v), SizeBytes: max(v.GetSizeBytes(), v.GetWantedBytes()),
		Near: placement.BaseServers(p.st, v), Coming: placement.BaseComing(p.st, v), Stay: stay, Never: placement.Holders(v),
	})
	var events []*argonv1.Event
	for i, serverID := range found {
		v.NextReplicaId = max(v.GetNextReplicaId(), 1)
		id := v.GetNextReplicaId()
		v.NextReplicaId++
		v.Replicas = append(v.Replicas, &argonv1.Replica{
			Id: id, ServerId: serverID, State: creating, Since: timestamppb.New(p.now),
		})
		message := fmt.Sprintf("replica %d is made on server %s", id, p.name(serverID))
		severity := argonv1.Severity_SEVERITY_INFO
		if i < len(given) {
			from, why := given[i].GetServerId(), "is evacuated"
			switch {
			case p.writtenOff(from):
				severity, why = argonv1.Severity_SEVERITY_WARNING, "has been away for long"
			case p.badDisk(from):
				severity, why = argonv1.Severity_SEVERITY_WARNING, "has a disk that failed"
			}
			message = fmt.Sprintf("server %s %s; %s", p.name(from), why, message)
		}
		events = append(events, volumeEvent(v, severity, "replica-placed", message))
	}
	return events
}

// copyable tells whether there is something that a new replica could be made
// from: a replica in sync, or, before the first write, the base or nothing.
func (p *planner) copyable(v *argonv1.Volume) bool {
	if image := v.GetBase().GetImageId(); v.GetEpoch() == 0 && (image == "" || p.st.Images[image] != nil) {
		return true
	}
	return slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool { return r.GetState() == inSync })
}

// dropSurplus asks for replicas to be deleted, one by one, once as many as are
// wanted are in sync on servers that live: first those that are not in sync,
// then those whose server is lost or evacuated or whose disk failed, then one whose loss keeps the
// others in as many zones as possible, the newest first. One that the holder
// counts on is asked to leave the set first.
func (p *planner) dropSurplus(v *argonv1.Volume) {
	for _, r := range v.GetReplicas() {
		r.Retiring = false // unless it still is to
	}
	for {
		var all, good []*argonv1.Replica
		for _, r := range v.GetReplicas() {
			if r.GetState() == removing || r.GetRetiring() {
				continue
			}
			all = append(all, r)
			if r.GetState() == inSync && placement.Alive(p.st, r.GetServerId()) && !p.evacuated(r.GetServerId()) && !p.badDisk(r.GetServerId()) {
				good = append(good, r)
			}
		}
		if len(good) < int(v.GetReplicasWanted()) || len(all) <= int(v.GetReplicasWanted()) {
			return
		}
		spare := slices.DeleteFunc(slices.Clone(all), func(r *argonv1.Replica) bool {
			return !p.mayLeave(v, r) && !p.mayRetire(v, r, good) || p.depended(v, r)
		})
		if len(spare) == 0 {
			return
		}
		if r := slices.MinFunc(spare, p.sparest(good)); p.mayLeave(v, r) {
			p.setReplica(r, removing, "there are enough others")
		} else {
			r.Retiring = true
		}
	}
}

// mayRetire tells whether the holder of a volume can be asked to do without a
// replica that is in sync: it lives, and as many as are wanted are in sync
// elsewhere. The holder sees to it that this is so when the replica leaves.
func (p *planner) mayRetire(v *argonv1.Volume, r *argonv1.Replica, good []*argonv1.Replica) bool {
	others := len(good)
	if slices.Contains(good, r) {
		others--
	}
	return v.GetAttachment() != nil && placement.Alive(p.st, v.GetAttachment().GetServerId()) &&
		others >= max(1, int(v.GetReplicasWanted()))
}

// sparest orders replicas by how well the volume does without them.
func (p *planner) sparest(good []*argonv1.Replica) func(a, b *argonv1.Replica) int {
	zonesWithout := func(r *argonv1.Replica) int {
		zones := map[string]bool{}
		for _, g := range good {
			if g != r {
				zones[p.st.Servers[g.GetServerId()].GetZone()] = true
			}
		}
		return len(zones)
	}
	class := func(r *argonv1.Replica) int {
		switch {
		case r.GetState() != inSync:
			return 0
		case !placement.Alive(p.st, r.GetServerId()), p.evacuated(r.GetServerId()), p.badDisk(r.GetServerId()):
			return 1
		}
		return 2
	}
	return func(a, b *argonv1.Replica) int {
		return cmp.Or(
			cmp.Compare(class(a), class(b)),
			cmp.Compare(zonesWithout(b), zonesWithout(a)),
			cmp.Compare(b.GetId(), a.GetId()),
		)
	}
}

// mayLeave tells whether a replica can be taken away without anybody missing
// a write. One that is in sync may leave only from a volume at rest: while
// somebody is attached, or after a crash, the holder alone knows whose copy
// is to be trusted (rules I2, I3, I7). And never the last one.
func (p *planner) mayLeave(v *argonv1.Volume, r *argonv1.Replica) bool {
	if r.GetState() != inSync {
		return true
	}
	atRest := v.GetAttachment() == nil && (v.GetClean() || v.GetEpoch() == 0)
	another := slices.ContainsFunc(v.GetReplicas(), func(o *argonv1.Replica) bool {
		return o != r && o.GetState() == inSync && placement.Alive(p.st, o.GetServerId()) && !p.badDisk(o.GetServerId())
	})
	return atRest && another
}

func (p *planner) setReplica(r *argonv1.Replica, state argonv1.ReplicaState, reason string) {
	if r.GetState() == state {
		return
	}
	r.State, r.Reason, r.Since = state, reason, timestamppb.New(p.now)
}

func volumeEvent(v *argonv1.Volume, severity argonv1.Severity, reason, message string) *argonv1.Event {
	return &argonv1.Event{
		Severity: severity, Kind: "volume", SubjectId: v.GetMeta().GetId(), SubjectName: v.GetMeta().GetName(),
		Reason: reason, Message: message,
	}
}
