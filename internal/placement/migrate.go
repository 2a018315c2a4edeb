package placement

import (
	"errors"
	"fmt"
	"maps"

	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// PlaceElsewhere chooses the server that a running machine should go to: as
// PlaceMachine does, among the others that take machines and run guests on the
// acceleration that it runs on now.
func PlaceElsewhere(st *catalog.State, m *argonv1.Machine) (serverID string, err error) {
	others := *st
	others.Leases = maps.Clone(st.Leases)
	delete(others.Leases, m.GetServerId())
	for id, s := range st.Servers {
		if s.GetDrain() != nil {
			delete(others.Leases, id)
		}
	}
	moved := proto.CloneOf(m)
	moved.Acceleration = m.GetStatus().GetAcceleration()
	if serverID, err = PlaceMachine(&others, moved); err != nil {
		return "", fmt.Errorf("it can go nowhere: %w", err)
	}
	return serverID, nil
}

// CanReceive says in one line why a running machine can't go to a server; nil
// if it can.
func CanReceive(st *catalog.State, m *argonv1.Machine, serverID string) error {
	s, free := st.Servers[serverID], Free(st, serverID)
	accelerated := m.GetStatus().GetAcceleration()
	switch {
	case serverID == m.GetServerId():
		return errors.New("it runs there already")
	case s.GetWitness():
		return errors.New("it is a witness, which runs no machines")
	case !Alive(st, serverID):
		return errors.New("it is down")
	case s.GetDrain() != nil:
		return errors.New("it is drained, and takes no machines")
	case accelerated == "kvm" && s.GetAcceleration() != "kvm":
		return errors.New("the machine runs on KVM, which that server can't give")
	case free.GetMemoryBytes() < m.GetMemoryBytes():
		return fmt.Errorf("it has %s of memory free, and the machine needs %s",
			humanize.IBytes(free.GetMemoryBytes()), humanize.IBytes(m.GetMemoryBytes()))
	case free.GetCpus() < m.GetCpus():
		return fmt.Errorf("it has %d CPUs free, and the machine needs %d (each CPU is promised to %d at most)",
			free.GetCpus(), m.GetCpus(), CPUOvercommit)
	}
	return nil
}

// NextPlacement is one that no guest of the machine ever had.
func NextPlacement(m *argonv1.Machine) uint64 {
	return max(m.GetPlacement(), m.GetLastPlacement()) + 1
}
