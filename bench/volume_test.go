package bench_test

import (
	"bufio"
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
	volumeMiB = flag.Int("volume-mib", 2048, "size of the volume that is measured")
	fioTime   = flag.Duration("fio-time", 5*time.Second, "how long each measurement takes")
	fioRounds = flag.Int("fio-rounds", 5, "how often each is repeated; the median counts")
)

var loads = []load{
	{"4k random write, 1 at a time", "randwrite", "4k", 1},
	{"4k random write, 32 at a time", "randwrite", "4k", 32},
	{"4k random read, 32 at a time", "randread", "4k", 32},
	{"1 MiB write, 8 at a time", "write", "1m", 8},
	{"1 MiB read, 8 at a time", "read", "1m", 8},
}

// BenchmarkVolume compares a volume with two replicas, used on its holder, with
// a file on the same disk that is written past the page cache, and, where Ceph
// is installed, with an RBD image of two replicas. All were filled before, and
// each round measures one after the other.
func BenchmarkVolume(b *testing.B) {
	needFio(b)
	c := harness.Up(b, devcluster.Options{Servers: 3})
	targets := []target{aVolume(b, c, "bench"), aFile(b)}
	if missing := lacking("ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd"); len(missing) == 0 {
		targets = append(targets, cephImage(b))
	} else {
		b.Logf("Ceph is left out: there is no %s here; make needs-ceph installs it", strings.Join(missing, ", "))
	}
	for _, t := range targets {
		t.fill(b)
	}
	b.Log("| load | | IOPS | p50 | p99 | p99 : p50 | CPU | volume : this |")
	for _, l := range loads {
		results := make([][]result, len(targets))
		for range *fioRounds {
			for i, t := range targets {
				results[i] = append(results[i], fio(b, l, t, *fioTime))
			}
		}
		ours := median(results[0])
		for i, t := range targets {
			r := median(results[i])
			b.Logf("| %s | %s | %.0f | %.0f µs | %.0f µs | %.1f | %.2f s | %.2f |",
				l.name, t.name, r.iops, r.p50, r.p99, r.p99/r.p50, r.cpu, ours.iops/r.iops)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// lacking is which of some programs are not installed.
func lacking(programs ...string) []string {
	return slices.DeleteFunc(programs, func(p string) bool {
		_, err := exec.LookPath(p)
		return err == nil
	})
}

// aVolume is a new volume, used on its holder until end.
func aVolume(b *testing.B, c *harness.Cluster, name string) target {
	s := c.S(1)
	c.Argon(s, "volume", "create", name, "--size", fmt.Sprintf("%dMiB", *volumeMiB))
	c.Healthy(s, name)
	v, err := c.Volume(s, name)
	must(b, err)
	holder := c.ByID(s, v.GetVolume().GetReplicas()[0].GetServerId())
	uri, end, err := c.Connect(holder, name)
	must(b, err)
	return target{name: "volume", args: []string{"--ioengine=nbd", "--uri=" + uri}, end: end, pids: func() []int {
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
