package e2e_test

import (
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// What may happen to the links of a machine's server.
func TestLinksCut(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	tell(t, devcluster.Options{Servers: 3, Netns: true}, "2",
		story{"a server is cut off", serverCutOff},
		story{"the link between replicas is cut", replicaLinkCut},
	)
}

// A server is cut off while its machine writes. The majority restarts the
// machine; the cut server ends its own before that; after healing there is one
// copy, and no count is lost.
func serverCutOff(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	other := c.Other(home.Name)
	w := c.Watch(port, other)
	counts(c, w, 10)

	must(t, home.Cut(t.Context()))
	neverTwo(t, c, home)
	c.Running(other, machine, home.Name)
	counts(c, w, 10)

	must(t, home.Heal(t.Context()))
	c.Healthy(other, machine)
	oneCopy(c)
	counts(c, w, 10)
	clocksInOrder(t, w)
}

// neverTwo watches the processes until a guest runs on another server than
// home; home's must be gone by then. They share one kernel here, so what is
// seen of one is comparable with what is seen of the other.
func neverTwo(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	t.Helper()
	deadline := time.Now().Add(harness.Patience)
	for time.Now().Before(deadline) {
		// Elsewhere first: whatever home still has afterwards ran at the same
		// time.
		elsewhere := copies(c, home)
		here := len(guestPIDs(t, home))
		switch {
		case elsewhere > 0 && here > 0:
			t.Fatalf("a second guest runs while the one on %s still does", home.Name)
		case elsewhere > 0:
			return
		}
		time.Sleep(3 * time.Millisecond)
	}
	t.Fatal("the machine did not start elsewhere")
}

// clocksInOrder checks by the guest's own clock that no boot told anything
// after the next one did.
func clocksInOrder(t *testing.T, w *harness.Watcher) {
	t.Helper()
	last := make(map[string]time.Time)
	var boots []string
	for _, s := range w.Reports() {
		if _, ok := last[s.Boot]; !ok {
			boots = append(boots, s.Boot)
		}
		if s.Boot != boots[len(boots)-1] {
			t.Errorf("boot %s told %d after a later boot had begun", s.Boot, s.Count)
		}
		last[s.Boot] = s.Time
	}
	for i := 1; i < len(boots); i++ {
		if !last[boots[i-1]].Before(last[boots[i]]) {
			t.Errorf("boot %d ended at %v by its clock, the next one was at %v then", i, last[boots[i-1]], last[boots[i]])
		}
	}
}

// Only the link between the two servers that keep the replicas is cut. The
// machine goes on without a restart, on one replica; after healing both are
// equal again.
func replicaLinkCut(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	w := c.Watch(port, home)
	counts(c, w, 10)
	boot := lastBoot(t, w)
	far := replicaElsewhere(t, c, home)

	must(t, home.Mute(t.Context(), far))
	must(t, far.Mute(t.Context(), home))
	c.Eventually("the replica out of reach leaves the in-sync set", func() bool {
		v, err := c.Volume(home, machine)
		return err == nil && v.GetHealth() != "healthy"
	})
	counts(c, w, 10)
	must(t, home.Unmute(t.Context(), far))
	must(t, far.Unmute(t.Context(), home))
	c.Healthy(home, machine)
	counts(c, w, 10)
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}

	// What was written while the link was cut is on the other replica now.
	must(t, home.Kill(t.Context()))
	other := c.Other(home.Name)
	w2 := c.Watch(port, other)
	c.Running(other, machine, home.Name)
	c.Eventually("the guest answers", func() bool { return w2.Highest() > 0 })
	if s := w2.Reports()[0]; s.Count < w.Highest() {
		t.Errorf("the guest found %d after it had told %d", s.Count, w.Highest())
	}
}

// replicaElsewhere is a server that keeps a replica of the machine's disk,
// other than home.
func replicaElsewhere(t *testing.T, c *harness.Cluster, home *devcluster.Server) *devcluster.Server {
	t.Helper()
	v, err := c.Volume(home, machine)
	must(t, err)
	for _, r := range v.GetVolume().GetReplicas() {
		if s := c.ByID(home, r.GetServerId()); s != home {
			return s
		}
	}
	t.Fatalf("no other server than %s keeps a replica", home.Name)
	return nil
}

// The majority of the voters is lost: I/O may stop and guests may end, but
// when the voters are back, all comes back by itself and nothing is lost.
func majorityLost(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	w := c.Watch(port, c.Servers()...)
	counts(c, w, 10)
	var lost []*devcluster.Server
	for _, s := range c.Servers() {
		if s != home {
			lost = append(lost, s)
			must(t, s.Kill(t.Context()))
		}
	}
	c.Eventually("the guest ends with the lease", func() bool { return len(guestPIDs(t, home)) == 0 })
	for _, s := range lost {
		must(t, s.Start(t.Context()))
	}
	c.Running(home, machine)
	counts(c, w, 10)
	c.Healthy(home, machine)
	oneCopy(c)
}

// The server dies that leads the cluster, and no machine of its own with it:
// nothing else is restarted.
func leaderIsKilled(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	leader := leaderOf(c, home)
	for leader == home {
		// Both move, each where it likes.
		must(t, home.Kill(t.Context()))
		next := c.ByName(c.Running(c.Other(home.Name), machine, home.Name))
		must(t, home.Start(t.Context()))
		home = next
		c.Healthy(home, machine)
		leader = leaderOf(c, home)
	}
	w := c.Watch(port, home)
	counts(c, w, 5)
	boot := lastBoot(t, w)
	must(t, leader.Kill(t.Context()))
	counts(c, w, 20)
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}
	must(t, leader.Start(t.Context()))
	c.Healthy(home, machine)
}

// leaderOf is the server that leads, as server s says.
func leaderOf(c *harness.Cluster, s *devcluster.Server) *devcluster.Server {
	c.T.Helper()
	id := ""
	c.Eventually("somebody leads", func() bool {
		res, err := c.Status(s)
		id = res.GetLeaderId()
		return err == nil && id != ""
	})
	return c.ByID(s, id)
}
