// Package e2e_test drives clusters of real servers, guests and links through
// the faults that they must survive.
//
// What lives here: one file per kind of fault, each test telling one story. Long
// tests that mostly wait are parallel, so that two at a time run after the
// others; those that tell how long something took are not.
// What must not: helpers that more than one file needs (test/harness).
package e2e_test

import (
	"slices"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// The machine of most tests: a guest that counts, its port published.
const (
	machine = "counter"
	port    = 8080
)

// counting makes a machine that counts on a running cluster and returns the
// server that runs it.
func counting(t *testing.T, c *harness.Cluster, replicas string, more ...string) *devcluster.Server {
	t.Helper()
	s := c.S(1)
	c.Argon(s, "image", "import", "tiny", harness.TinyImage(t))
	c.Argon(s, append([]string{
		"machine", "create", machine, "--image", "tiny", "--replicas", replicas,
		"--memory", "128MiB", "--publish", "8080:80", "--stop-timeout", "20s",
	}, more...)...)
	return c.ByName(c.Running(s, machine))
}

// counts waits until the guest has counted on by n from where it is now.
func counts(c *harness.Cluster, w *harness.Watcher, n uint64) {
	c.T.Helper()
	from := w.Highest()
	c.Eventually("the guest counts on", func() bool { return w.Highest() >= from+n })
	if err := w.Err(); err != nil {
		c.T.Fatal(err)
	}
}

// copies is how many guests run on all servers together, but those.
func copies(c *harness.Cluster, not ...*devcluster.Server) int {
	c.T.Helper()
	n := 0
	for _, s := range c.Servers() {
		if slices.Contains(not, s) {
			continue
		}
		pids, err := s.PIDs(devcluster.Guests)
		if err != nil {
			c.T.Fatal(err)
		}
		n += len(pids)
	}
	return n
}

// oneCopy waits until one guest runs in the whole cluster, and no more.
func oneCopy(c *harness.Cluster) {
	c.T.Helper()
	c.Eventually("one guest runs", func() bool { return copies(c) == 1 })
}

// must fails the test for an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
