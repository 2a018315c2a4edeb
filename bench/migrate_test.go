package bench_test

import (
	"flag"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var (
	migrations    = flag.Int("migrations", 50, "how often a machine is migrated")
	drainMachines = flag.Int("drain-machines", 10, "how many machines are on the server that is drained")
	drainParallel = flag.Int("drain-parallel", 2, "how many of them are moved at once")
)

// BenchmarkMigration moves a machine of 256 MiB round three servers while it
// counts and hashes its disk, and measures for how long it stood still: by the
// servers' clocks, by QEMU's, and how long a block took at most by the guest's.
func BenchmarkMigration(b *testing.B) {
	c := harness.Up(b, devcluster.Options{Servers: 3})
	s := c.S(1)
	c.Argon(s, "image", "import", "tiny", harness.TinyImage(b))
	c.Argon(s, "machine", "create", "m", "--image", "tiny", "--memory", "256MiB", "--replicas", "2", "--disk", harness.HasherDisk, "--publish", "8080:80")
	home := c.ByName(c.Running(s, "m"))
	w := c.Watch(8080, c.Servers()...)
	c.Eventually("the guest answers", func() bool { return w.Highest() > 0 })
	h := c.Hash(home, "m", 8080)
	first, _ := w.Last()

	ups := []time.Duration{h.Now().Up}
	var still, qemu, took []time.Duration
	for range *migrations {
		c.Healthy(home, "m")
		next := c.S((slices.Index(c.Servers(), home)+1)%3 + 1)
		m := c.Migrate(home, "m", next)
		still, qemu, took = append(still, m.Still), append(qemu, m.QEMU), append(took, m.Took)
		blocks := h.Now().Blocks
		c.Eventually("the guest hashes on", func() bool { return h.Now().Blocks > blocks+2 })
		now := h.Now()
		if last, _ := w.Last(); now.Wrong > 0 || last.Boot != first.Boot {
			b.Fatalf("after %d moves: %+v, boot %s, first %s", len(ups), now, last.Boot, first.Boot)
		}
		must(b, w.Err())
		ups, home = append(ups, now.Up), next
	}
	last := h.Now().Blocks
	c.Eventually("the guest has read all blocks once more", func() bool { return h.Now().Blocks > last+16 })
	if now := h.Now(); now.Wrong > 0 {
		b.Fatalf("%d blocks are not what was written", now.Wrong)
	}
	var guest, usual []time.Duration
	blocks := h.Blocks()
	for i := range *migrations {
		guest = append(guest, harness.Longest(blocks, ups[i], ups[i+1]))
	}
	for _, block := range blocks {
		usual = append(usual, block.Took)
	}
	reportMillis(b, "the guest stands still, by the servers' clocks", still)
	reportMillis(b, "… by QEMU's", qemu)
	reportMillis(b, "the longest that a block of its disk took, by the guest's clock", guest)
	reportMillis(b, "any block, at any time", usual)
	report(b, "from the order until it goes on", took)
}

// reportMillis prints a row in milliseconds.
func reportMillis(b *testing.B, what string, all []time.Duration) {
	b.Helper()
	ms := func(d time.Duration) string { return fmt.Sprintf("%.0f ms", float64(d)/float64(time.Millisecond)) }
	b.Logf("| %s | %d | %s | %s | %s | %s |", what, len(all), ms(slices.Min(all)), ms(quantile(all, 0.5)), ms(quantile(all, 0.99)), ms(slices.Max(all)))
}

// BenchmarkDrain empties a server of small machines that run, and measures how
// long that takes; all of them run on.
func BenchmarkDrain(b *testing.B) {
	c := harness.Up(b, devcluster.Options{Servers: 3})
	s, from := c.S(1), c.S(2)
	c.Argon(s, "image", "import", "tiny", harness.TinyImage(b))
	c.Argon(s, "cluster", "set", "--cpu-overcommit", fmt.Sprint(*drainMachines))
	names := make([]string, *drainMachines)
	for i := range names {
		names[i] = fmt.Sprintf("m%d", i)
		c.Argon(s, "machine", "create", names[i], "--image", "tiny", "--memory", "64MiB", "--replicas", "2")
	}
	starts := map[string]uint32{}
	for _, name := range names {
		if on := c.Running(s, name); on != from.Name {
			c.Migrate(s, name, from)
		}
		v, err := c.Machine(s, name)
		must(b, err)
		starts[name] = v.GetMachine().GetStatus().GetStarts()
		c.Healthy(s, name)
	}
	began := time.Now()
	c.Argon(s, "server", "drain", from.Name, "--yes", "--parallel", fmt.Sprint(*drainParallel), "--timeout", "30m")
	took := time.Since(began)
	for _, name := range names {
		c.Running(s, name, from.Name)
		v, err := c.Machine(s, name)
		must(b, err)
		if now := v.GetMachine().GetStatus().GetStarts(); now != starts[name] {
			b.Errorf("machine %s was started again: %v", name, v.GetMachine().GetLastMigration())
		}
	}
	b.Logf("| a server with %d running machines is drained, %d at once | %.1f s |", len(names), *drainParallel, took.Seconds())
	b.ReportMetric(took.Seconds(), "s/drain")
	b.ReportMetric(0, "ns/op")
}
