package qemu

import (
	"context"
	"errors"
	"fmt"

	"github.com/argon-cluster/argon/internal/cgroup"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
)

// throttleID names what all disks of a guest go through, so that their limits can
// be changed while it runs.
const throttleID = "disks"

// throttleLimits is QEMU's ThrottleLimits (qapi/block-core.json). 0 is none.
func throttleLimits(s hypervisor.Shares) map[string]uint64 {
	return map[string]uint64{"iops-total": s.DiskIOPS, "bps-total": s.DiskBytesPerSecond}
}

// limits are what the process may have: the guest's memory, and what running it
// takes.
func limits(s hypervisor.Spec) cgroup.Limits {
	return cgroup.Limits{
		CPUPercent: s.Shares.CPUPercent, CPUWeight: s.Shares.CPUWeight,
		MemoryBytes: uint64(s.MemoryBytes + hypervisor.Overhead(s.CPUs, s.MemoryBytes, s.Acceleration)),
	}
}

// SetShares implements hypervisor.Guest.
func (g *guest) SetShares(ctx context.Context, s hypervisor.Shares) error {
	err := g.launcher.Limit(ctx, g.id, cgroup.Limits{CPUPercent: s.CPUPercent, CPUWeight: s.CPUWeight})
	if err != nil {
		err = fmt.Errorf("guest %s: its processors: %w", g.id, err)
	}
	derr := g.executeWith(ctx, "qom-set", map[string]any{
		"path": "/objects/" + throttleID, "property": "limits", "value": throttleLimits(s),
	}, nil)
	if refused := (*qmp.Error)(nil); errors.As(derr, &refused) {
		derr = fmt.Errorf("guest %s: its disks: %w", g.id, hypervisor.ErrOldGuest)
	}
	return errors.Join(err, derr)
}
