package e2e_test

import (
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// A server dies with all its processes while its machine writes: the machine
// runs again elsewhere with every count that it had told, and the server is
// part of the cluster again when it comes back.
func TestServerDies(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
	other := c.Other(home.Name)
	w := c.Watch(port, other)
	counts(c, w, 10)

	must(t, home.Kill(t.Context()))
	c.Running(other, machine, home.Name)
	counts(c, w, 10)

	must(t, home.Start(t.Context()))
	c.Healthy(other, machine)
	oneCopy(c)
	counts(c, w, 10)
}

// The same again and again, each time the server that runs the machine: what
// was resynced before is what the next failover rests on.
func TestServersDieInTurn(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
	w := c.Watch(port, c.Servers()...)
	for range 3 {
		counts(c, w, 5)
		c.Healthy(home, machine)
		other := c.Other(home.Name)
		must(t, home.Kill(t.Context()))
		next := c.ByName(c.Running(other, machine, home.Name))
		counts(c, w, 5)
		must(t, home.Start(t.Context()))
		home = next
	}
	c.Healthy(home, machine)
	oneCopy(c)
}

// A server without the machine dies, one that keeps a replica: the machine
// goes on without a restart.
func TestReplicaServerDies(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "3")
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
func TestAllServersDie(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
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
