package rpc

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

// The limits of shares.
const (
	maxWeight = 10000
	// minIOPS and minRate are what a guest still gets somewhere with.
	minIOPS = 10
	minRate = 64 << 10
)

// checkShares refuses limits that make no sense for a machine of so many CPUs.
func checkShares(name string, cpus uint32, s *argonv1.Shares) error {
	switch percent := s.GetCpuPercent(); {
	case percent > cpus*100:
		return invalid("machine %s: a limit of %d %% of a CPU is more than its %s can use: give at most %d, or 0 for no limit", name, percent, plural(uint64(cpus), "CPU"), cpus*100)
	case s.GetCpuWeight() > maxWeight:
		return invalid("machine %s: a CPU weight of %d: give 1 to %d; usual is 100", name, s.GetCpuWeight(), maxWeight)
	case s.GetDiskIops() != 0 && s.GetDiskIops() < minIOPS:
		return invalid("machine %s: a limit of %d disk operations per second: give at least %d, or 0 for no limit", name, s.GetDiskIops(), minIOPS)
	}
	for _, r := range []struct {
		what string
		rate uint64
	}{{"disk", s.GetDiskBytesPerSecond()}, {"network", s.GetNetworkBytesPerSecond()}} {
		if r.rate != 0 && r.rate < minRate {
			return invalid("machine %s: a %s rate of %s per second: give at least %s, or 0 for no limit", name, r.what, humanize.IBytes(r.rate), humanize.IBytes(minRate))
		}
	}
	return nil
}

// setMachine makes the changes that are asked for.
func setMachine(m *argonv1.Machine, req *argonv1.SetMachineRequest) {
	if m.Shares == nil {
		m.Shares = &argonv1.Shares{}
	}
	set(&m.Cpus, req.Cpus)
	set(&m.MemoryBytes, req.MemoryBytes)
	set(&m.StopTimeoutSeconds, req.StopTimeoutSeconds)
	set(&m.OnLoss, req.OnLoss)
	set(&m.CheckpointEverySeconds, req.CheckpointEverySeconds)
	set(&m.CheckpointsKept, req.CheckpointsKept)
	set(&m.Shares.CpuPercent, req.CpuPercent)
	set(&m.Shares.CpuWeight, req.CpuWeight)
	set(&m.Shares.DiskIops, req.DiskIops)
	set(&m.Shares.DiskBytesPerSecond, req.DiskBytesPerSecond)
	set(&m.Shares.NetworkBytesPerSecond, req.NetworkBytesPerSecond)
	if proto.Equal(m.Shares, &argonv1.Shares{}) {
		m.Shares = nil
	}
}

func set[T any](field, value *T) {
	if value != nil {
		*field = *value
	}
}

// nextStart says what of a change a machine that runs gets only when it starts
// next.
func nextStart(old, now *argonv1.Machine) []string {
	if old.GetServerId() == "" {
		return nil
	}
	old = placement.AsStarted(old)
	var later []string
	if old.GetCpus() != now.GetCpus() {
		later = append(later, fmt.Sprintf("%s instead of %d", plural(uint64(now.GetCpus()), "CPU"), old.GetCpus()))
	}
	if old.GetMemoryBytes() != now.GetMemoryBytes() {
		later = append(later, fmt.Sprintf("%s of memory instead of %s", humanize.IBytes(now.GetMemoryBytes()), humanize.IBytes(old.GetMemoryBytes())))
	}
	switch had, has := old.GetFirstBoot() != nil, now.GetFirstBoot() != nil; {
	case had && !has:
		later = append(later, "nothing for cloud-init")
	case has && !had:
		later = append(later, "something for cloud-init")
	}
	return later
}
