package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file decides who attaches a volume, and when: functions without
// effects.

// use is what a volume is attached for.
type use uint8

const (
	unused use = iota
	// forUpkeep: nobody uses it, but its holder has something to do: copying to
	// replicas that are behind, a snapshot, a rollback, growth, a scrub.
	forUpkeep
	// forConnection: a user asked for it (`argon volume connect`).
	forConnection
	forMachine
	// forArrival: a machine is on its way to this server. The volume is not
	// attached here, only its socket is: what is asked of it waits.
	forArrival
)

// demand is who wants a volume on this server.
type demand struct {
	use       use
	machineID string
	// guestRuns: the machine's guest is here already.
	guestRuns bool
}

// volumeSeen is what is known here of a volume.
type volumeSeen struct {
	// attached is what it is attached for here; unused if it is not.
	attached demand
	// ready: the attachment has served; over: it is over.
	ready, over bool
	// connections counts the users that have it connected here.
	connections int
	// yields: it made way for a user on another server a moment ago.
	yields bool
	// leaves: its machine is about to run on another server.
	leaves bool
}

// volumeStep is what to do next with a volume.
type volumeStep uint8

const (
	leave volumeStep = iota
	attach
	detach
	// drop gives up an attachment that is over.
	drop
	// askFor asks the server that has it attached for upkeep to make way.
	askFor
	// standBy makes the volume's socket for a machine on its way.
	standBy
	// letGo takes an attachment of this server's earlier run off the record of a
	// volume that is being removed: nobody else would end it.
	letGo
)

func (s volumeStep) String() string {
	return [...]string{"leave", "attach", "detach", "drop", "ask for", "stand by", "let go"}[s]
}

// demandFor says what this server should have a volume attached for. A guest
// that is here keeps its disks until it is gone; guests says for each machine
// that has one here whether it may stay.
func demandFor(st *catalog.State, v *argonv1.Volume, serverID string, seen volumeSeen, guests map[string]bool) demand {
	id := v.GetMeta().GetId()
	if seen.leaves {
		return demand{}
	}
	if a := seen.attached; a.use == forMachine && hasKey(guests, a.machineID) && !letGoOf(st, id, a.machineID, guests) {
		return a
	}
	for _, m := range machinesOf(st, id) {
		if receives(m, serverID) {
			return demand{use: forArrival, machineID: m.GetMeta().GetId()}
		}
		mayStay, hasGuest := guests[m.GetMeta().GetId()]
		if hasGuest && !mayStay {
			continue
		}
		wants := belongs(m, serverID) && wanted(m) == argonv1.Wanted_WANTED_RUNNING && !sleepsAfter(m)
		if hasGuest || wants {
			return demand{use: forMachine, machineID: m.GetMeta().GetId(), guestRuns: hasGuest}
		}
	}
	switch {
	case seen.connections > 0:
		return demand{use: forConnection}
	case keepsUp(st, v, serverID, seen):
		return demand{use: forUpkeep}
	}
	return demand{}
}

// letGoOf reports whether a guest that is here has let go of a volume: the record
// says so once it has.
func letGoOf(st *catalog.State, volumeID, machineID string, guests map[string]bool) bool {
	return guests[machineID] && !slices.Contains(st.Machines[machineID].GetVolumeIds(), volumeID)
}

// nextForVolume names a volume's next step on this server. why says in words
// what stands in the way of attaching it.
func nextForVolume(st *catalog.State, v *argonv1.Volume, serverID string, seen volumeSeen, want demand, guests map[string]bool, allowed bool) (step volumeStep, why string) {
	have := seen.attached
	switch {
	case have.use != unused && seen.over:
		if have.use == forMachine && hasKey(guests, have.machineID) {
			return leave, "" // the guest is killed first
		}
		return drop, ""
	case have.use == unused && v.GetRemoving() && v.GetAttachment().GetServerId() == serverID:
		return letGo, ""
	case have.use == forUpkeep && want.use == forConnection:
		return leave, "" // the same to the catalog: neither is for a machine
	case have.use == forArrival && hasKey(guests, have.machineID) && want.use == unused:
		return leave, "" // the guest is killed first
	case have.use != unused && !takesUp(have, want) && (want.use != have.use || want.machineID != have.machineID):
		return detach, ""
	case have.use == unused && want.use == forArrival:
		return standBy, ""
	case have.use != want.use && want.use != unused:
		if !allowed {
			return leave, "this server waits for its lease"
		}
		if why := barred(st, v, serverID, want); why != "" {
			return leave, why
		}
		if makesWay(st, v) && v.GetAttachment().GetServerId() != serverID {
			return askFor, ""
		}
		return attach, ""
	}
	return leave, ""
}

// takesUp tells whether a machine has arrived whose disk's socket is here: the
// attachment takes it up.
func takesUp(have, want demand) bool {
	return have.use == forArrival && want.use == forMachine && have.machineID == want.machineID
}

// barred says why a volume can't be attached on this server now; empty if it
// can. It may be taken over from nobody, from this server's own crashed run,
// from a server that is lost, and from one whose machine was placed here; not
// from a server that is alive and uses it.
func barred(st *catalog.State, v *argonv1.Volume, serverID string, want demand) string {
	name := v.GetMeta().GetName()
	if v.GetRemoving() {
		return fmt.Sprintf("volume %s is being removed", name)
	}
	if !slices.ContainsFunc(v.GetReplicas(), inSync) {
		return fmt.Sprintf("volume %s has no replica in sync yet", name)
	}
	a := v.GetAttachment()
	if a == nil || a.GetServerId() == serverID || !placement.Alive(st, a.GetServerId()) {
		return ""
	}
	if want.use == forMachine && a.GetMachineId() == want.machineID {
		return ""
	}
	other := st.Servers[a.GetServerId()].GetMeta().GetName()
	if m := st.Machines[a.GetMachineId()]; m != nil {
		return fmt.Sprintf("volume %s is attached on server %s for machine %s", name, other, m.GetMeta().GetName())
	}
	if makesWay(st, v) {
		return "" // for a user; who else would wait for it has no reason to
	}
	return fmt.Sprintf("volume %s is attached on server %s, by `argon volume connect`, an export or an import", name, other)
}

// makesWay tells whether a volume is attached on a living server for upkeep
// only: that server detaches it when a user wants it elsewhere.
func makesWay(st *catalog.State, v *argonv1.Volume) bool {
	a := v.GetAttachment()
	return a != nil && a.GetMachineId() == "" && !a.GetConnected() && placement.Alive(st, a.GetServerId())
}

// keepsUp tells whether this server should attach a volume that nobody uses,
// because it was left unclean or because its holder has work. One server does:
// the one that has it attached, else the one with the lowest in-sync replica
// that is alive. An attachment for upkeep lasts until it has served: before that
// it has found out nothing, and whoever ended it would have to begin again.
func keepsUp(st *catalog.State, v *argonv1.Volume, serverID string, seen volumeSeen) bool {
	if v.GetRemoving() || inUse(st, v) || seen.yields {
		return false
	}
	if by := v.GetAttachment().GetWantedBy(); by != "" && by != serverID && placement.Alive(st, by) {
		return false
	}
	work := hasWork(st, v)
	if seen.attached.use != unused {
		return work || seen.attached.use == forUpkeep && !seen.ready
	}
	a := v.GetAttachment()
	if a != nil && placement.Alive(st, a.GetServerId()) {
		return a.GetServerId() == serverID // our own crashed run
	}
	unclean := v.GetEpoch() > 0 && !v.GetClean()
	return (work || a != nil || unclean) && keeper(st, v) == serverID
}

// hasWork tells whether a volume's record has something that only a holder can
// do. A volume that was never attached waits until its replicas are made:
// those that are made from its base later would have to be copied to.
func hasWork(st *catalog.State, v *argonv1.Volume) bool {
	making := func(r *argonv1.Replica) bool {
		return r.GetState() == argonv1.ReplicaState_REPLICA_STATE_CREATING && r.GetReason() == "" && placement.Alive(st, r.GetServerId())
	}
	if v.GetEpoch() == 0 && slices.ContainsFunc(v.GetReplicas(), making) {
		return false
	}
	behind := slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool {
		return r.GetState() == argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC && !r.GetRetiring() && placement.Alive(st, r.GetServerId())
	})
	asked := slices.ContainsFunc(v.GetSnapshots(), func(s *argonv1.Snapshot) bool {
		return s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_CREATING
	})
	return behind || asked || v.GetRollbackTo() != 0 || v.GetWantedBytes() > v.GetSizeBytes() ||
		v.GetScrub().GetWanted() > v.GetScrub().GetFinished()
}

// keeper is the server that keeps an unattached volume up; empty if none can.
func keeper(st *catalog.State, v *argonv1.Volume) string {
	var best *argonv1.Replica
	for _, r := range v.GetReplicas() {
		if inSync(r) && placement.Alive(st, r.GetServerId()) && (best == nil || r.GetId() < best.GetId()) {
			best = r
		}
	}
	return best.GetServerId()
}

// inUse tells whether a machine that has a server uses the volume.
func inUse(st *catalog.State, v *argonv1.Volume) bool {
	return slices.ContainsFunc(machinesOf(st, v.GetMeta().GetId()), func(m *argonv1.Machine) bool {
		return m.GetServerId() != ""
	})
}

// machinesOf lists the machines that a volume is a disk of, oldest first.
func machinesOf(st *catalog.State, volumeID string) []*argonv1.Machine {
	var ms []*argonv1.Machine
	for m := range maps.Values(st.Machines) {
		if slices.Contains(m.GetVolumeIds(), volumeID) {
			ms = append(ms, m)
		}
	}
	slices.SortFunc(ms, func(a, b *argonv1.Machine) int { return cmp.Compare(a.GetMeta().GetId(), b.GetMeta().GetId()) })
	return ms
}

func inSync(r *argonv1.Replica) bool {
	return r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
}

func hasKey[K comparable, V any](m map[K]V, k K) bool {
	_, ok := m[k]
	return ok
}
