package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/dustin/go-humanize/english"
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

// takes demands VOLUME NAME, or VOLUME/NAME, or NAME where a machine is given.
// With several there may be more names.
func (m *ofMachine) takes(several bool) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		names := []string{"VOLUME", "NAME"}
		switch {
		case m.name != "":
			names = []string{"NAME"}
		case len(args) > 0 && strings.Contains(args[0], "/"):
			names = []string{"VOLUME/NAME"}
		}
		for several && len(args) > len(names) {
			names = append(names, names[len(names)-1])
		}
		if err := takes(names...)(cmd, args); err != nil || names[0] != "VOLUME/NAME" {
			return err
		}
		for _, arg := range args {
			if _, _, ok := splitSnapshot(arg); !ok {
				return usage(cmd, "%q is not VOLUME/NAME", arg)
			}
		}
		return nil
	}
}

// snapshotPath names a snapshot of a volume; the volume is empty where it is one
// of all volumes of a machine.
type snapshotPath struct{ volume, name string }

// paths reads arguments that were found to be right.
func (m *ofMachine) paths(args []string) []snapshotPath {
	volume, inPath := "", m.name == "" && strings.Contains(args[0], "/")
	if m.name == "" && !inPath {
		volume, args = args[0], args[1:]
	}
	paths := make([]snapshotPath, len(args))
	for i, arg := range args {
		paths[i] = snapshotPath{volume, arg}
		if inPath {
			paths[i].volume, paths[i].name, _ = splitSnapshot(arg)
		}
	}
	return paths
}

// title names what a command is about.
func (m *ofMachine) title(p snapshotPath) string {
	if m.name != "" {
		return "snapshot " + p.name + " of machine " + m.name
	}
	return "snapshot " + p.volume + "/" + p.name
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
		Args:              m.takes(false),
		ValidArgsFunction: a.complete(volumeNames),
	}
	f := addFormat(cmd)
	m.add(a, cmd)
	cmd.Flags().StringToStringVar(&labels, "label", nil, "KEY=VALUE, kept with it; repeated")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		p := m.paths(args)[0]
		return a.takeSnapshot(ctx, c, *f, &argonv1.CreateSnapshotRequest{Volume: p.volume, Machine: m.name, Name: p.name, Labels: labels})
	})
	return cmd
}

func (a *app) takeSnapshot(ctx context.Context, c *client.Client, f format, req *argonv1.CreateSnapshotRequest) error {
	res, err := waiting(ctx, a, "taking snapshot "+req.GetName(), c.Snapshots.CreateSnapshot, req)
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
		ValidArgsFunction: a.complete(machineNames),
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
		Use:   "ls [VOLUME]",
		Short: "List the snapshots, of all volumes or of some",
		Example: `  argon snapshot ls
  argon snapshot ls db -o json | jq -r '.[].snapshot.name'
  argon snapshot ls --machine web`,
		ValidArgsFunction: a.complete(volumeNames),
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
	var m ofMachine // none
	cmd := &cobra.Command{
		Use:               "show VOLUME NAME",
		Short:             "Show one snapshot",
		Example:           "  argon snapshot show db monday",
		Args:              m.takes(false),
		ValidArgsFunction: a.completeSnapshot(&m),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		p := m.paths(args)[0]
		res, err := client.Call(ctx, c.Snapshots.GetSnapshot, &argonv1.GetSnapshotRequest{Volume: p.volume, Name: p.name})
		if err != nil {
			return err
		}
		return showOne(a, *f, res.GetSnapshot(), a.snapshotColumns(), snapshotDetails)
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
		return plain(fmt.Sprintf("%s (%s)", english.Plural(int(v.GetSnapshot().GetGroupSize()), "volume", ""), v.GetSnapshot().GetGroup()))
	}},
	{"labels", func(v *argonv1.SnapshotView) cell {
		var labels []string
		for _, k := range slices.Sorted(maps.Keys(v.GetSnapshot().GetLabels())) {
			labels = append(labels, k+"="+v.GetSnapshot().GetLabels()[k])
		}
		return plain(strings.Join(labels, ", "))
	}},
	{"generation", func(v *argonv1.SnapshotView) cell { return number(v.GetSnapshot().GetGeneration()) }},
}

func (a *app) snapshotRemoveCommand() *cobra.Command {
	var m ofMachine
	var detach, noWait bool
	cmd := &cobra.Command{
		Use:   "rm VOLUME NAME...",
		Short: "Remove snapshots; their space comes back",
		Long: `Removes snapshots. What only they need is given back in the background. Refused
while volumes are based on one, unless --detach has them copy what they need of
it first: that goes on in the background if this command is interrupted.`,
		Example: `  argon snapshot rm db monday tuesday
  argon snapshot rm db/monday --detach
  argon snapshot rm --machine web before-upgrade`,
		Args:              m.takes(true),
		ValidArgsFunction: a.completeSnapshot(&m),
	}
	m.add(a, cmd)
	cmd.Flags().BoolVar(&detach, "detach", false, "first have its clones copy what they need of it")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait for the clones")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		for _, p := range m.paths(args) {
			err := a.removeBase(ctx, c, m.title(p), noWait, func() ([]string, error) {
				res, err := client.Call(ctx, c.Snapshots.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{
					Volume: p.volume, Machine: m.name, Name: p.name, Detach: detach,
				})
				return res.GetWaitsFor(), err
			}, func() (bool, error) { return snapshotGone(ctx, c, m.name, p) })
			if err != nil {
				return err
			}
		}
		return nil
	})
	return cmd
}

func snapshotGone(ctx context.Context, c *client.Client, machine string, p snapshotPath) (bool, error) {
	if machine == "" {
		_, err := client.Call(ctx, c.Snapshots.GetSnapshot, &argonv1.GetSnapshotRequest{Volume: p.volume, Name: p.name})
		return isGone(err)
	}
	res, err := client.Call(ctx, c.Snapshots.ListSnapshots, &argonv1.ListSnapshotsRequest{Machine: machine})
	left := slices.ContainsFunc(res.GetSnapshots(), func(s *argonv1.SnapshotView) bool { return s.GetSnapshot().GetName() == p.name })
	return !left, err
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
		Args:              m.takes(false),
		ValidArgsFunction: a.completeSnapshot(&m),
	}
	m.add(a, cmd)
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return at once; whoever uses the volume waits")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		p := m.paths(args)[0]
		res, err := client.Call(ctx, c.Snapshots.RollBack, &argonv1.RollBackRequest{Volume: p.volume, Machine: m.name, Name: p.name})
		if err != nil {
			return err
		}
		for _, v := range res.GetVolumes() {
			name := v.GetVolume().GetMeta().GetName()
			if noWait {
				fmt.Fprintf(a.out, "volume %s is being rolled back to snapshot %s\n", name, p.name)
				continue
			}
			if _, err := a.pollVolume(ctx, c, name, func(v *argonv1.Volume) bool { return v.GetRollbackTo() == 0 }); err != nil {
				return err
			}
			fmt.Fprintf(a.out, "volume %s is as in snapshot %s again\n", name, p.name)
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
