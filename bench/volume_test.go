package bench_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var (
	volumeMiB = flag.Int("volume-mib", 1024, "size of the volume that is measured")
	fioTime   = flag.Duration("fio-time", 5*time.Second, "how long each measurement takes")
	fioRounds = flag.Int("fio-rounds", 5, "how often each is repeated; the median counts")
)

// load is one way to use a disk.
type load struct {
	name  string
	rw    string
	block string
	depth int
}

var loads = []load{
	{"4k random write, 1 at a time", "randwrite", "4k", 1},
	{"4k random write, 32 at a time", "randwrite", "4k", 32},
	{"4k random read, 32 at a time", "randread", "4k", 32},
	{"1 MiB write, 8 at a time", "write", "1m", 8},
	{"1 MiB read, 8 at a time", "read", "1m", 8},
}

// BenchmarkVolume compares a volume with two replicas, used on its holder, with
// a file on the same disk that is written past the page cache. Both were filled
// before, and each round measures one after the other.
func BenchmarkVolume(b *testing.B) {
	if _, err := exec.LookPath("fio"); err != nil {
		b.Skip("needs fio")
	}
	c := harness.Up(b, devcluster.Options{Servers: 3})
	s := c.S(1)
	c.Argon(s, "volume", "create", "bench", "--size", fmt.Sprintf("%dMiB", *volumeMiB))
	c.Healthy(s, "bench")
	v, err := c.Volume(s, "bench")
	must(b, err)
	holder := c.ByID(s, v.GetVolume().GetReplicas()[0].GetServerId())
	uri, _, err := c.Connect(holder, "bench")
	must(b, err)
	volume := []string{"--ioengine=nbd", "--uri=" + uri}
	raw := []string{"--ioengine=libaio", "--direct=1", "--filename=" + filepath.Join(holder.Dir, "raw")}
	for _, target := range [][]string{volume, raw} {
		fill := append([]string{"--name=fill", "--rw=write", "--bs=1m", "--iodepth=8", fmt.Sprintf("--size=%dm", *volumeMiB)}, target...)
		_, err := exec.Command("fio", fill...).Output()
		must(b, err)
	}
	for _, l := range loads {
		var ours, theirs []result
		for range *fioRounds {
			ours = append(ours, fio(b, l, volume))
			theirs = append(theirs, fio(b, l, raw))
		}
		o, r := median(ours), median(theirs)
		b.Logf("| %s | %.0f IOPS, p50 %.0f µs, p99 %.0f µs | %.0f IOPS, p50 %.0f µs, p99 %.0f µs | %.2fx |",
			l.name, o.iops, o.p50, o.p99, r.iops, r.p50, r.p99, o.iops/r.iops)
	}
	b.ReportMetric(0, "ns/op")
}

// result is what one run of fio found; latencies in microseconds.
type result struct{ iops, p50, p99 float64 }

// median is the run with the median of operations per second.
func median(all []result) result {
	slices.SortFunc(all, func(a, b result) int { return int(a.iops - b.iops) })
	return all[len(all)/2]
}

func fio(b *testing.B, l load, target []string) result {
	b.Helper()
	args := append([]string{
		"--name=x", "--rw=" + l.rw, "--bs=" + l.block, fmt.Sprintf("--iodepth=%d", l.depth),
		fmt.Sprintf("--size=%dm", *volumeMiB), "--time_based", "--runtime=" + fioTime.String(),
		"--randrepeat=0", "--output-format=json",
	}, target...)
	out, err := exec.Command("fio", args...).Output()
	must(b, err)
	type side struct {
		IOPS float64 `json:"iops"`
		Lat  struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	must(b, json.Unmarshal(out[bytes.IndexByte(out, '{'):], &report))
	s := report.Jobs[0].Read
	if strings.Contains(l.rw, "write") {
		s = report.Jobs[0].Write
	}
	return result{s.IOPS, s.Lat.Percentile["50.000000"] / 1000, s.Lat.Percentile["99.000000"] / 1000}
}
