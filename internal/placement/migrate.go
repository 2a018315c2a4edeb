package placement

import (
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

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
	m = AsStarted(m) // the guest there has to be the same
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
	case free.GetMemoryBytes() < MemoryOn(s, m):
		return fmt.Errorf("it has %s of memory free, and the machine needs %s, its %s and what running it takes",
			humanize.IBytes(free.GetMemoryBytes()), humanize.IBytes(MemoryOn(s, m)), humanize.IBytes(m.GetMemoryBytes()))
	case free.GetCpus() < m.GetCpus():
		return fmt.Errorf("it has %d CPUs free, and the machine needs %d (each CPU is promised to %d at most)",
			free.GetCpus(), m.GetCpus(), CPUOvercommit(st))
	}
	return nil
}

// MigrationTime is after what time a migration is given up if nobody says
// otherwise.
const MigrationTime = 10 * time.Minute

// Migrate gives a machine the order to go to a server while it runs. The id is a
// new one.
func Migrate(m *argonv1.Machine, id, toServerID string, now time.Time, limit time.Duration) {
	m.Migration = &argonv1.Migration{
		Id: id, ToServerId: toServerID, Placement: NextPlacement(m),
		Phase: argonv1.MigrationPhase_MIGRATION_PHASE_PREPARING,
		Since: timestamppb.New(now), Deadline: timestamppb.New(now.Add(limit)),
	}
	m.LastPlacement = m.GetMigration().GetPlacement()
}

// RunsNow tells whether a machine runs where it was placed, as its server says.
func RunsNow(m *argonv1.Machine) bool {
	s := m.GetStatus()
	return s.GetState() == argonv1.MachineState_MACHINE_STATE_RUNNING && s.GetPlacement() == m.GetPlacement()
}

// FailedToLeave is the migration off a drained server that came to nothing; nil if
// none did since it is drained.
func FailedToLeave(s *argonv1.Server, m *argonv1.Machine) *argonv1.MigrationReport {
	last := m.GetLastMigration()
	if last.GetFailure() == "" || last.GetFromServerId() != s.GetMeta().GetId() || !proto.Equal(last.GetDrainSince(), s.GetDrain().GetSince()) {
		return nil
	}
	return last
}

// KeptFromLeaving tells whether somebody wants a machine to stay on a drained
// server.
func KeptFromLeaving(s *argonv1.Server, m *argonv1.Machine) bool {
	return FailedToLeave(s, m).GetCancelled()
}

// BeingSaved is the checkpoint of a machine that is being taken, or about to be:
// its memory can't be sent elsewhere meanwhile. Nil if there is none.
func BeingSaved(st *catalog.State, m *argonv1.Machine) *argonv1.Checkpoint {
	for _, c := range CheckpointsOf(st, m.GetMeta().GetId()) {
		switch c.GetState() {
		case argonv1.CheckpointState_CHECKPOINT_STATE_WANTED, argonv1.CheckpointState_CHECKPOINT_STATE_TAKING:
			return c
		}
	}
	return nil
}

// NextPlacement is one that no guest of the machine ever had.
func NextPlacement(m *argonv1.Machine) uint64 {
	return max(m.GetPlacement(), m.GetLastPlacement()) + 1
}
