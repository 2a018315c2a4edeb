package cli

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// completeWithin bounds how long the shell waits for names.
const completeWithin = time.Second

// names lists the names of one kind of record.
type names func(ctx context.Context, c *client.Client) ([]string, error)

// complete offers the cluster's names for each argument in turn.
func (a *app) complete(kinds ...names) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= len(kinds) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.namesOf(cmd, kinds[len(args)])
	}
}

// completeEach offers names for any number of arguments, each once.
func (a *app) completeEach(list names) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		found, directive := a.namesOf(cmd, list)
		return slices.DeleteFunc(found, func(name string) bool { return slices.Contains(args, name) }), directive
	}
}

// completeThenFiles offers names for the first argument and files for those
// after it.
func (a *app) completeThenFiles(list names) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		switch {
		case len(args) > 0:
			return files(cmd, args, typed)
		case list == nil: // the name is the caller's to choose
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.namesOf(cmd, list)
	}
}

func (a *app) namesOf(cmd *cobra.Command, list names) ([]cobra.Completion, cobra.ShellCompDirective) {
	if err := a.prepare(cmd, nil); err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := a.dial()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), completeWithin)
	defer cancel()
	found, err := list(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return found, cobra.ShellCompDirectiveNoFileComp
}

// completeFlag offers names for a flag's value.
func (a *app) completeFlag(cmd *cobra.Command, flag string, list names) {
	_ = cmd.RegisterFlagCompletionFunc(flag,
		func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.namesOf(cmd, list)
		})
}

func serverNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Servers.ListServers, &argonv1.ListServersRequest{})
	return collect(res.GetServers(), (*argonv1.ServerView).GetServer), err
}

func imageNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Images.ListImages, &argonv1.ListImagesRequest{})
	return collect(res.GetImages(), func(i *argonv1.Image) *argonv1.Image { return i }), err
}

func volumeNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Volumes.ListVolumes, &argonv1.ListVolumesRequest{})
	return collect(res.GetVolumes(), (*argonv1.VolumeView).GetVolume), err
}

// snapshotPaths are VOLUME/NAME.
func snapshotPaths(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Snapshots.ListSnapshots, &argonv1.ListSnapshotsRequest{})
	var paths []string
	for _, s := range res.GetSnapshots() {
		paths = append(paths, s.GetVolume()+"/"+s.GetSnapshot().GetName())
	}
	return paths, err
}

// completeSnapshot offers volumes and then the snapshots of the one that was
// chosen, or those of the machine that m names.
func (a *app) completeSnapshot(m *ofMachine) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		req := &argonv1.ListSnapshotsRequest{}
		switch {
		case m != nil && m.name != "":
			req.Machine = m.name
		case len(args) == 0:
			return a.namesOf(cmd, volumeNames)
		default:
			req.Volume = args[0]
		}
		return a.namesOf(cmd, func(ctx context.Context, c *client.Client) ([]string, error) {
			res, err := client.Call(ctx, c.Snapshots.ListSnapshots, req)
			var found []string
			for _, s := range res.GetSnapshots() {
				if !slices.Contains(found, s.GetSnapshot().GetName()) {
					found = append(found, s.GetSnapshot().GetName())
				}
			}
			return found, err
		})
	}
}

func tokenIDs(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Cluster.ListTokens, &argonv1.ListTokensRequest{})
	var ids []string
	for _, t := range res.GetTokens() {
		ids = append(ids, t.GetId())
	}
	return ids, err
}

func clientNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Cluster.ListClients, &argonv1.ListClientsRequest{})
	var names []string
	for _, one := range res.GetClients() {
		if one.GetRevoked() == nil && !slices.Contains(names, one.GetClient()) {
			names = append(names, one.GetClient())
		}
	}
	return names, err
}

func machineNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Machines.ListMachines, &argonv1.ListMachinesRequest{})
	return collect(res.GetMachines(), (*argonv1.MachineView).GetMachine), err
}

// collect takes the names out of records, or of views of them.
func collect[V any, R interface{ GetMeta() *argonv1.Meta }](views []V, record func(V) R) []string {
	list := make([]string, len(views))
	for i, v := range views {
		list[i] = record(v).GetMeta().GetName()
	}
	return list
}

// completeFiles offers files for the values of flags.
func completeFiles(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		_ = cmd.RegisterFlagCompletionFunc(flag, files)
	}
}

// completeWords offers words for a flag's value.
func completeWords(cmd *cobra.Command, flag string, words ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}

func files(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// setUpCompletion has the shell offer files only where a command asks for it,
// and gives cobra's own command the examples that all have.
func setUpCompletion(root *cobra.Command) {
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.InitDefaultCompletionCmd()
	completeFiles(root, "dir", "socket", "certs")
	for _, cmd := range root.Commands() {
		if cmd.Name() != "completion" {
			continue
		}
		cmd.Example = "  source <(argon completion bash)"
		cmd.Args, cmd.RunE, cmd.Annotations = noArgs, needsCommand, map[string]string{onlyGroup: "yes"}
		for _, shell := range cmd.Commands() {
			shell.Example = "  argon completion " + shell.Name()
		}
	}
}
