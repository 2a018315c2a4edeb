// Package placement decides which server keeps a replica and which one runs a
// machine.
//
// What lives here: pure functions from the catalog's records to a server's id
// or to an error that says what did not fit. What must not: I/O, clocks,
// randomness, the decision whether something should be placed at all
// (controller).
//
// Every choice is deterministic: the same records give the same answer, so
// that two leaders in a row do not undo each other's work.
package placement

import (
	"cmp"
	"slices"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// DefaultCPUOvercommit is the cluster's setting if nobody chose one.
const DefaultCPUOvercommit = 4

// CPUOvercommit is how many virtual CPUs one CPU of a server may be promised
// to. Idle guests cost no CPU, and busy ones just become slower. Memory is
// never promised twice: running out of it kills guests.
func CPUOvercommit(st *catalog.State) uint32 {
	return cmp.Or(st.Cluster.GetSettings().GetCpuOvercommit(), DefaultCPUOvercommit)
}

// Alive tells whether a server holds its lease.
func Alive(st *catalog.State, serverID string) bool {
	return st.Leases[serverID] != nil
}

// MemoryOn is what a machine takes of a server's memory: its own, and what running
// it takes there.
func MemoryOn(s *argonv1.Server, m *argonv1.Machine) uint64 {
	accel := hypervisor.TCG
	if s.GetAcceleration() == string(hypervisor.KVM) && m.GetAcceleration() != string(hypervisor.TCG) {
		accel = hypervisor.KVM
	}
	return m.GetMemoryBytes() + uint64(hypervisor.Overhead(int(m.GetCpus()), int64(m.GetMemoryBytes()), accel))
}

// Allocated is what the records give away on a server: the CPUs and memory of
// every machine placed there, running or not (the controller takes a stopped
// machine off its server), or on its way there, and the full size of every
// replica and image copy there, as each may grow to it. Disk is promised
// without a limit.
func Allocated(st *catalog.State, serverID string) *argonv1.Resources {
	given := &argonv1.Resources{}
	for _, m := range st.Machines {
		if m.GetServerId() == serverID || m.GetMigration().GetToServerId() == serverID {
			given.Cpus += m.GetCpus()
			given.MemoryBytes += MemoryOn(st.Servers[serverID], m)
		}
	}
	for _, v := range st.Volumes {
		for _, r := range v.GetReplicas() {
			if r.GetServerId() == serverID {
				given.DiskBytes += v.GetSizeBytes()
			}
		}
	}
	for _, i := range st.Images {
		for _, c := range i.GetCopies() {
			if c.GetServerId() == serverID {
				given.DiskBytes += i.GetSizeBytes()
			}
		}
	}
	return given
}

// Free is what a server still has to give away: its capacity without the
// reserve and, of CPUs and memory, without what is allocated; of the disk,
// without what lies there, whoever put it there, and what is on its way. CPUs
// are virtual ones (CPUOvercommit).
//
// The reserve keeps a server working when its guests use all they were given:
// a tenth of the memory, at most 2 GiB, for the server's own processes and
// the page cache, and a part of the disk (Reserve).
func Free(st *catalog.State, serverID string) *argonv1.Resources {
	s := st.Servers[serverID]
	given, have := Allocated(st, serverID), s.GetCapacity()
	memory, disk := have.GetMemoryBytes(), have.GetDiskBytes()
	return &argonv1.Resources{
		Cpus:        less(have.GetCpus()*CPUOvercommit(st), given.Cpus),
		MemoryBytes: less(memory, min(memory/10, 2<<30), given.MemoryBytes),
		DiskBytes:   less(disk, Reserve(disk), s.GetUsed().GetDiskBytes(), awaited(st, serverID)),
	}
}

// less subtracts and stops at zero: records may give away more than there is,
// after a server came back smaller.
func less[T uint32 | uint64](have T, parts ...T) T {
	for _, p := range parts {
		have -= min(have, p)
	}
	return have
}

// candidate is a server that may be chosen, with what was found out about it.
type candidate struct {
	server *argonv1.Server
	free   *argonv1.Resources
	// promised is the part of its disk that records give away; it may be more
	// than the whole.
	promised float64
}

func (c candidate) id() string   { return c.server.GetMeta().GetId() }
func (c candidate) name() string { return c.server.GetMeta().GetName() }

// Takes reports whether a server takes machines and replicas, as far as there is
// room: it holds its lease, carries more than a vote, and is not drained.
func Takes(st *catalog.State, serverID string) bool {
	s := st.Servers[serverID]
	return Alive(st, serverID) && !s.GetWitness() && s.GetDrain() == nil
}

// candidates lists the servers that take something, in the order of their names.
func candidates(st *catalog.State) []candidate {
	var cs []candidate
	for id, s := range st.Servers {
		if Takes(st, id) {
			promised := float64(Allocated(st, id).GetDiskBytes()) / float64(max(1, s.GetCapacity().GetDiskBytes()))
			cs = append(cs, candidate{server: s, free: Free(st, id), promised: promised})
		}
	}
	slices.SortFunc(cs, byName)
	return cs
}

// byName orders by name, then by id: names are unique in the catalog, not in
// every slice that a test or a caller may make.
func byName(a, b candidate) int {
	return cmp.Or(cmp.Compare(a.name(), b.name()), cmp.Compare(a.id(), b.id()))
}
