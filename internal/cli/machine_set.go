package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// shareFlags are what a machine may have of its server.
type shareFlags struct {
	cap                   cpuCap
	weight                uint32
	iops                  uint64
	diskRate, networkRate byteSize
}

func (s *shareFlags) add(flags *pflag.FlagSet) {
	flags.Var(&s.cap, "cpu-cap", "at most so much of the processors, such as 50% of one or 150%; 0: no limit")
	flags.Uint32Var(&s.weight, "cpu-weight", 0, "against other machines when processors are short, 1 to 10000; usual is 100")
	flags.Uint64Var(&s.iops, "disk-iops", 0, "at most so many operations per second, of all its disks together; 0: no limit")
	flags.Var(&s.diskRate, "disk-rate", "at most so many bytes per second, of all its disks together, such as 50MiB; 0: no limit")
	flags.Var(&s.networkRate, "network-rate", "at most so many bytes per second each way, of its published ports together; 0: no limit")
}

// shares are those that were given; nil if none.
func (s *shareFlags) shares() *argonv1.Shares {
	if *s == (shareFlags{}) {
		return nil
	}
	return &argonv1.Shares{
		CpuPercent: uint32(s.cap), CpuWeight: s.weight, DiskIops: s.iops,
		DiskBytesPerSecond: uint64(s.diskRate), NetworkBytesPerSecond: uint64(s.networkRate),
	}
}

// cpuCap is a flag's value: hundredths of a processor, written as 50%.
type cpuCap uint32

func (c *cpuCap) Type() string { return "PERCENT" }

func (c *cpuCap) String() string {
	if *c == 0 {
		return ""
	}
	return fmt.Sprintf("%d%%", uint32(*c))
}

func (c *cpuCap) Set(text string) error {
	n, err := strconv.ParseUint(strings.TrimSuffix(text, "%"), 10, 31)
	if err != nil {
		return fmt.Errorf("%q: write it like 50%%", text)
	}
	*c = cpuCap(n)
	return nil
}

func (a *app) machineSetCommand() *cobra.Command {
	var shares shareFlags
	var cpus uint32
	memory := memorySize(0)
	var stopTimeout time.Duration
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Change what a machine has: memory, ports, disks, shares",
		Long: `Changes what a machine has. Limits, published ports, labels and the name change
while it runs. Another number of processors or other memory waits for its next
start, and the command says so. A guest that runs is given disks and network
cards, and asked to let go of others: until it has, they stay, and 'argon
machine show' says so. What it boots from and its firmware can be changed while
it is stopped. What no server could give is refused.`,
		Example: `  argon machine set web --cpu-cap 50% --cpu-weight 50
  argon machine set db --disk-iops 2000 --disk-rate 100MiB
  argon machine set db --memory 8GiB --cpus 4     # from its next start on
  argon machine set web --cpu-cap 0               # no limit any more
  argon machine set web --publish 8443:443 --unpublish 8080
  argon machine set db --attach db-data --detach old
  argon machine set db --boot root                # stopped
  argon machine set web --label env=test --label owner=`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	flags := cmd.Flags()
	shares.add(flags)
	flags.Uint32Var(&cpus, "cpus", 0, "virtual processors")
	flags.Var(&memory, "memory", "such as 1GiB; a number alone is MiB")
	flags.DurationVar(&stopTimeout, "stop-timeout", 0, "how long a stop may take before it is forced")
	var keep keeping
	keep.add(cmd, keeping{})
	req := &argonv1.SetMachineRequest{}
	var parts partFlags
	parts.add(a, cmd, req)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		any := false
		given := func(name string) bool {
			any = any || flags.Changed(name)
			return flags.Changed(name)
		}
		give(given("cpus"), &req.Cpus, cpus)
		give(given("memory"), &req.MemoryBytes, memory.bytes)
		give(given("cpu-cap"), &req.CpuPercent, uint32(shares.cap))
		give(given("cpu-weight"), &req.CpuWeight, shares.weight)
		give(given("disk-iops"), &req.DiskIops, shares.iops)
		give(given("disk-rate"), &req.DiskBytesPerSecond, uint64(shares.diskRate))
		give(given("network-rate"), &req.NetworkBytesPerSecond, uint64(shares.networkRate))
		if given("stop-timeout") {
			seconds, err := wholeSeconds(stopTimeout)
			if err != nil {
				return usage(cmd, "--stop-timeout %v: %v", stopTimeout, err)
			}
			req.StopTimeoutSeconds = &seconds
		}
		for _, name := range partFlagNames {
			given(name)
		}
		if err := parts.read(cmd, req); err != nil {
			return err
		}
		policy, every, err := keep.read(cmd)
		if err != nil {
			return err
		}
		give(given("on-loss"), &req.OnLoss, policy)
		give(given("checkpoint-every"), &req.CheckpointEverySeconds, every)
		give(given("keep"), &req.CheckpointsKept, keep.kept)
		if !any {
			return usage(cmd, "nothing to change: give at least one flag")
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		res, err := client.Call(ctx, c.Machines.SetMachine, req)
		if err != nil {
			return err
		}
		for _, what := range res.GetNextStart() {
			fmt.Fprintf(a.err, "machine %s: %s from its next start on\n", req.GetName(), what)
		}
		for _, what := range res.GetMachine().GetChanging() {
			fmt.Fprintf(a.err, "machine %s: %s\n", req.GetName(), what)
		}
		return a.printMachine(*f, res.GetMachine())
	})
	return cmd
}

func give[T any](given bool, field **T, value T) {
	if given {
		*field = &value
	}
}

// formatShares says in words what limits a machine has.
func formatShares(s *argonv1.Shares) string {
	var words []string
	for _, w := range []struct {
		has  bool
		text string
	}{
		{s.GetCpuPercent() > 0, fmt.Sprintf("processors at most %d%%", s.GetCpuPercent())},
		{s.GetCpuWeight() > 0, fmt.Sprintf("weight %d", s.GetCpuWeight())},
		{s.GetDiskIops() > 0, fmt.Sprintf("disks at most %d operations/s", s.GetDiskIops())},
		{s.GetDiskBytesPerSecond() > 0, fmt.Sprintf("disks at most %s/s", formatBytes(s.GetDiskBytesPerSecond()))},
		{s.GetNetworkBytesPerSecond() > 0, fmt.Sprintf("published ports at most %s/s each way", formatBytes(s.GetNetworkBytesPerSecond()))},
	} {
		if w.has {
			words = append(words, w.text)
		}
	}
	return strings.Join(words, ", ")
}
