package e2e_test

import (
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// story is one of several that happen to the same machine, one after the other.
// It is told which server runs the machine, and leaves a cluster that becomes
// whole again by itself.
type story struct {
	name   string
	happen func(*testing.T, *harness.Cluster, *devcluster.Server)
}

// tell lets stories happen on one cluster. Each begins with a machine that runs,
// with all replicas in sync and every server there.
func tell(t *testing.T, o devcluster.Options, replicas string, stories ...story) {
	t.Helper()
	whole := harness.Up(t, o)
	counting(t, whole, replicas)
	for _, s := range stories {
		ok := t.Run(s.name, func(t *testing.T) {
			c := whole.For(t)
			must(t, c.WaitReady(t.Context()))
			home := c.ByName(c.Running(c.S(1), machine))
			c.Healthy(home, machine)
			oneCopy(c)
			s.happen(t, c, home)
		})
		if !ok {
			return // what comes after it would only fail, too
		}
	}
}

// What may happen to a machine's server and its processes, but for its links.
func TestFailures(t *testing.T) {
	t.Parallel()
	tell(t, devcluster.Options{Servers: 3}, "2",
		story{"daemon dies", daemonIsKilled},
		story{"daemon hangs", daemonHangs},
		story{"guard dies", guardIsKilled},
		story{"guard hangs", guardHangs},
		story{"guest dies", guestIsKilled},
		story{"server pauses", serverPauses},
		story{"server is stopped in order", serverStops},
		story{"servers die in turn", serversDieInTurn},
		story{"majority is lost", majorityLost},
		story{"all servers die", allServersDie},
	)
}

// What a machine must not notice.
func TestOtherServersFail(t *testing.T) {
	t.Parallel()
	tell(t, devcluster.Options{Servers: 3}, "3",
		story{"a replica's server dies", replicaServerDies},
		story{"the leader dies", leaderIsKilled},
	)
}

// A server dies with all its processes while its machine writes: the machine
// runs again elsewhere with every count that it had told, and the server is
// part of the cluster again when it comes back. The same again and again, each
// time the server that runs the machine: what was resynced before is what the
// next failover rests on.
func serversDieInTurn(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	w := c.Watch(port, c.Servers()...)
	for range 3 {
		counts(c, w, 10)
		other := c.Other(home.Name)
		must(t, home.Kill(t.Context()))
		next := c.ByName(c.Running(other, machine, home.Name))
		counts(c, w, 10)
		must(t, home.Start(t.Context()))
		home = next
		c.Healthy(home, machine)
		oneCopy(c)
	}
	counts(c, w, 10)
}

// A server without the machine dies, one that keeps a replica: the machine
// goes on without a restart.
func replicaServerDies(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	w := c.Watch(port, home)
	counts(c, w, 5)
	boot := lastBoot(t, w)

	lost := c.Other(home.Name)
	must(t, lost.Kill(t.Context()))
	counts(c, w, 20)
	must(t, lost.Start(t.Context()))
	c.Healthy(home, machine)
	counts(c, w, 5)
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}
}

// Power fails everywhere at once, and comes back.
func allServersDie(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	w := c.Watch(port, c.Servers()...)
	counts(c, w, 10)
	for _, s := range c.Servers() {
		must(t, s.Kill(t.Context()))
	}
	for _, s := range c.Servers() {
		must(t, s.Start(t.Context()))
	}
	c.Running(home, machine)
	counts(c, w, 10)
	c.Healthy(home, machine)
	oneCopy(c)
}

func lastBoot(t *testing.T, w *harness.Watcher) string {
	t.Helper()
	s, ok := w.Last()
	if !ok {
		t.Fatal("the guest has not answered yet")
	}
	return s.Boot
}
