package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/cluster"
	"github.com/argon-cluster/argon/internal/daemon"
)

// This file: `argon cluster backup|restore|recover|rejoin`.

func (a *app) clusterBackupCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "backup FILE|-",
		Short: "Write a copy of the catalog to a file",
		Long: `Writes what the cluster knows about its servers, volumes and machines to a file
("-" is standard output); not what is in the volumes. The file holds the
cluster's keys: whoever reads it can be any server or administrator of it.`,
		Example: `  argon cluster backup catalog.backup
  argon cluster backup - | ssh backup 'umask 77; cat > argon.backup'`,
		Args: takes("FILE|-"),
	}
	cmd.Flags().BoolVar(&force, "force", false, "overwrite the file")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		return a.backupCluster(ctx, c, args[0], force)
	})
	return cmd
}

func (a *app) backupCluster(ctx context.Context, c *client.Client, name string, force bool) error {
	if name == "-" {
		if isTerminal(a.out) {
			return errors.New("cluster backup: standard output is a terminal: name a file, or send it on")
		}
		_, err := receiveBackup(ctx, c, a.out)
		return err
	}
	if err := mayOverwrite(name, force); err != nil {
		return fmt.Errorf("cluster backup: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".part-") // of mode 0600
	if err != nil {
		return fmt.Errorf("cluster backup: %w", err)
	}
	size, err := receiveBackup(ctx, c, f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	a.sayWritten(name, uint64(size))
	fmt.Fprintln(a.err, "it holds the cluster's keys: keep it as you keep those")
	return nil
}

func receiveBackup(ctx context.Context, c *client.Client, to io.Writer) (size int64, err error) {
	stream, err := c.Cluster.BackupCluster(ctx, connect.NewRequest(&argonv1.BackupClusterRequest{}))
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	for stream.Receive() {
		n, err := to.Write(stream.Msg().GetData())
		size += int64(n)
		if err != nil {
			return size, fmt.Errorf("cluster backup: %w", err)
		}
	}
	return size, stream.Err()
}

// recoverFlags are those of recover and restore.
type recoverFlags struct{ yes, name, address string }

func (f *recoverFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.yes, "yes", "", "do not ask: the `NAME` of the cluster")
}

func (a *app) clusterRecoverCommand() *cobra.Command {
	var f recoverFlags
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Go on with this server when most voters are gone for good",
		Long: `Makes this server the only voter of its cluster, with the newest records that
its directory has: its own part of the catalog if it voted, or a copy that it
keeps by itself. Its daemon must be stopped. It says which records these are and
what may be lost, and asks for the cluster's name.

Only when the other voters do not come back! They are refused from then on, with
whatever they know that this server does not. Servers that live are brought
back, with their replicas, by "argon cluster rejoin".`,
		Example: `  argon cluster recover
  argon --dir /srv/argon cluster recover --yes office`,
		Args: noArgs,
	}
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return a.recoverCluster(cmd.Context(), "", f) }
	return cmd
}

func (a *app) clusterRestoreCommand() *cobra.Command {
	var f recoverFlags
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make the cluster anew from a copy of its catalog",
		Long: `Makes the server of this host the only voter of the cluster that a file of
"argon cluster backup" is of, as of then. Its daemon must be stopped. In an
empty directory it becomes a new server, or takes the place of the one that is
named. Else it is as "argon cluster recover".`,
		Example: `  argon cluster restore catalog.backup
  argon cluster restore catalog.backup --name s1 --yes office`,
		Args: takes("FILE"),
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.name, "name", hostName(), "in an empty directory: name of this server")
	cmd.Flags().StringVar(&f.address, "address", "", "in an empty directory: IP address or name that others reach it at (default: found by looking)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return a.recoverCluster(cmd.Context(), args[0], f) }
	return cmd
}

func (a *app) recoverCluster(ctx context.Context, file string, f recoverFlags) (err error) {
	stopped, err := daemon.OpenStopped(a.dir, file != "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopped.Close()) }()
	r, err := stopped.PrepareRecovery(ctx, file, f.name, f.address, a.version)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	name := r.State.Cluster.GetName()
	if f.yes != "" && f.yes != name {
		return fmt.Errorf("not confirmed: the cluster is %q, not %q", name, f.yes)
	}
	if err := a.confirm(ctx, confirmFlag{yes: f.yes != ""}, recoveryLines(r), name); err != nil {
		return err
	}
	kept, err := r.Carry(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(a.out, "this server is the only voter of cluster %s now; start it\n", name)
	if kept != "" {
		fmt.Fprintf(a.out, "what it had before is in %s\n", kept)
	}
	fmt.Fprintln(a.out, "servers that live come back with `argon cluster rejoin`; for those that are")
	fmt.Fprintln(a.out, "gone: `argon server rm NAME --force`. Make client certificates anew.")
	return nil
}

// recoveryLines say what is about to happen.
func recoveryLines(r *cluster.Recovery) []string {
	st := r.State
	lines := []string{
		fmt.Sprintf("cluster %s (%s), incarnation %d", st.Cluster.GetName(), st.Cluster.GetId(), st.Cluster.GetIncarnation()),
		fmt.Sprintf("records: %s, revision %d", r.Source, st.Revision),
		fmt.Sprintf("they have %s (%s), %s, %s", english.Plural(len(st.Servers), "server", ""), strings.Join(r.ServerNames(), ", "),
			english.Plural(len(st.Volumes), "volume", ""), english.Plural(len(st.Machines), "machine", "")),
	}
	for _, err := range r.Skipped {
		lines = append(lines, fmt.Sprintf("not usable: %v", err))
	}
	lines = append(lines, "what may be lost:")
	for _, l := range r.Losses() {
		lines = append(lines, "  "+l)
	}
	return append(lines, "All other servers are refused from then on. If most voters still run somewhere,",
		"stop them first: two halves would go on, each by itself.")
}

func (a *app) clusterRejoinCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rejoin ADDRESS TOKEN",
		Short: "Bring this server back into a cluster that was recovered",
		Long: `Brings a server back, as who it was and with its replicas, after its cluster was
recovered or restored without it. Its daemon must be stopped; start it
afterwards. ADDRESS is any server of the recovered cluster, TOKEN comes from
` + "`argon token create`" + ` there; "-" reads it from standard input.`,
		Example: "  argon cluster rejoin 10.0.0.1 argon1.01J9ZK.4Tq9...",
		Args:    takes("ADDRESS", "TOKEN"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.rejoinCluster(cmd.Context(), args[0], args[1])
		},
	}
}

func (a *app) rejoinCluster(ctx context.Context, address, token string) (err error) {
	if token == "-" {
		if token, err = readLine(ctx, a.in); err != nil {
			return fmt.Errorf("cluster rejoin: reading the token from standard input: %w", err)
		}
	}
	stopped, err := daemon.OpenStopped(a.dir, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopped.Close()) }()
	s, kept, err := stopped.Rejoin(ctx, address, token, a.version)
	if err != nil {
		return err
	}
	fmt.Fprintf(a.out, "server %s is part of the cluster again; start it\n", s.GetMeta().GetName())
	fmt.Fprintf(a.out, "what it had before is in %s\n", kept)
	return nil
}
