package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) machineMigrateCommand() *cobra.Command {
	req := &argonv1.MigrateMachineRequest{}
	var timeout time.Duration
	var cancel, noWait bool
	cmd := &cobra.Command{
		Use:   "migrate NAME",
		Short: "Move a machine to another server while it runs",
		Long: `Copies the machine's memory to another server while it runs, lets it stand still
for a moment, and goes on there; its disks, its published ports and its console
follow. If anything goes wrong before that, it stays where it is.`,
		Example: `  argon machine migrate web              # the cluster chooses
  argon machine migrate web --to beta --timeout 2m
  argon machine migrate web --cancel`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	flags := cmd.Flags()
	flags.StringVar(&req.ToServer, "to", "", "the `SERVER` to go to (default: the cluster chooses)")
	flags.DurationVar(&timeout, "timeout", 10*time.Minute, "give it up if it is not done by then")
	flags.BoolVar(&cancel, "cancel", false, "give up the migration that is under way")
	flags.BoolVar(&noWait, "no-wait", false, "return at once")
	a.completeFlag(cmd, "to", serverNames)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) (err error) {
		if req.TimeoutSeconds, err = wholeSeconds(timeout); err != nil || req.GetTimeoutSeconds() == 0 {
			return usage(cmd, "--timeout %v: at least a second, in whole seconds", timeout)
		}
		return exclusive(cmd, "cancel", "to")
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		v, err := orderMigration(ctx, c, req, args[0], cancel)
		if err != nil {
			return err
		}
		if !noWait {
			p := a.startProgress("machine " + args[0])
			v, err = awaitMigration(ctx, c, v, cancel, p.Set)
			p.Stop()
			if err != nil {
				return err
			}
			if !cancel {
				fmt.Fprintf(a.err, "machine %s: %s\n", args[0], lastMigration(v.GetMachine()))
			}
		}
		return a.printMachine(*f, v)
	})
	return cmd
}

// orderMigration asks for a migration, or for the end of the one under way.
func orderMigration(ctx context.Context, c *client.Client, req *argonv1.MigrateMachineRequest, name string, cancel bool) (*argonv1.MachineView, error) {
	if cancel {
		res, err := client.Call(ctx, c.Machines.CancelMigration, &argonv1.CancelMigrationRequest{Name: name})
		return res.GetMachine(), err
	}
	req.Name = name
	res, err := client.Call(ctx, c.Machines.MigrateMachine, req)
	return res.GetMachine(), err
}

// awaitMigration looks until the migration is over, and says how it ended.
func awaitMigration(ctx context.Context, c *client.Client, v *argonv1.MachineView, cancel bool, say func(string)) (*argonv1.MachineView, error) {
	name, id := v.GetMachine().GetMeta().GetName(), v.GetMachine().GetMigration().GetId()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if id == "" {
			id = v.GetMachine().GetLastMigration().GetId() // it was over at once
		}
		if mig := v.GetMachine().GetMigration(); mig.GetId() == id {
			say(fmt.Sprintf("machine %s: %s", name, migrationState(mig)))
		} else if last := v.GetMachine().GetLastMigration(); last.GetId() == id {
			switch moved := last.GetFailure() == ""; {
			case moved && cancel:
				return nil, fmt.Errorf("machine %s: it was too late: it runs on %s", name, v.GetServerName())
			case !moved && !cancel:
				return nil, fmt.Errorf("machine %s stays on %s: %s", name, v.GetServerName(), last.GetFailure())
			case !moved || settled(v.GetMachine()):
				return v, nil
			}
		} else {
			return v, nil // there was another one since
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
		res, err := client.Call(ctx, c.Machines.GetMachine, &argonv1.GetMachineRequest{Name: name})
		if err != nil {
			return nil, err
		}
		v = res.GetMachine()
	}
}

// settled tells whether a machine that has moved goes on, or will not: it was
// stopped, or lost with its new server.
func settled(m *argonv1.Machine) bool {
	running := m.GetStatus().GetState() == argonv1.MachineState_MACHINE_STATE_RUNNING
	return m.GetLastMigration().GetResumed() != nil || m.GetWanted() != argonv1.Wanted_WANTED_RUNNING ||
		!running || m.GetPlacement() != m.GetStatus().GetPlacement()
}

// migrationState says how far a migration is.
func migrationState(m *argonv1.Migration) string {
	p := m.GetProgress()
	if m.GetPhase() == argonv1.MigrationPhase_MIGRATION_PHASE_PREPARING || p == nil {
		return "the other server is being made ready"
	}
	s := fmt.Sprintf("%s copied, %s to go, would stand still for %d ms",
		formatBytes(p.GetTransferredBytes()), formatBytes(p.GetRemainingBytes()), p.GetExpectedDowntimeMs())
	if p.GetThrottlePercent() > 0 {
		s += fmt.Sprintf(", slowed down by %d %%", p.GetThrottlePercent())
	}
	return s
}

// lastMigration says in a line how the last migration ended.
func lastMigration(m *argonv1.Machine) string {
	switch r := m.GetLastMigration(); {
	case m.GetMigration() != nil:
		return migrationState(m.GetMigration())
	case r == nil:
		return ""
	case r.GetFailure() != "":
		return "failed: " + r.GetFailure()
	case r.GetResumed() != nil:
		return fmt.Sprintf("stood still for %d ms", r.GetResumed().AsTime().Sub(r.GetPaused().AsTime()).Milliseconds())
	default:
		return "moved"
	}
}
