package e2e_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
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

// A server is stopped in order, as when its host is rebooted: its machine goes
// elsewhere and runs on, and the server takes machines again once it is back.
func serverStops(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	other := c.Other(home.Name)
	w := c.Watch(port, other)
	counts(c, w, 5)
	boot := lastBoot(t, w)
	must(t, home.Stop(t.Context()))
	if on := c.Running(other, machine, home.Name); on == home.Name {
		t.Errorf("it is still on %s", on)
	}
	counts(c, w, 5)
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}
	must(t, home.Start(t.Context()))
	c.Eventually(home.Name+" takes machines again", func() bool {
		list, err := client.Call(t.Context(), c.API(other).Servers.ListServers, &argonv1.ListServersRequest{})
		must(t, err)
		for _, v := range list.GetServers() {
			if v.GetServer().GetMeta().GetName() == home.Name {
				return v.GetServer().GetDrain() == nil
			}
		}
		return false
	})
}

// The only server stops: its guest is shut down, not cut off, and its machine
// starts again with the server.
func TestOnlyServerStops(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, devcluster.Options{Servers: 1})
	home := counting(t, c, "1")
	w := c.Watch(port, home)
	counts(c, w, 5)
	boot := lastBoot(t, w)
	con := console(t, c, home, machine)
	con.hear("boot, counter was 0")
	must(t, home.Stop(t.Context()))
	// The last that its kernel says when it has shut down; one that is cut off says
	// nothing.
	con.hear("reboot: Power down")
	log, err := os.ReadFile(home.LogPath())
	must(t, err)
	// It had ended before the daemon did: nobody cut it off.
	asked, ended, left := strings.Index(string(log), "machines that did not move are shut down"),
		strings.Index(string(log), "a guest has ended"), strings.Index(string(log), "does not lead the cluster any more")
	if asked < 0 || ended < asked || left < ended {
		t.Errorf("the guest was not shut down:\n%s", log)
	}
	must(t, home.Start(t.Context()))
	c.Eventually("the machine starts again", func() bool {
		r, ok := w.Last()
		return ok && r.Boot != boot
	})
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
