package bench_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// BenchmarkStart measures from nothing to three joined servers that all vote.
func BenchmarkStart(b *testing.B) {
	binary := harness.Binary(b)
	var took []time.Duration
	for range 5 {
		dir, err := os.MkdirTemp("", "argon-bench-")
		must(b, err)
		began := time.Now()
		c, err := devcluster.Up(b.Context(), devcluster.Options{Servers: 3, Dir: dir, Binary: binary})
		must(b, err)
		took = append(took, time.Since(began))
		must(b, c.Down(b.Context(), devcluster.KeepNothing))
		must(b, os.RemoveAll(dir))
	}
	report(b, "from nothing to three servers that are joined and vote", took)
}

// idleTime is how long an idle cluster is watched.
const idleTime = time.Minute

// BenchmarkIdle measures what three servers cost that have nothing to do:
// resident memory, and processor time over a minute.
func BenchmarkIdle(b *testing.B) {
	c := harness.Up(b, devcluster.Options{Servers: 3})
	time.Sleep(idleTime / 2) // what starting needed is given back meanwhile
	before := make(map[string]time.Duration)
	for _, s := range c.Servers() {
		before[s.Name], _ = cost(b, s)
	}
	time.Sleep(idleTime)
	for _, s := range c.Servers() {
		cpu, memory := cost(b, s)
		share := float64(cpu-before[s.Name]) / float64(idleTime)
		b.Logf("| %s idle | %.0f MB | %.2f %% of a core |", s.Name, float64(memory)/1e6, 100*share)
		b.ReportMetric(float64(memory)/1e6, "MB/"+s.Name)
		b.ReportMetric(100*share, "%CPU/"+s.Name)
	}
	b.ReportMetric(0, "ns/op")
}

// clockTick is the kernel's unit in /proc/PID/stat, on every Linux.
const clockTick = 10 * time.Millisecond

// cost is what a server's guard and daemon have used of processors, and what
// they have in memory: resident, what both share counted twice.
func cost(b *testing.B, s *devcluster.Server) (cpu time.Duration, memory int64) {
	b.Helper()
	for _, part := range []devcluster.Part{devcluster.Guard, devcluster.Daemon} {
		pids, err := s.PIDs(part)
		must(b, err)
		for _, pid := range pids {
			cpu += cpuTime(b, pid)
			rollup, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup"))
			must(b, err)
			memory += kilobytes(b, rollup, "Rss:") * 1024
		}
	}
	return cpu, memory
}

// cpuTime is what a process has used of processors.
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	must(b, err)
	// proc(5): utime and stime are fields 14 and 15.
	var cpu time.Duration
	for _, f := range bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+2:])[11:13] {
		n, err := strconv.ParseInt(string(f), 10, 64)
		must(b, err)
		cpu += time.Duration(n) * clockTick
	}
	return cpu
}

func kilobytes(b *testing.B, rollup []byte, name string) int64 {
	b.Helper()
	for line := range bytes.Lines(rollup) {
		if f := bytes.Fields(line); len(f) == 3 && string(f[0]) == name {
			n, err := strconv.ParseInt(string(f[1]), 10, 64)
			must(b, err)
			return n
		}
	}
	b.Fatalf("no %s in %q", name, rollup)
	return 0
}
