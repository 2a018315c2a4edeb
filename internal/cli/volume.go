package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) volumeCommand() *cobra.Command {
	return group("volume", "Replicated virtual disks",
		`  argon volume create db --size 20GiB --replicas 2
  argon volume create test --snapshot db/monday
  argon volume ls
  argon volume connect db`,
		a.volumeCreateCommand(), a.volumeListCommand(), a.volumeShowCommand(), a.volumeRemoveCommand(),
		a.volumeConnectCommand(), a.volumePromoteCommand(),
		a.volumeResizeCommand(), a.volumeDetachCommand(), a.volumeScrubCommand(),
		a.volumeExportCommand(), a.volumeImportCommand())
}

func (a *app) volumeCreateCommand() *cobra.Command {
	req := &argonv1.CreateVolumeRequest{}
	size := diskSize()
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a volume: empty, or a clone of an image or a snapshot",
		Long: `Makes a volume: empty, or a clone of an image or of another volume's snapshot.
A clone has the content at once, whatever its size: it reads there what was not
written to it. The image or snapshot can't be removed before the clone, unless
the clone is detached (argon volume detach-base).`,
		Example: `  argon volume create db --size 20GiB
  argon volume create boot --image debian --replicas 3
  argon volume create test --snapshot db/monday`,
		Args: takes("NAME"),
	}
	var snapshot string
	f := addFormat(cmd)
	cmd.Flags().Var(&size, "size", "such as 20GiB; a number alone is GiB (default: the image's or the snapshot's size)")
	cmd.Flags().Uint32Var(&req.Replicas, "replicas", 2, "how many servers keep a copy: 1, 2 or 3")
	cmd.Flags().StringVar(&req.Image, "image", "", "a clone of this image")
	cmd.Flags().StringVar(&snapshot, "snapshot", "", "a clone of this snapshot, `VOLUME/NAME`")
	a.completeFlag(cmd, "image", imageNames)
	a.completeFlag(cmd, "snapshot", snapshotPaths)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if size.bytes == 0 && req.GetImage() == "" && snapshot == "" {
			return usage(cmd, "--size is missing (only a clone of an --image or a --snapshot has a size of its own)")
		}
		if snapshot != "" {
			var ok bool
			if req.SnapshotVolume, req.Snapshot, ok = splitSnapshot(snapshot); !ok {
				return usage(cmd, "--snapshot %q is not VOLUME/NAME", snapshot)
			}
		}
		return cmp.Or(exclusive(cmd, "image", "snapshot"), checkReplicas(cmd, req.GetReplicas()))
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name, req.SizeBytes = args[0], size.bytes
		res, err := waiting(ctx, a, "making volume "+req.GetName(), c.Volumes.CreateVolume, req)
		if err != nil {
			return err
		}
		a.warn(res.GetWarnings())
		return printOne(a, *f, res.GetVolume(), a.volumeColumns())
	})
	return cmd
}

func checkReplicas(cmd *cobra.Command, n uint32) error {
	if n < 1 || n > 3 {
		return usage(cmd, "--replicas %d: 1, 2 and 3 are possible", n)
	}
	return nil
}

// warn shows what the server noticed while it did what was asked.
func (a *app) warn(warnings []string) {
	for _, w := range warnings {
		fmt.Fprintln(a.err, "warning: "+w)
	}
}

func (a *app) volumeListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the volumes",
		Example: `  argon volume ls
  argon volume ls -o json | jq -r '.[] | select(.health != "healthy") | .volume.meta.name'`,
		Args: noArgs,
	}
	f := addFormat(cmd)
	var all bool
	cmd.Flags().BoolVar(&all, "all", false, "also those that hold the memory of checkpoints")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Volumes.ListVolumes, &argonv1.ListVolumesRequest{All: all})
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetVolumes(), a.volumeColumns())
	})
	return cmd
}

func (a *app) volumeColumns() []column[*argonv1.VolumeView] {
	type view = *argonv1.VolumeView
	return []column[view]{
		{"name", func(v view) cell { return plain(v.GetVolume().GetMeta().GetName()) }},
		{"size", func(v view) cell { return plain(formatBytes(v.GetVolume().GetSizeBytes())) }},
		{"health", volumeHealth},
		{"in-sync", func(v view) cell {
			return plain(fmt.Sprintf("%d/%d", inSync(v.GetVolume()), v.GetVolume().GetReplicasWanted()))
		}},
		{"attached", func(v view) cell {
			switch at := v.GetVolume().GetAttachment(); {
			case at == nil:
				return plain("no")
			case at.GetMachineId() != "":
				return plain("machine")
			case at.GetConnected():
				return plain("connected")
			}
			return plain("upkeep")
		}},
		{"age", func(v view) cell { return plain(formatAge(a.now(), v.GetVolume().GetMeta().GetCreated())) }},
	}
}

func volumeHealth(v *argonv1.VolumeView) cell {
	c := cell{v.GetHealth(), yellow}
	switch v.GetHealth() {
	case "healthy":
		c.color = green
	case "unavailable":
		c.color = red
	}
	for _, r := range v.GetStatus().GetResyncs() {
		if r.GetTotalBytes() > 0 {
			c.text += fmt.Sprintf(" (resync %d%%)", r.GetDoneBytes()*100/r.GetTotalBytes())
			break
		}
	}
	return c
}

func inSync(v *argonv1.Volume) int {
	n := 0
	for _, r := range v.GetReplicas() {
		if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
			n++
		}
	}
	return n
}

func (a *app) volumeRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm NAME...",
		Short:             "Remove volumes with all their data",
		Example:           "  argon volume rm db",
		Args:              takesSome("NAME"),
		ValidArgsFunction: a.completeEach(volumeNames),
		RunE: a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
			return a.forEach(args, "volume %s removed", func(name string) error {
				_, err := waiting(ctx, a, "removing volume "+name, c.Volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: name})
				return err
			})
		}),
	}
}

func (a *app) volumeConnectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "connect NAME",
		Short: "Attach a volume on this server and print an NBD URI",
		Long: `Attaches a volume on the server that is asked and prints the NBD URI of a unix
socket there, until interrupted. Any NBD client can then use the volume.`,
		Example: `  argon volume connect db
  qemu-img info "$URI"                  # in another shell, with what it printed
  nbd-client -unix SOCKET -N db /dev/nbd0`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(volumeNames),
		RunE: a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
			stream, err := c.Volumes.ConnectVolume(ctx, connect.NewRequest(&argonv1.ConnectVolumeRequest{Name: args[0]}))
			if err != nil {
				return err
			}
			defer stream.Close()
			p := a.startProgress("attaching volume " + args[0])
			attached := stream.Receive()
			p.Stop()
			for ; attached; attached = stream.Receive() {
				if uri := stream.Msg().GetUri(); uri != "" {
					fmt.Fprintln(a.out, uri)
				}
			}
			switch err := stream.Err(); {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				return err
			}
			return errors.New("volume " + args[0] + ": the server ended the connection: see `argon events --kind volume`")
		}),
	}
}

func (a *app) volumePromoteCommand() *cobra.Command {
	req := &argonv1.PromoteReplicaRequest{}
	cmd := &cobra.Command{
		Use:   "promote NAME SERVER",
		Short: "Trust a stale replica after every in-sync one was lost for good",
		Long: `Makes the replica on SERVER the only in-sync one, although it may lack
acknowledged writes. The last resort after every in-sync replica was lost for
good; it says what is lost.`,
		Example:           "  argon volume promote db s2 --accept-loss",
		Args:              takes("NAME", "SERVER"),
		ValidArgsFunction: a.complete(volumeNames, serverNames),
	}
	f := addFormat(cmd)
	cmd.Flags().BoolVar(&req.AcceptLoss, "accept-loss", false, "yes, acknowledged writes may be lost")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Volume, req.Server = args[0], args[1]
		res, err := waiting(ctx, a, "asking the replica on "+req.GetServer(), c.Volumes.PromoteReplica, req)
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printData(a, *f, res)
		}
		fmt.Fprintf(a.out, "volume %s: the replica on %s is trusted now; lost: %s\n", req.GetVolume(), req.GetServer(), res.GetLost())
		return nil
	})
	return cmd
}
