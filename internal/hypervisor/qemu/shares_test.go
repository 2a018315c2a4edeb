package qemu

import (
	"testing"

	"github.com/argon-cluster/argon/internal/cgroup"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// What a running guest may have is what QEMU and the launcher say it may, from
// its start on and after each change; and its disk works all the while.
func TestShares(t *testing.T) {
	w := newWorld(t)
	w.spec.Shares = hypervisor.Shares{CPUPercent: 50, CPUWeight: 10, DiskIOPS: 500, DiskBytesPerSecond: 1 << 20}
	g := w.start().(*guest)
	if want := (cgroup.Limits{CPUPercent: 50, CPUWeight: 10, MemoryBytes: uint64(w.spec.MemoryBytes + hypervisor.Overhead(1, w.spec.MemoryBytes, hypervisor.TCG))}); w.launcher.limits != want {
		t.Errorf("started with %+v, want %+v", w.launcher.limits, want)
	}
	disks := func() (iops, bps uint64) {
		t.Helper()
		var l struct {
			IOPS uint64 `json:"iops-total"`
			BPS  uint64 `json:"bps-total"`
		}
		if err := g.executeWith(t.Context(), "qom-get", map[string]string{"path": "/objects/" + throttleID, "property": "limits"}, &l); err != nil {
			t.Fatal(err)
		}
		return l.IOPS, l.BPS
	}
	if iops, bps := disks(); iops != 500 || bps != 1<<20 {
		t.Errorf("disks begin with %d operations, %d bytes", iops, bps)
	}
	c := listen(t, g)
	c.hear("booted")
	for _, s := range []hypervisor.Shares{{CPUPercent: 150, DiskIOPS: 10}, {CPUWeight: 200, DiskBytesPerSecond: 5 << 20}, {}} {
		if err := g.SetShares(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if iops, bps := disks(); iops != s.DiskIOPS || bps != s.DiskBytesPerSecond {
			t.Errorf("disks have %d operations, %d bytes, want %+v", iops, bps, s)
		}
		if want := (cgroup.Limits{CPUPercent: s.CPUPercent, CPUWeight: s.CPUWeight}); w.launcher.limits != want {
			t.Errorf("processors have %+v, want %+v", w.launcher.limits, want)
		}
		c.say("w")
		c.hear("W")
	}
}
