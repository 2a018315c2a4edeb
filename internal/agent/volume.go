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
	// forRepair: to copy to replicas that are behind.
	forRepair
	// forConnection: a user asked for it (`argon volume connect`).
	forConnection
	forMachine
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
}

// volumeStep is what to do next with a volume.
type volumeStep uint8

const (
	leave volumeStep = iota
	attach
	detach
	// drop gives up an attachment that is over.
	drop
)

func (s volumeStep) String() string {
	return [...]string{"leave", "attach", "detach", "drop"}[s]
}

// demandFor says what this server should have a volume attached for. A guest
// that is here keeps its disks until it is gone; guests says for each machine
// that has one here whether it may stay.
func demandFor(st *catalog.State, v *argonv1.Volume, serverID string, seen volumeSeen, guests map[string]bool) demand {
	id := v.GetMeta().GetId()
	if a := seen.attached; a.use == forMachine && hasKey(guests, a.machineID) {
		return a
	}
	for _, m := range machinesOf(st, id) {
		mayStay, hasGuest := guests[m.GetMeta().GetId()]
		if hasGuest && !mayStay {
			continue
		}
		wanted := belongs(m, serverID) && m.GetWanted() == argonv1.Wanted_WANTED_RUNNING
		if hasGuest || wanted {
			return demand{use: forMachine, machineID: m.GetMeta().GetId(), guestRuns: hasGuest}
		}
	}
	switch {
	case seen.connections > 0:
		return demand{use: forConnection}
	case repairs(st, v, serverID, seen):
		return demand{use: forRepair}
	}
	return demand{}
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
	case have.use == forRepair && want.use == forConnection:
		return leave, "" // the same to the catalog: neither is for a machine
	case have.use != unused && (want.use != have.use || want.machineID != have.machineID):
		return detach, ""
	case have.use == unused && want.use != unused:
		if !allowed {
			return leave, "this server waits for its lease"
		}
		if why := barred(st, v, serverID, want); why != "" {
			return leave, why
		}
		return attach, ""
	}
	return leave, ""
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
	return fmt.Sprintf("volume %s is attached on server %s, by `argon volume connect` or for repair", name, other)
}

// repairs tells whether this server should attach a volume that nobody uses,
// because it was left unclean or because a replica on a server that is alive
// is behind. One server does: the one that has it attached, else the one with
// the lowest in-sync replica that is alive. An attachment for repair lasts until
// it has served: before that it has found out nothing, and whoever ended it would
// have to begin again.
func repairs(st *catalog.State, v *argonv1.Volume, serverID string, seen volumeSeen) bool {
	if v.GetRemoving() || v.GetEpoch() == 0 || inUse(st, v) {
		return false
	}
	behind := slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool {
		return r.GetState() == argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC && placement.Alive(st, r.GetServerId())
	})
	if seen.attached.use != unused {
		return behind || seen.attached.use == forRepair && !seen.ready
	}
	a := v.GetAttachment()
	if a != nil && placement.Alive(st, a.GetServerId()) {
		return a.GetServerId() == serverID // our own crashed run
	}
	return (behind || a != nil || !v.GetClean()) && repairer(st, v) == serverID
}

// repairer is the server that repairs an unattached volume; empty if none can.
func repairer(st *catalog.State, v *argonv1.Volume) string {
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
