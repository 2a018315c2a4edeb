package bench_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// load is one way to use a disk.
type load struct {
	name  string
	rw    string
	block string
	depth int
}

// target is something that fio can measure.
type target struct {
	name string
	args []string
	// pids are the processes that serve it.
	pids func() []int
	end  func()
}

// result is what one run of fio found; latencies in microseconds. cpu is the
// processor time that those who serve the target, and fio, used for 10,000
// operations, in seconds.
type result struct{ iops, p50, p99, longest, cpu float64 }

// median is the run with the median of operations per second.
func median(all []result) result {
	sorted := slices.SortedFunc(slices.Values(all), func(a, b result) int { return cmp.Compare(a.iops, b.iops) })
	return sorted[len(sorted)/2]
}

func needFio(b *testing.B) {
	b.Helper()
	if missing := lacking("fio"); len(missing) > 0 {
		b.Skip("needs fio")
	}
}

// fill writes all of a target.
func (t target) fill(b *testing.B) {
	b.Helper()
	args := append([]string{"--name=fill", "--rw=write", "--bs=1m", "--iodepth=8", fmt.Sprintf("--size=%dm", *volumeMiB)}, t.args...)
	if out, err := exec.Command("fio", args...).CombinedOutput(); err != nil {
		b.Fatalf("filling the %s: %v\n%s", t.name, err, out)
	}
}

func fio(b *testing.B, l load, t target, long time.Duration) result {
	b.Helper()
	args := append([]string{
		"--name=x", "--rw=" + l.rw, "--bs=" + l.block, fmt.Sprintf("--iodepth=%d", l.depth),
		fmt.Sprintf("--size=%dm", *volumeMiB), "--time_based", fmt.Sprintf("--runtime=%dms", long.Milliseconds()),
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
			Max        float64            `json:"max"`
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
	if s.Ops == 0 {
		b.Fatalf("fio did nothing:\n%s", out)
	}
	return result{
		iops: s.IOPS, p50: s.Lat.Percentile["50.000000"] / 1000, p99: s.Lat.Percentile["99.000000"] / 1000,
		longest: s.Lat.Max / 1000, cpu: used.Seconds() * 10000 / s.Ops,
	}
}

func cpuOf(b *testing.B, t target) time.Duration {
	b.Helper()
	var sum time.Duration
	for _, pid := range t.pids() {
		sum += cpuTime(b, pid)
	}
	return sum
}
