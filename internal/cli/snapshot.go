package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) snapshotCommand() *cobra.Command {
	return group("snapshot", "What volumes held at one instant",
		`  argon snapshot create db monday
  argon snapshot create --machine web before-upgrade
  argon snapshot ls db
  argon volume create test --snapshot db/monday`,
		a.snapshotCreateCommand(), a.snapshotListCommand(), a.snapshotShowCommand(),
		a.snapshotRemoveCommand(), a.snapshotRollbackCommand())
}

// ofMachine is the flag of commands that take a volume, or with the flag none:
// then they are about all volumes of a machine.
type ofMachine struct{ name string }

func (m *ofMachine) add(a *app, cmd *cobra.Command) {
	cmd.Flags().StringVar(&m.name, "machine", "", "of all volumes of this machine, instead of VOLUME")
	a.completeFlag(cmd, "machine", machineNames)
}

// takes demands the arguments, without VOLUME where a machine is given.
func (m *ofMachine) takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if m.name != "" {
			return takes(names...)(cmd, args)
		}
		return takes(append([]string{"VOLUME"}, names...)...)(cmd, args)
	}
}

// split takes the volume off the arguments.
func (m *ofMachine) split(args []string) (volume string, rest []string) {
	if m.name != "" {
		return "", args
	}
	return args[0], args[1:]
}

// title names what a command is about.
func (m *ofMachine) title(volume, snapshot string) string {
	if m.name != "" {
		return "snapshot " + snapshot + " of machine " + m.name
	}
	return "snapshot " + volume + "/" + snapshot
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var m ofMachine
	var labels map[string]string
	cmd := &cobra.Command{
		Use:   "create VOLUME NAME",
		Short: "Take a snapshot of a volume, or of all of a machine's at once",
		Long: `Takes a snapshot: what the volume holds at this instant, whatever uses it. That
takes no longer for a large volume, and no space until something is written.
With --machine all of its volumes are taken at the same instant.`,
		Example: `  argon snapshot create db monday
  argon snapshot create --machine web before-upgrade`,
		Args:              m.takes("NAME"),
		ValidArgsFunction: a.complete(volumeNames, noNames),
	}
	f := addFormat(cmd)
	m.add(a, cmd)
	cmd.Flags().StringToStringVar(&labels, "label", nil, "KEY=VALUE, kept with it; repeated")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		volume, rest := m.split(args)
		return a.takeSnapshot(ctx, c, *f, &argonv1.CreateSnapshotRequest{Volume: volume, Machine: m.name, Name: rest[0], Labels: labels})
	})
	return cmd
}

func (a *app) takeSnapshot(ctx context.Context, c *client.Client, f format, req *argonv1.CreateSnapshotRequest) error {
	wait := a.startProgress("taking snapshot " + req.GetName())
	res, err := client.Call(ctx, c.Snapshots.CreateSnapshot, req)
	wait.Stop()
	if err != nil {
		return err
	}
	return printList(a, f, res.GetSnapshots(), a.snapshotColumns())
}

// machineSnapshotCommand is the way to it that starts at the machine.
func (a *app) machineSnapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot NAME SNAPSHOT",
		Short: "Take a snapshot of all volumes of a machine, at the same instant",
		Long: `Takes a snapshot of all volumes of a machine at the same instant, also while it
runs. Its disks are then as after a power cut at that instant. See, remove and
roll back to it with argon snapshot ls|rm|rollback --machine NAME.`,
		Example:           "  argon machine snapshot web before-upgrade",
		Args:              takes("NAME", "SNAPSHOT"),
		ValidArgsFunction: a.complete(machineNames, noNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		return a.takeSnapshot(ctx, c, *f, &argonv1.CreateSnapshotRequest{Machine: args[0], Name: args[1]})
	})
	return cmd
}

func (a *app) snapshotListCommand() *cobra.Command {
	var m ofMachine
	cmd := &cobra.Command{
		Use:     "ls [VOLUME]",
		Aliases: []string{"list"},
		Short:   "List the snapshots, of all volumes or of some",
		Example: `  argon snapshot ls
  argon snapshot ls db -o json | jq -r '.[].snapshot.name'
  argon snapshot ls --machine web`,
		ValidArgsFunction: a.complete(volumeNames, noNames),
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 || len(args) == 1 && m.name != "" {
			return usage(cmd, "%q is one argument too many", args[len(args)-1])
		}
		return nil
	}
	f := addFormat(cmd)
	m.add(a, cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req := &argonv1.ListSnapshotsRequest{Machine: m.name}
		if len(args) > 0 {
			req.Volume = args[0]
		}
		res, err := client.Call(ctx, c.Snapshots.ListSnapshots, req)
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetSnapshots(), a.snapshotColumns())
	})
	return cmd
}

func (a *app) snapshotColumns() []column[*argonv1.SnapshotView] {
	type view = *argonv1.SnapshotView
	return []column[view]{
		{"volume", func(v view) cell { return plain(v.GetVolume()) }},
		{"snapshot", func(v view) cell { return plain(v.GetSnapshot().GetName()) }},
		{"state", func(v view) cell { return snapshotState(v.GetSnapshot()) }},
		{"size", func(v view) cell { return plain(formatBytes(v.GetSnapshot().GetSizeBytes())) }},
		{"servers", func(v view) cell { return plain(strings.Join(v.GetServers(), ",")) }},
		{"clones", func(v view) cell { return plain(strings.Join(v.GetClones(), ",")) }},
		{"age", func(v view) cell { return plain(formatAge(a.now(), v.GetSnapshot().GetCreated())) }},
	}
}

func snapshotState(s *argonv1.Snapshot) cell {
	switch {
	case s.GetRemoving():
		return cell{"removing", yellow}
	case s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_READY:
		return cell{"ready", green}
	}
	return cell{enumWord(s.GetState(), "SNAPSHOT_STATE_"), yellow}
}

func (a *app) snapshotShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show VOLUME NAME",
		Short:             "Show one snapshot",
		Example:           "  argon snapshot show db monday",
		Args:              takes("VOLUME", "NAME"),
		ValidArgsFunction: a.completeSnapshot(nil),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Snapshots.GetSnapshot, &argonv1.GetSnapshotRequest{Volume: args[0], Name: args[1]})
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printData(a, *f, res.GetSnapshot())
		}
		return writeFields(a.out, isTerminal(a.out), res.GetSnapshot(), append(a.snapshotColumns(), snapshotDetails...))
	})
	return cmd
}

// snapshotDetails are shown of a single snapshot only.
var snapshotDetails = []column[*argonv1.SnapshotView]{
	{"taken", func(v *argonv1.SnapshotView) cell { return plain(formatTime(v.GetSnapshot().GetCreated())) }},
	{"group of", func(v *argonv1.SnapshotView) cell {
		if v.GetSnapshot().GetGroup() == "" {
			return plain("")
		}
		return plain(fmt.Sprintf("%d volumes (%s)", v.GetSnapshot().GetGroupSize(), v.GetSnapshot().GetGroup()))
	}},
	{"generation", func(v *argonv1.SnapshotView) cell { return number(v.GetSnapshot().GetGeneration()) }},
}

func (a *app) snapshotRemoveCommand() *cobra.Command {
	var m ofMachine
	var detach, noWait bool
	cmd := &cobra.Command{
		Use:   "rm VOLUME NAME",
		Short: "Remove a snapshot; its space comes back",
		Long: `Removes a snapshot. What only it needs is given back in the background. Refused
while volumes are based on it, unless --detach has them copy what they need of
it first: that goes on in the background if this command is interrupted.`,
		Example: `  argon snapshot rm db monday
  argon snapshot rm db monday --detach
  argon snapshot rm --machine web before-upgrade`,
		Args:              m.takes("NAME"),
		ValidArgsFunction: a.completeSnapshot(&m),
	}
	m.add(a, cmd)
	cmd.Flags().BoolVar(&detach, "detach", false, "first have its clones copy what they need of it")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait for the clones")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		volume, rest := m.split(args)
		title := m.title(volume, rest[0])
		res, err := client.Call(ctx, c.Snapshots.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{
			Volume: volume, Machine: m.name, Name: rest[0], Detach: detach,
		})
		if err != nil {
			return err
		}
		if len(res.GetWaitsFor()) > 0 && noWait {
			fmt.Fprintf(a.out, "%s is removed once volume %s is detached from it\n", title, strings.Join(res.GetWaitsFor(), ", "))
			return nil
		}
		if len(res.GetWaitsFor()) > 0 {
			if err := a.pollSnapshotGone(ctx, c, volume, m.name, rest[0], res.GetWaitsFor()); err != nil {
				return err
			}
		}
		fmt.Fprintf(a.out, "%s removed\n", title)
		return nil
	})
	return cmd
}

func (a *app) pollSnapshotGone(ctx context.Context, c *client.Client, volume, machine, name string, waitsFor []string) error {
	return a.pollGone(ctx, c, "removing snapshot "+name, waitsFor, func() (bool, error) {
		if machine == "" {
			_, err := client.Call(ctx, c.Snapshots.GetSnapshot, &argonv1.GetSnapshotRequest{Volume: volume, Name: name})
			return isGone(err)
		}
		res, err := client.Call(ctx, c.Snapshots.ListSnapshots, &argonv1.ListSnapshotsRequest{Machine: machine})
		left := slices.ContainsFunc(res.GetSnapshots(), func(s *argonv1.SnapshotView) bool { return s.GetSnapshot().GetName() == name })
		return !left, err
	})
}

func (a *app) snapshotRollbackCommand() *cobra.Command {
	var m ofMachine
	var noWait bool
	cmd := &cobra.Command{
		Use:   "rollback VOLUME NAME",
		Short: "Make a volume equal to one of its snapshots again",
		Long: `Makes a volume equal to one of its snapshots again. What was written since is
gone, unless a later snapshot has it: those stay. Refused while a machine runs
on the volume or somebody has it connected.`,
		Example: `  argon snapshot rollback db monday
  argon snapshot rollback --machine web before-upgrade`,
		Args:              m.takes("NAME"),
		ValidArgsFunction: a.completeSnapshot(&m),
	}
	m.add(a, cmd)
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return at once; whoever uses the volume waits")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		volume, rest := m.split(args)
		res, err := client.Call(ctx, c.Snapshots.RollBack, &argonv1.RollBackRequest{Volume: volume, Machine: m.name, Name: rest[0]})
		if err != nil {
			return err
		}
		for _, v := range res.GetVolumes() {
			name := v.GetVolume().GetMeta().GetName()
			if noWait {
				fmt.Fprintf(a.out, "volume %s is being rolled back to snapshot %s\n", name, rest[0])
				continue
			}
			if _, err := a.pollVolume(ctx, c, name, func(v *argonv1.Volume) bool { return v.GetRollbackTo() == 0 }); err != nil {
				return err
			}
			fmt.Fprintf(a.out, "volume %s is as in snapshot %s again\n", name, rest[0])
		}
		return nil
	})
	return cmd
}

// splitSnapshot reads VOLUME/NAME.
func splitSnapshot(path string) (volume, name string, ok bool) {
	volume, name, ok = strings.Cut(path, "/")
	return volume, name, ok && volume != "" && name != "" && !strings.Contains(name, "/")
}
