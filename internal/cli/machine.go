package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) machineCommand() *cobra.Command {
	return group("machine", "Virtual machines",
		`  argon machine create web --image debian --disk 10GiB --memory 1GiB --publish 8080:80
  argon machine ls
  argon machine console web`,
		a.machineCreateCommand(), a.machineListCommand(), a.machineShowCommand(),
		a.machineStartCommand(), a.machineStopCommand(), a.machineSnapshotCommand(), a.machineRemoveCommand(), a.machineMigrateCommand(), a.machineConsoleCommand(),
		a.machineCheckpointCommand(), a.machineSuspendCommand(), a.machineResumeCommand(), a.machineCloneCommand(),
		a.machineFirstBootCommand(), a.machineVNCCommand(), a.machineScreenshotCommand(), a.machineSetCommand(),
		a.machineResetCommand(), a.machineRestartCommand(), a.machineRenameCommand(), a.machineCopyCommand(),
		a.machineImportCommand(), a.machineExportCommand())
}

func (a *app) machineListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the machines",
		Example: `  argon machine ls
  argon machine ls -o json | jq -r '.[] | [.machine.meta.name, .serverName] | @tsv'`,
		Args: noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Machines.ListMachines, &argonv1.ListMachinesRequest{})
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetMachines(), a.machineColumns())
	})
	return cmd
}

func (a *app) machineShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one machine",
		Example:           "  argon machine show web",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Machines.GetMachine, &argonv1.GetMachineRequest{Name: args[0]})
		if err != nil {
			return err
		}
		return showOne(a, *f, res.GetMachine(), a.machineColumns(), machineDetails)
	})
	return cmd
}

func (a *app) machineColumns() []column[*argonv1.MachineView] {
	type view = *argonv1.MachineView
	return []column[view]{
		{"name", func(v view) cell { return plain(v.GetMachine().GetMeta().GetName()) }},
		{"state", func(v view) cell { return machineState(v.GetMachine()) }},
		{"server", func(v view) cell { return plain(v.GetServerName()) }},
		{"cpus", func(v view) cell {
			return inForce(v, (*argonv1.Hardware).GetCpus, v.GetMachine().GetCpus(), formatNumber)
		}},
		{"memory", func(v view) cell {
			return inForce(v, (*argonv1.Hardware).GetMemoryBytes, v.GetMachine().GetMemoryBytes(), formatBytes)
		}},
		{"ports", func(v view) cell { return plain(formatPorts(v.GetMachine().GetPorts())) }},
		{"addresses", func(v view) cell {
			return plain(strings.Join(v.GetMachine().GetStatus().GetGuest().GetAddresses(), ","))
		}},
		{"for", func(v view) cell { return plain(formatAge(a.now(), v.GetMachine().GetStatus().GetSince())) }},
		{"reason", func(v view) cell { return plain(v.GetMachine().GetStatus().GetReason()) }},
	}
}

// inForce shows what a machine has, and what it gets when it starts next if that is
// something else.
func inForce[T comparable](v *argonv1.MachineView, of func(*argonv1.Hardware) T, wanted T, show func(T) string) cell {
	has := v.GetMachine().GetInForce()
	if len(v.GetNextStart()) == 0 || has == nil || of(has) == wanted {
		return plain(show(wanted))
	}
	return cell{show(of(has)) + ", then " + show(wanted), yellow}
}

func formatNumber(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// machineDetails are shown of a single machine only.
var machineDetails = []column[*argonv1.MachineView]{
	{"wanted", func(v *argonv1.MachineView) cell { return plain(enumWord(v.GetMachine().GetWanted(), "WANTED_")) }},
	{"at next start", func(v *argonv1.MachineView) cell { return cell{strings.Join(v.GetNextStart(), "; "), yellow} }},
	{"changing", func(v *argonv1.MachineView) cell { return cell{strings.Join(v.GetChanging(), "; "), yellow} }},
	{"not changed", func(v *argonv1.MachineView) cell {
		return cell{v.GetMachine().GetStatus().GetDevicesDetail(), yellow}
	}},
	{"closed ports", func(v *argonv1.MachineView) cell { return cell{strings.Join(v.GetClosedPorts(), "; "), yellow} }},
	{"labels", func(v *argonv1.MachineView) cell { return plain(formatLabels(v.GetMachine().GetMeta().GetLabels())) }},
	{"volumes", func(v *argonv1.MachineView) cell { return plain(strings.Join(v.GetVolumeNames(), ", ")) }},
	{"acceleration", func(v *argonv1.MachineView) cell { return plain(v.GetMachine().GetStatus().GetAcceleration()) }},
	{"firmware", func(v *argonv1.MachineView) cell { return plain(firstOf(v.GetMachine().GetFirmware(), "bios")) }},
	{"networks", func(v *argonv1.MachineView) cell { return plain(formatNetworks(v.GetMachine().GetNetworks())) }},
	{"first boot", func(v *argonv1.MachineView) cell { return plain(formatFirstBoot(v.GetMachine().GetFirstBoot())) }},
	{"hostname", func(v *argonv1.MachineView) cell { return plain(v.GetMachine().GetStatus().GetGuest().GetHostname()) }},
	{"os", func(v *argonv1.MachineView) cell { return plain(v.GetMachine().GetStatus().GetGuest().GetOs()) }},
	{"shares", func(v *argonv1.MachineView) cell { return plain(formatShares(v.GetMachine().GetShares())) }},
	{"not as wanted", func(v *argonv1.MachineView) cell { return plain(v.GetMachine().GetStatus().GetSharesDetail()) }},
	{"on loss", func(v *argonv1.MachineView) cell { return plain(enumWord(v.GetMachine().GetOnLoss(), "ON_LOSS_")) }},
	{"checkpoints", func(v *argonv1.MachineView) cell {
		m := v.GetMachine()
		if m.GetCheckpointEverySeconds() == 0 {
			return plain("")
		}
		every := formatDuration(time.Duration(m.GetCheckpointEverySeconds()) * time.Second)
		return plain(fmt.Sprintf("every %s, %d kept", every, m.GetCheckpointsKept()))
	}},
	{"migration", func(v *argonv1.MachineView) cell { return plain(lastMigration(v.GetMachine())) }},
	{"starts", func(v *argonv1.MachineView) cell { return number(v.GetMachine().GetStatus().GetStarts()) }},
	{"created", func(v *argonv1.MachineView) cell { return plain(formatTime(v.GetMachine().GetMeta().GetCreated())) }},
	{"id", func(v *argonv1.MachineView) cell { return plain(v.GetMachine().GetMeta().GetId()) }},
}

func formatNetworks(list []*argonv1.NetworkInterface) string {
	var macs []string
	for _, n := range list {
		macs = append(macs, n.GetMac())
	}
	return strings.Join(macs, ", ")
}

func formatFirstBoot(b *argonv1.FirstBoot) string {
	if b == nil {
		return ""
	}
	return fmt.Sprintf("user %s, %d SSH keys, revision %d", firstOf(b.GetUser(), "of the image"), len(b.GetSshKeys()), b.GetRevision())
}

func machineState(m *argonv1.Machine) cell {
	state := m.GetStatus().GetState()
	c := plain(enumWord(state, "MACHINE_STATE_"))
	switch state {
	case argonv1.MachineState_MACHINE_STATE_RUNNING:
		c.color = green
	case argonv1.MachineState_MACHINE_STATE_FAILED:
		c.color = red
	case argonv1.MachineState_MACHINE_STATE_PENDING, argonv1.MachineState_MACHINE_STATE_PAUSED:
		c.color = yellow
	}
	return c
}

func formatPorts(ports []*argonv1.PublishedPort) string {
	list := make([]string, len(ports))
	for i, p := range ports {
		list[i] = fmt.Sprintf("%d:%d", p.GetClusterPort(), p.GetGuestPort())
	}
	return strings.Join(list, ",")
}

func (a *app) machineStartCommand() *cobra.Command {
	var wait waitFlags
	cmd := &cobra.Command{
		Use:               "start NAME",
		Short:             "Start a machine and wait until it runs",
		Example:           "  argon machine start web\n  argon machine start web --no-wait",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	wait.add(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		if _, err := client.Call(ctx, c.Machines.StartMachine, &argonv1.StartMachineRequest{Name: args[0]}); err != nil {
			return err
		}
		return a.waitAndPrint(ctx, c, args[0], wait, toRun(), *f)
	})
	return cmd
}

func (a *app) machineStopCommand() *cobra.Command {
	var wait waitFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "stop NAME",
		Short: "Stop a machine and wait until it stands",
		Long: `Presses the machine's power button and waits until it has shut down; after its
stop timeout, or at once with --force, it is ended without asking.`,
		Example:           "  argon machine stop web\n  argon machine stop web --force",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	wait.add(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "end it at once, as a power cut would")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		if _, err := client.Call(ctx, c.Machines.StopMachine, &argonv1.StopMachineRequest{Name: args[0], Force: force}); err != nil {
			return err
		}
		return a.waitAndPrint(ctx, c, args[0], wait, toStand(), *f)
	})
	return cmd
}

func (a *app) machineRemoveCommand() *cobra.Command {
	req := argonv1.RemoveMachineRequest{}
	cmd := &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove machines with the disks that were made with them",
		Long: `Removes machines, with the disks that were made with them: from an image, by
an import, a clone or a copy. Volumes that were made apart and given with
--volume or attached later stay, and are named.`,
		Example: `  argon machine rm web
  argon machine rm web --force          # although it runs
  argon machine rm web --keep-volumes   # its disks stay`,
		Args:              takesSome("NAME"),
		ValidArgsFunction: a.completeEach(machineNames),
	}
	cmd.Flags().BoolVar(&req.Force, "force", false, "also when it runs: end it at once")
	cmd.Flags().BoolVar(&req.KeepVolumes, "keep-volumes", false, "keep its disks")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		return a.forEach(args, "machine %s removed", func(name string) error {
			res, err := waiting(ctx, a, "removing machine "+name, c.Machines.RemoveMachine, &argonv1.RemoveMachineRequest{
				Name: name, Force: req.GetForce(), KeepVolumes: req.GetKeepVolumes(),
			})
			if kept := res.GetKeptVolumes(); err == nil && len(kept) > 0 {
				fmt.Fprintf(a.err, "made apart, and kept: volume %s (argon volume rm)\n", strings.Join(kept, ", "))
			}
			return err
		})
	})
	return cmd
}

func (a *app) printMachine(f format, v *argonv1.MachineView) error {
	return printOne(a, f, v, a.machineColumns())
}
