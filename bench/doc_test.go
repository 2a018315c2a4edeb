// Package bench_test measures what operators judge by: how soon a machine is
// back, what a server costs when idle, how long a cluster takes to form, and
// how fast a volume is.
//
// What lives here: measurements, printed as tables for docs/performance.md.
// What must not: assertions about time; a slow machine is no defect.
package bench_test

import (
	"math"
	"slices"
	"testing"
	"time"
)

// quantile is the nearest-rank quantile of what was measured.
func quantile(all []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[int(math.Ceil(q*float64(len(sorted))))-1]
}

// report prints a row and keeps the benchmark's own figure out of the way.
func report(b *testing.B, what string, all []time.Duration) {
	b.Helper()
	p50, p99 := quantile(all, 0.5), quantile(all, 0.99)
	b.ReportMetric(p50.Seconds(), "s/p50")
	b.ReportMetric(p99.Seconds(), "s/p99")
	b.ReportMetric(0, "ns/op")
	b.Logf("| %s | %d | %.2f s | %.2f s | %.2f s | %.2f s |", what, len(all),
		slices.Min(all).Seconds(), p50.Seconds(), p99.Seconds(), slices.Max(all).Seconds())
}

func must(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}
