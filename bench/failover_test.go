package bench_test

import (
	"flag"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var rounds = flag.Int("rounds", 20, "how often a server is killed")

// BenchmarkFailover kills the server that runs a machine, and measures until
// QEMU runs on another one, until the guest's first answer, and, for
// comparison, how long the guest takes to boot when nothing is wrong.
func BenchmarkFailover(b *testing.B) {
	c := harness.Up(b, devcluster.Options{Servers: 3})
	s := c.S(1)
	c.Argon(s, "image", "import", "tiny", harness.TinyImage(b))
	c.Argon(s, "machine", "create", "m", "--image", "tiny", "--memory", "128MiB", "--replicas", "3", "--publish", "8080:80")
	home := c.ByName(c.Running(s, "m"))
	w := c.Watch(8080, c.Servers()...)
	answered := func(after int) { c.Eventually("the guest answers", func() bool { return len(w.Reports()) > after }) }
	answered(0)

	var elsewhere, back []time.Duration
	for range *rounds {
		c.Healthy(home, "m")
		killed := time.Now()
		must(b, home.Kill(b.Context()))
		next := guestElsewhere(b, c, home)
		elsewhere = append(elsewhere, time.Since(killed))
		answered(len(w.Reports()))
		back = append(back, time.Since(killed))
		must(b, w.Err())
		must(b, home.Start(b.Context()))
		c.Healthy(next, "m")
		home = next
	}
	report(b, "SIGKILL of all of a server's processes → QEMU runs elsewhere", elsewhere)
	report(b, "… → the guest has booted and answers over HTTP", back)
}

// guestElsewhere waits for a guest's process on another server than home.
func guestElsewhere(b *testing.B, c *harness.Cluster, home *devcluster.Server) *devcluster.Server {
	b.Helper()
	return anotherGuest(b, c, func(s *devcluster.Server, _ int) bool { return s != home })
}

// anotherGuest waits for a guest that counts and returns the server that it is on.
func anotherGuest(b *testing.B, c *harness.Cluster, counts func(s *devcluster.Server, pid int) bool) *devcluster.Server {
	b.Helper()
	deadline := time.Now().Add(harness.Patience)
	for time.Now().Before(deadline) {
		for _, s := range c.Servers() {
			pids, err := s.PIDs(devcluster.Guests)
			must(b, err)
			for _, pid := range pids {
				if counts(s, pid) {
					return s
				}
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
	b.Fatal("the machine did not start elsewhere")
	return nil
}
