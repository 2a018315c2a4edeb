package harness

import (
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/devcluster"
)

// Move is how a machine went from one server to another while it ran.
type Move struct {
	// Took is from the order until it went on elsewhere.
	Took time.Duration
	// Still is how long it stood still, by the servers' clocks, and QEMU how long
	// by QEMU's, which knows of its own part only.
	Still, QEMU time.Duration
}

// Migrate moves a machine, and returns how it went as its record says.
func (c *Cluster) Migrate(s *devcluster.Server, machine string, to *devcluster.Server) Move {
	c.T.Helper()
	c.Argon(s, "machine", "migrate", machine, "--to", to.Name)
	v, err := c.Machine(s, machine)
	if err != nil {
		c.T.Fatal(err)
	}
	m := v.GetMachine()
	r := m.GetLastMigration()
	if v.GetServerName() != to.Name || r.GetFailure() != "" || m.GetStatus().GetState() != argonv1.MachineState_MACHINE_STATE_RUNNING {
		c.T.Fatalf("machine %s is %v on %s after its way to %s: %v", machine, m.GetStatus().GetState(), v.GetServerName(), to.Name, r)
	}
	resumed := r.GetResumed().AsTime()
	return Move{
		Took: resumed.Sub(r.GetSince().AsTime()), Still: resumed.Sub(r.GetPaused().AsTime()),
		QEMU: time.Duration(r.GetDowntimeMs()) * time.Millisecond,
	}
}
