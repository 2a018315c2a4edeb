package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) checkpointCommand() *cobra.Command {
	return group("checkpoint", "Memory and disks of machines at one instant",
		`  argon machine checkpoint web --name before-upgrade
  argon checkpoint ls web
  argon machine resume web --from before-upgrade`,
		a.checkpointListCommand(), a.checkpointShowCommand(), a.checkpointRemoveCommand())
}

func checkpointNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Checkpoints.ListCheckpoints, &argonv1.ListCheckpointsRequest{})
	return collect(res.GetCheckpoints(), (*argonv1.CheckpointView).GetCheckpoint), err
}

func (a *app) checkpointListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ls [MACHINE]",
		Short: "List the checkpoints, of all machines or of one",
		Example: `  argon checkpoint ls
  argon checkpoint ls web -o json | jq -r '.[].checkpoint.meta.name'`,
		ValidArgsFunction: a.complete(machineNames),
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 {
			return usage(cmd, "%q is one argument too many", args[1])
		}
		return nil
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req := &argonv1.ListCheckpointsRequest{}
		if len(args) > 0 {
			req.Machine = args[0]
		}
		res, err := client.Call(ctx, c.Checkpoints.ListCheckpoints, req)
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetCheckpoints(), a.checkpointColumns())
	})
	return cmd
}

func (a *app) checkpointColumns() []column[*argonv1.CheckpointView] {
	type view = *argonv1.CheckpointView
	return []column[view]{
		{"name", func(v view) cell { return plain(v.GetCheckpoint().GetMeta().GetName()) }},
		{"machine", func(v view) cell { return plain(v.GetMachineName()) }},
		{"state", checkpointState},
		{"for", func(v view) cell { return plain(enumWord(v.GetCheckpoint().GetPurpose(), "CHECKPOINT_PURPOSE_")) }},
		{"size", func(v view) cell { return plain(formatBytes(v.GetCheckpoint().GetStoredBytes())) }},
		{"pause", func(v view) cell { return plain(formatPause(v.GetCheckpoint())) }},
		{"age", func(v view) cell { return plain(formatAge(a.now(), v.GetCheckpoint().GetMeta().GetCreated())) }},
		{"reason", func(v view) cell {
			return plain(firstOf(v.GetCheckpoint().GetReason(), v.GetCheckpoint().GetPausedBecause()))
		}},
	}
}

func formatPause(c *argonv1.Checkpoint) string {
	if c.GetPauseMicroseconds() == 0 {
		return ""
	}
	return (time.Duration(c.GetPauseMicroseconds()) * time.Microsecond).Round(time.Millisecond / 10).String()
}

func checkpointState(v *argonv1.CheckpointView) cell {
	c := v.GetCheckpoint()
	switch ready := c.GetState() == argonv1.CheckpointState_CHECKPOINT_STATE_READY; {
	case ready && v.GetUnusable() == "":
		return cell{"ready", green}
	case ready:
		return cell{"unusable", red}
	case c.GetState() == argonv1.CheckpointState_CHECKPOINT_STATE_FAILED:
		return cell{"failed", red}
	}
	return cell{enumWord(c.GetState(), "CHECKPOINT_STATE_"), yellow}
}

func (a *app) checkpointShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one checkpoint",
		Example:           "  argon checkpoint show before-upgrade",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(checkpointNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Checkpoints.GetCheckpoint, &argonv1.GetCheckpointRequest{Name: args[0]})
		if err != nil {
			return err
		}
		return a.printCheckpoint(*f, res.GetCheckpoint())
	})
	return cmd
}

func (a *app) printCheckpoint(f format, v *argonv1.CheckpointView) error {
	return showOne(a, f, v, a.checkpointColumns(), checkpointDetails)
}

// checkpointDetails are shown of a single checkpoint only.
var checkpointDetails = []column[*argonv1.CheckpointView]{
	{"unusable", func(v *argonv1.CheckpointView) cell { return plain(v.GetUnusable()) }},
	{"taken", func(v *argonv1.CheckpointView) cell { return plain(formatTime(v.GetCheckpoint().GetTaken())) }},
	{"on server", func(v *argonv1.CheckpointView) cell { return plain(v.GetServerName()) }},
	{"memory", func(v *argonv1.CheckpointView) cell { return plain(formatBytes(v.GetCheckpoint().GetMemoryBytes())) }},
	{"cpus", func(v *argonv1.CheckpointView) cell { return number(v.GetCheckpoint().GetMachine().GetCpus()) }},
	{"platform", func(v *argonv1.CheckpointView) cell {
		p := v.GetCheckpoint().GetPlatform()
		return plain(fmt.Sprintf("%s %s, QEMU %s", p.GetMachineType(), p.GetAcceleration(), p.GetMonitorVersion()))
	}},
	{"id", func(v *argonv1.CheckpointView) cell { return plain(v.GetCheckpoint().GetMeta().GetId()) }},
}

func (a *app) checkpointRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "rm NAME...",
		Short:             "Remove checkpoints; their space comes back",
		Example:           "  argon checkpoint rm before-upgrade",
		Args:              takesSome("NAME"),
		ValidArgsFunction: a.completeEach(checkpointNames),
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		return a.forEach(args, "checkpoint %s removed", func(name string) error {
			_, err := client.Call(ctx, c.Checkpoints.RemoveCheckpoint, &argonv1.RemoveCheckpointRequest{Name: name})
			return err
		})
	})
	return cmd
}

func (a *app) machineCheckpointCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "checkpoint NAME",
		Short: "Keep a machine's memory and disks as they are at one instant",
		Long: `Keeps the memory, the devices and all disks of a running machine as they are at
one instant. The machine stands still only while snapshots of its disks are
taken; its memory is written while it goes on, where the server's kernel lets it
(see argon checkpoint show). It can be resumed from there on any server.`,
		Example:           "  argon machine checkpoint web\n  argon machine checkpoint web --name before-upgrade",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	cmd.Flags().StringVar(&name, "name", "", "what to call it (default: the machine's name and the time)")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := waiting(ctx, a, "taking a checkpoint of machine "+args[0], c.Machines.CheckpointMachine, &argonv1.CheckpointMachineRequest{Name: args[0], Checkpoint: name})
		if err != nil {
			return err
		}
		return a.printCheckpoint(*f, res.GetCheckpoint())
	})
	return cmd
}

func (a *app) machineSuspendCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "suspend NAME",
		Short: "Put a machine's memory into the store and free its server's",
		Long: `Stops a machine where it is, writes its memory to the store, and frees its
server's. argon machine resume lets it go on exactly there, on any server. Where
that fails the machine runs on.`,
		Example:           "  argon machine suspend web",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := waiting(ctx, a, "suspending machine "+args[0], c.Machines.SuspendMachine, &argonv1.SuspendMachineRequest{Name: args[0]})
		if err != nil {
			return err
		}
		return a.printMachine(*f, res.GetMachine())
	})
	return cmd
}

func (a *app) machineResumeCommand() *cobra.Command {
	req := &argonv1.ResumeMachineRequest{}
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "resume NAME",
		Short: "Let a machine go on where it was suspended, or from a checkpoint",
		Long: `Lets a suspended machine go on where it was. With --from a stopped machine goes
on from a checkpoint: its disks become what they were then, and what was written
to them since is gone. The whole checkpoint is checked before anything is
changed.`,
		Example: `  argon machine resume web
  argon machine resume web --from before-upgrade --on s2`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	wait.add(cmd)
	cmd.Flags().StringVar(&req.Checkpoint, "from", "", "from this `CHECKPOINT`")
	cmd.Flags().StringVar(&req.Server, "on", "", "on this `SERVER`")
	a.completeFlag(cmd, "from", checkpointNames)
	a.completeFlag(cmd, "on", serverNames)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		if _, err := waiting(ctx, a, "resuming machine "+req.GetName(), c.Machines.ResumeMachine, req); err != nil {
			return err
		}
		return a.waitAndPrint(ctx, c, req.GetName(), wait, toRun(), *f)
	})
	return cmd
}

func (a *app) machineCloneCommand() *cobra.Command {
	req := &argonv1.CloneMachineRequest{}
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "clone NAME NEWNAME",
		Short: "Make another machine that goes on from a checkpoint",
		Long: `Makes another machine whose disks are clones of a checkpoint's, and lets it go
on from that checkpoint's memory. It has an id and hardware addresses of its
own; what runs in it knows of neither before it boots (docs/concepts.md).`,
		Example:           "  argon machine clone web web-test --from before-upgrade",
		Args:              takes("NAME", "NEWNAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	wait.add(cmd)
	cmd.Flags().StringVar(&req.Checkpoint, "from", "", "from this `CHECKPOINT` of it")
	cmd.Flags().StringVar(&req.Server, "on", "", "on this `SERVER`")
	a.completeFlag(cmd, "from", checkpointNames)
	a.completeFlag(cmd, "on", serverNames)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if req.GetCheckpoint() == "" {
			return usage(cmd, "--from is missing: name a checkpoint")
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name, req.Clone = args[0], args[1]
		res, err := waiting(ctx, a, "cloning machine "+req.GetName(), c.Machines.CloneMachine, req)
		if err != nil {
			return err
		}
		a.warn(res.GetNotes())
		return a.waitAndPrint(ctx, c, req.GetClone(), wait, toRun(), *f)
	})
	return cmd
}

// keeping are the flags about checkpoints that come by themselves, and about
// what becomes of a machine whose server is lost.
type keeping struct {
	onLoss string
	every  time.Duration
	kept   uint32
}

// add gives a command the flags; usual is what holds without them, if anything.
func (k *keeping) add(cmd *cobra.Command, usual keeping) {
	flags := cmd.Flags()
	flags.StringVar(&k.onLoss, "on-loss", usual.onLoss, "`POLICY` for the loss of its server: restart it, or resume it from its last checkpoint")
	flags.DurationVar(&k.every, "checkpoint-every", usual.every, "take a checkpoint this often; 0: never")
	flags.Uint32Var(&k.kept, "keep", usual.kept, "how many of those are kept")
	completeWords(cmd, "on-loss", "restart", "resume")
}

// read turns the flags into what the API takes.
func (k *keeping) read(cmd *cobra.Command) (policy argonv1.OnLoss, every uint32, err error) {
	switch k.onLoss {
	case "":
	case "restart":
		policy = argonv1.OnLoss_ON_LOSS_RESTART
	case "resume":
		policy = argonv1.OnLoss_ON_LOSS_RESUME
	default:
		return policy, 0, usage(cmd, "--on-loss %q: use restart or resume", k.onLoss)
	}
	if k.every == 0 {
		return policy, 0, nil
	}
	if every, err = wholeSeconds(k.every); err != nil {
		return policy, 0, usage(cmd, "--checkpoint-every %v: %v", k.every, err)
	}
	return policy, every, nil
}
