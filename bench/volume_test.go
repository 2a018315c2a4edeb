package bench_test

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
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

// target is something that fio can measure.
type target struct {
	name string
	args []string
	// pids are the processes that serve it.
	pids func() []int
}

// BenchmarkVolume compares a volume with two replicas, used on its holder, with
// a file on the same disk that is written past the page cache, and, where Ceph
// is installed, with an RBD image of two replicas. All were filled before, and
// each round measures one after the other.
func BenchmarkVolume(b *testing.B) {
	if _, err := exec.LookPath("fio"); err != nil {
		b.Skip("needs fio")
	}
	c := harness.Up(b, devcluster.Options{Servers: 3})
	targets := []target{aVolume(b, c), aFile(b)}
	if _, err := exec.LookPath("ceph-osd"); err == nil {
		targets = append(targets, cephImage(b))
	}
	for _, t := range targets {
		args := append([]string{"--name=fill", "--rw=write", "--bs=1m", "--iodepth=8", fmt.Sprintf("--size=%dm", *volumeMiB)}, t.args...)
		out, err := exec.Command("fio", args...).CombinedOutput()
		if err != nil {
			b.Fatalf("filling the %s: %v\n%s", t.name, err, out)
		}
	}
	for _, l := range loads {
		results := make([][]result, len(targets))
		for range *fioRounds {
			for i, t := range targets {
				results[i] = append(results[i], fio(b, l, t))
			}
		}
		ours := median(results[0])
		row := "| " + l.name
		for i, t := range targets {
			r := median(results[i])
			row += fmt.Sprintf(" | %s: %.0f IOPS, p50 %.0f µs, p99 %.0f µs, CPU %.2f s, %.2fx", t.name, r.iops, r.p50, r.p99, r.cpu, ours.iops/r.iops)
		}
		b.Log(row)
	}
	b.ReportMetric(0, "ns/op")
}

func aVolume(b *testing.B, c *harness.Cluster) target {
	s := c.S(1)
	c.Argon(s, "volume", "create", "bench", "--size", fmt.Sprintf("%dMiB", *volumeMiB))
	c.Healthy(s, "bench")
	v, err := c.Volume(s, "bench")
	must(b, err)
	holder := c.ByID(s, v.GetVolume().GetReplicas()[0].GetServerId())
	uri, _, err := c.Connect(holder, "bench")
	must(b, err)
	return target{name: "volume", args: []string{"--ioengine=nbd", "--uri=" + uri}, pids: func() []int {
		var all []int
		for _, s := range c.Servers() {
			pids, err := s.PIDs(devcluster.Daemon)
			must(b, err)
			all = append(all, pids...)
		}
		return all
	}}
}

func aFile(b *testing.B) target {
	file := filepath.Join(b.TempDir(), "raw")
	return target{name: "file", args: []string{"--ioengine=libaio", "--direct=1", "--filename=" + file}, pids: func() []int { return nil }}
}

// cephImage starts a Ceph of its own. See ceph/up.sh.
func cephImage(b *testing.B) target {
	dir := b.TempDir()
	up := exec.Command("ceph/up.sh", dir, strconv.Itoa(*volumeMiB))
	up.Stderr = os.Stderr
	in, err := up.StdinPipe()
	must(b, err)
	out, err := up.StdoutPipe()
	must(b, err)
	must(b, up.Start())
	b.Cleanup(func() {
		_ = in.Close()
		_ = up.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		b.Fatalf("Ceph does not start: %q, %v", line, err)
	}
	b.Setenv("CEPH_CONF", filepath.Join(dir, "ceph.conf"))
	return target{name: "ceph", args: []string{"--ioengine=rbd", "--clientname=admin", "--pool=rbd", "--rbdname=bench"}, pids: func() []int {
		files, err := filepath.Glob(filepath.Join(dir, "*.pid"))
		must(b, err)
		var all []int
		for _, f := range files {
			text, err := os.ReadFile(f)
			must(b, err)
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			must(b, err)
			all = append(all, pid)
		}
		return all
	}}
}

// result is what one run of fio found; latencies in microseconds. cpu is the
// processor time that those who serve the target, and fio, used for 10,000
// operations, in seconds.
type result struct{ iops, p50, p99, cpu float64 }

// median is the run with the median of operations per second.
func median(all []result) result {
	slices.SortFunc(all, func(a, b result) int { return cmp.Compare(a.iops, b.iops) })
	return all[len(all)/2]
}

func fio(b *testing.B, l load, t target) result {
	b.Helper()
	args := append([]string{
		"--name=x", "--rw=" + l.rw, "--bs=" + l.block, fmt.Sprintf("--iodepth=%d", l.depth),
		fmt.Sprintf("--size=%dm", *volumeMiB), "--time_based", "--runtime=" + fioTime.String(),
		"--randrepeat=0", "--output-format=json",
	}, t.args...)
	before := cpuOf(b, t)
	cmd := exec.Command("fio", args...)
	out, err := cmd.Output()
	must(b, err)
	used := cpuOf(b, t) - before + cmd.ProcessState.SystemTime() + cmd.ProcessState.UserTime()
	type side struct {
		IOPS float64 `json:"iops"`
		Ops  float64 `json:"total_ios"`
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
	return result{s.IOPS, s.Lat.Percentile["50.000000"] / 1000, s.Lat.Percentile["99.000000"] / 1000, used.Seconds() * 10000 / s.Ops}
}

func cpuOf(b *testing.B, t target) time.Duration {
	b.Helper()
	var sum time.Duration
	for _, pid := range t.pids() {
		sum += cpuTime(b, pid)
	}
	return sum
}
