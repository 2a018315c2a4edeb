package e2e_test

import (
	"slices"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// The daemon dies; the guard starts it again, and the guest never notices more
// than a disk that waits.
func daemonIsKilled(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	w := c.Watch(port, home)
	counts(c, w, 5)
	boot, guest := lastBoot(t, w), guestPIDs(t, home)

	for range 3 {
		before, err := home.PIDs(devcluster.Daemon)
		must(t, err)
		must(t, home.Kill(t.Context(), devcluster.Daemon))
		c.Eventually("the guard starts the daemon again", func() bool {
			now, err := home.PIDs(devcluster.Daemon)
			return err == nil && len(now) == 1 && now[0] != before[0]
		})
		counts(c, w, 5)
	}
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}
	if now := guestPIDs(t, home); !slices.Equal(now, guest) {
		t.Errorf("the guest's process was %v, is %v", guest, now)
	}
	c.Healthy(home, machine)
}

// The guard dies: guests and daemon must not live on without it, since nobody
// would end them with the lease.
func guardIsKilled(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	other := c.Other(home.Name)
	w := c.Watch(port, other)
	counts(c, w, 5)
	must(t, home.Kill(t.Context(), devcluster.Guard))
	neverTwo(t, c, home)
	c.Running(other, machine, home.Name)
	counts(c, w, 5)
	oneCopy(c)
	must(t, home.Start(t.Context()))
}

// The daemon hangs for longer than the lease: the guard ends the guest before
// it starts elsewhere.
func daemonHangs(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	hangs(t, c, home, devcluster.Daemon)
}

// The guard hangs while the server is cut off: the daemon ends the guest in its
// place, before it starts elsewhere.
func guardHangs(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	hangs(t, c, home, devcluster.Guard)
}

func hangs(t *testing.T, c *harness.Cluster, home *devcluster.Server, part devcluster.Part) {
	other := c.Other(home.Name)
	w := c.Watch(port, other)
	counts(c, w, 5)
	must(t, home.Pause(t.Context(), part))
	neverTwo(t, c, home)
	c.Running(other, machine, home.Name)
	counts(c, w, 5)
	must(t, home.Resume())
	c.Healthy(other, machine)
	oneCopy(c)
	counts(c, w, 5)
}

// A whole server stands still for longer than the lease, guard and guest too,
// and goes on as if nothing had been: its guest must not write to the disk
// that another server holds by then.
func serverPauses(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	other := c.Other(home.Name)
	w := c.Watch(port, other)
	counts(c, w, 5)
	must(t, home.Pause(t.Context()))
	c.Running(other, machine, home.Name)
	counts(c, w, 5)
	must(t, home.Resume())
	oneCopy(c)
	c.Healthy(other, machine)
	counts(c, w, 5)
}

// Only QEMU dies: the machine starts again on the same server.
func guestIsKilled(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	w := c.Watch(port, home)
	counts(c, w, 5)
	boot := lastBoot(t, w)
	must(t, home.Kill(t.Context(), devcluster.Guests))
	c.Eventually("the guest boots again", func() bool {
		s, _ := w.Last()
		return s.Boot != boot
	})
	counts(c, w, 5)
	if on := c.Running(home, machine); on != home.Name {
		t.Errorf("the machine moved to %s", on)
	}
}

func guestPIDs(t *testing.T, s *devcluster.Server) []int {
	t.Helper()
	pids, err := s.PIDs(devcluster.Guests)
	must(t, err)
	return pids
}
