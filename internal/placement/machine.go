package placement

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/dustin/go-humanize"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// PlaceMachine chooses the server that a machine should run on: one that holds
// its lease, is no witness, has its memory and CPUs free, and has the
// acceleration that the machine insists on. Among those it takes the one that the
// machine is to start on first, if it has to; then it prefers the one with the most of the machine's disks in sync on its own disk, so that reads
// stay local; then the least loaded; then the first by name.
//
// What the machine itself occupies where it is now counts as free. The error
// says in one line what did not fit.
func PlaceMachine(st *catalog.State, m *argonv1.Machine) (serverID string, err error) {
	all := candidates(st)
	if len(all) == 0 {
		return "", errors.New("no server that may run machines is alive")
	}
	if m.GetAcceleration() == "kvm" {
		all = slices.DeleteFunc(all, func(c candidate) bool { return c.server.GetAcceleration() != "kvm" })
		if len(all) == 0 {
			return "", errors.New("no server that is alive has KVM; create the machine with acceleration auto or tcg")
		}
	}
	// As it is recorded: m may be what it is to become.
	now := st.Machines[m.GetMeta().GetId()]
	if now == nil {
		now = m
	}
	for _, c := range all {
		if c.id() == m.GetServerId() {
			c.free.Cpus += now.GetCpus()
			c.free.MemoryBytes += MemoryOn(c.server, now)
		}
	}
	fit := slices.DeleteFunc(slices.Clone(all), func(c candidate) bool {
		return c.free.GetMemoryBytes() < MemoryOn(c.server, m) || c.free.GetCpus() < m.GetCpus()
	})
	overcommit := CPUOvercommit(st)
	if len(fit) == 0 {
		return "", tooBig(all, m, overcommit)
	}
	if slices.ContainsFunc(fit, func(c candidate) bool { return c.id() == m.GetStartOn() }) {
		return m.GetStartOn(), nil
	}
	near := nearBytes(st, m)
	best := slices.MinFunc(fit, func(a, b candidate) int {
		return cmp.Or(
			cmp.Compare(near[b.id()], near[a.id()]),
			cmp.Compare(load(a, m, overcommit), load(b, m, overcommit)),
			byName(a, b),
		)
	})
	return best.id(), nil
}

// nearBytes says how much of the machine's disks each server has in sync.
func nearBytes(st *catalog.State, m *argonv1.Machine) map[string]uint64 {
	near := map[string]uint64{}
	for _, id := range m.GetVolumeIds() {
		v := st.Volumes[id]
		for _, r := range v.GetReplicas() {
			if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
				near[r.GetServerId()] += v.GetSizeBytes()
			}
		}
	}
	return near
}

// load is how full a server would be with the machine on it, by the scarcer of
// memory and CPUs.
func load(c candidate, m *argonv1.Machine, overcommit uint32) float64 {
	have := c.server.GetCapacity()
	memory := 1 - float64(c.free.GetMemoryBytes()-MemoryOn(c.server, m))/float64(max(1, have.GetMemoryBytes()))
	cpus := 1 - float64(c.free.GetCpus()-m.GetCpus())/float64(max(1, have.GetCpus()*overcommit))
	return max(memory, cpus)
}

// tooBig says why no server has room for the machine.
func tooBig(all []candidate, m *argonv1.Machine, overcommit uint32) error {
	roomy := slices.MaxFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.free.GetMemoryBytes(), b.free.GetMemoryBytes()), byName(b, a))
	})
	quick := slices.MaxFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.free.GetCpus(), b.free.GetCpus()), byName(b, a))
	})
	switch {
	case roomy.free.GetMemoryBytes() < MemoryOn(roomy.server, m):
		return fmt.Errorf("no server has %s of memory free, its %s and what running it takes; the most is %s on server %s",
			humanize.IBytes(MemoryOn(roomy.server, m)), humanize.IBytes(m.GetMemoryBytes()), humanize.IBytes(roomy.free.GetMemoryBytes()), roomy.name())
	case quick.free.GetCpus() < m.GetCpus():
		return fmt.Errorf("no server has %d CPUs free; the most is %d on server %s (each CPU is promised to %d at most)",
			m.GetCpus(), quick.free.GetCpus(), quick.name(), overcommit)
	}
	return fmt.Errorf("no server has both %s of memory and %d CPUs free", humanize.IBytes(m.GetMemoryBytes()), m.GetCpus())
}
