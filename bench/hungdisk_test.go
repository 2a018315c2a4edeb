package bench_test

import (
	"os/exec"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// BenchmarkHungDisk has the file system of a replica's server take no writes any
// more, -rounds times, and measures for how long the guest's longest write waits, on
// another server.
func BenchmarkHungDisk(b *testing.B) {
	harness.NeedRoot(b)
	c := harness.Up(b, devcluster.Options{Servers: 3, Disk: 2 << 30})
	s := c.S(1)
	c.Argon(s, "image", "import", "tiny", harness.TinyImage(b))
	var stalls []time.Duration
	for range *rounds {
		c.Argon(s, "machine", "create", "m", "--image", "tiny", "--memory", "128MiB", "--replicas", "3", "--publish", "8080:80")
		home := c.ByName(c.Running(s, "m"))
		w := c.Watch(8080, home)
		until := func(n uint64) { c.Eventually("the guest counts", func() bool { return w.Highest() >= n }) }
		until(10)
		c.Healthy(home, "m")
		hung := c.Other(home.Name)
		must(b, exec.CommandContext(b.Context(), "fsfreeze", "--freeze", hung.Dir).Run())
		from := w.Highest()
		time.Sleep(200 * time.Millisecond) // what was answered before may still arrive
		until(from + 30)
		last, _ := w.Last()
		must(b, exec.CommandContext(b.Context(), "fsfreeze", "--unfreeze", hung.Dir).Run())
		stalls = append(stalls, last.Stall)
		b.Logf("the disk of %s hung: the longest count took %v", hung.Name, last.Stall)
		w.Stop()
		c.Healthy(home, "m")
		c.Argon(home, "machine", "rm", "m", "--force")
		s = home
	}
	report(b, "the disk of a replica's server hangs → the guest's longest count", stalls)
}
