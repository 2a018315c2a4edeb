package bench_test

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var (
	snapshotTime   = flag.Duration("snapshot-time", time.Minute, "how long random writes are measured before and after a snapshot")
	snapshotRounds = flag.Int("snapshot-rounds", 5, "how often that is repeated; the median counts")
)

// BenchmarkSnapshot finds what a snapshot costs the writes that follow it: the
// first write to each block has to bring it up to the new layer. Each round has a
// volume of its own, filled before, and takes the snapshot under load.
func BenchmarkSnapshot(b *testing.B) {
	needFio(b)
	c := harness.Up(b, devcluster.Options{Servers: 3})
	l := load{"4k random write, 32 at a time", "randwrite", "4k", 32}
	var before, after []result
	for i := range *snapshotRounds {
		name := fmt.Sprintf("bench-%d", i)
		t := aVolume(b, c, name)
		t.fill(b)
		before = append(before, fio(b, l, t, *snapshotTime))
		taken := make(chan error, 1)
		go func() {
			time.Sleep(time.Second)
			_, err := c.S(1).Exec(b.Context(), "snapshot", "create", name, "s")
			taken <- err
		}()
		after = append(after, fio(b, l, t, *snapshotTime))
		must(b, <-taken)
		b.Logf("round %d: %.0f IOPS, then %.0f", i+1, before[i].iops, after[i].iops)
		t.end()
		c.Eventually("the volume is let go", func() bool {
			v, err := c.Volume(c.S(1), name)
			return err == nil && v.GetVolume().GetAttachment() == nil
		})
		c.Argon(c.S(1), "snapshot", "rm", name, "s")
		c.Argon(c.S(1), "volume", "rm", name)
	}
	x, y := median(before), median(after)
	b.Logf("| %s | before | %.0f | %.0f µs | %.0f µs | %.1f ms | %.2f s |", l.name, x.iops, x.p50, x.p99, x.longest/1000, x.cpu)
	b.Logf("| with a snapshot taken after 1 s | after | %.0f (%+.0f %%) | %.0f µs | %.0f µs | %.1f ms | %.2f s |",
		y.iops, 100*(y.iops/x.iops-1), y.p50, y.p99, y.longest/1000, y.cpu)
	b.ReportMetric(0, "ns/op")
}
