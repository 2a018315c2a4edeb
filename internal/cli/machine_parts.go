package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// partFlags are what `machine set` changes beside sizes and limits.
type partFlags struct {
	ports, labels []string
	unpublish     []uint
	networks      uint32
	firmware      string
}

// partFlagNames are the flags of partFlags.
var partFlagNames = []string{"publish", "unpublish", "attach", "detach", "boot", "networks", "firmware", "label"}

func (p *partFlags) add(a *app, cmd *cobra.Command, req *argonv1.SetMachineRequest) {
	flags := cmd.Flags()
	addPublish(cmd, &p.ports)
	flags.UintSliceVar(&p.unpublish, "unpublish", nil, "publish this `PORT` of the cluster no more; repeated")
	flags.StringArrayVar(&req.Attach, "attach", nil, "make this volume a disk of it, also while it runs; repeated")
	flags.StringArrayVar(&req.Detach, "detach", nil, "let go of the disk with this volume, which stays; repeated")
	flags.StringVar(&req.Boot, "boot", "", "boot from the disk with this volume; stopped only")
	flags.Uint32Var(&p.networks, "networks", 0, "how many network interfaces")
	flags.StringVar(&p.firmware, "firmware", "", "bios or uefi; stopped only")
	flags.StringArrayVar(&p.labels, "label", nil, "`KEY=VALUE`, or KEY= to take it away; repeated")
	for _, name := range []string{"attach", "detach", "boot"} {
		a.completeFlag(cmd, name, volumeNames)
	}
	completeWords(cmd, "firmware", "bios", "uefi")
}

// read puts what needs reading into the request.
func (p *partFlags) read(cmd *cobra.Command, req *argonv1.SetMachineRequest) (err error) {
	if req.Publish, err = parsePorts(p.ports); err != nil {
		return usage(cmd, "%v", err)
	}
	for _, port := range p.unpublish {
		if port < 1 || port > 65535 {
			return usage(cmd, "--unpublish %d is no TCP port", port)
		}
		req.Unpublish = append(req.Unpublish, uint32(port))
	}
	give(cmd.Flags().Changed("networks"), &req.Networks, p.networks)
	give(cmd.Flags().Changed("firmware"), &req.Firmware, p.firmware)
	for _, label := range p.labels {
		k, v, ok := strings.Cut(label, "=")
		switch {
		case !ok || k == "":
			return usage(cmd, "--label %q is not KEY=VALUE", label)
		case v == "":
			req.RemoveLabels = append(req.RemoveLabels, k)
		default:
			if req.Labels == nil {
				req.Labels = map[string]string{}
			}
			req.Labels[k] = v
		}
	}
	return nil
}

// formatLabels lists labels by their keys.
func formatLabels(labels map[string]string) string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		list = append(list, k+"="+labels[k])
	}
	return strings.Join(list, ", ")
}

func (a *app) machineRenameCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rename NAME NEWNAME",
		Short: "Give a machine another name",
		Long: `Gives a machine another name, also while it runs. Its volumes keep theirs, and
what it calls itself inside stays as it is.`,
		Example:           "  argon machine rename web web-old",
		Args:              takes("NAME", "NEWNAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Machines.SetMachine, &argonv1.SetMachineRequest{Name: args[0], NewName: args[1]})
		if err != nil {
			return err
		}
		return a.printMachine(*f, res.GetMachine())
	})
	return cmd
}

func (a *app) machineResetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reset NAME",
		Short: "Press a machine's reset button",
		Long: `Presses the reset button of a machine that runs: it boots anew at once, and what
it did not write to its disks is lost. To let it shut down first, use "restart".`,
		Example:           "  argon machine reset web",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Machines.ResetMachine, &argonv1.ResetMachineRequest{Name: args[0]})
		if err != nil {
			return err
		}
		return a.printMachine(*f, res.GetMachine())
	})
	return cmd
}

func (a *app) machineRestartCommand() *cobra.Command {
	var wait waitFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "restart NAME",
		Short: "Stop a machine and start it again",
		Long: `Presses the machine's power button, waits until it has shut down, and starts
it again, with what has waited for its next start. After its stop timeout, or at
once with --force, it is ended without asking.`,
		Example:           "  argon machine restart web\n  argon machine restart web --force",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	wait.add(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "end it at once, as a power cut would")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Machines.RestartMachine, &argonv1.RestartMachineRequest{Name: args[0], Force: force})
		if err != nil {
			return err
		}
		return a.waitAndPrint(ctx, c, args[0], wait, toRunAfter(res.GetMachine().GetMachine().GetPlacement()), *f)
	})
	return cmd
}

func (a *app) machineCopyCommand() *cobra.Command {
	var wait waitFlags
	req := &argonv1.CopyMachineRequest{}
	cmd := &cobra.Command{
		Use:   "copy NAME COPY",
		Short: "Make another machine with copies of a machine's disks",
		Long: `Makes another machine like a machine, with copies of its disks as they are now:
those of a machine that runs are as after a power cut, or at rest if its guest
agent answers. The copy is there at once; its data come in the background,
unless it is --linked. It has hardware addresses of its own and publishes no
ports. To go on from a machine's memory, use "clone".`,
		Example: `  argon machine copy web web2
  argon machine copy template web3 --linked --no-wait
  argon machine copy db db-test --stopped`,
		Args:              takes("NAME", "COPY"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	wait.add(cmd)
	cmd.Flags().BoolVar(&req.Linked, "linked", false, "keep reading from a snapshot of the other's disks, which can't be removed before")
	cmd.Flags().BoolVar(&req.Stopped, "stopped", false, "do not start it")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name, req.Copy = args[0], args[1]
		res, err := waiting(ctx, a, "copying machine "+req.GetName(), c.Machines.CopyMachine, req)
		if err != nil {
			return err
		}
		for _, note := range res.GetNotes() {
			fmt.Fprintln(a.err, "note: "+note)
		}
		if req.GetStopped() {
			return a.printMachine(*f, res.GetMachine())
		}
		return a.waitAndPrint(ctx, c, req.GetCopy(), wait, toRun(), *f)
	})
	return cmd
}
