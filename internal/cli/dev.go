package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/argon-cluster/argon/internal/devcluster"
)

func (a *app) devCommand() *cobra.Command {
	var dir string
	cmd := group("dev", "A cluster of real servers on this machine, for trying things out",
		`  argon dev up --servers 3
  argon dev ls
  argon dev kill s1      # a power cut
  argon dev start s1
  argon dev down`)
	cmd.Long = `Runs a cluster of real servers on this machine, each with its own directory and
its own loopback address, or with --netns (as root) each in its own network
namespace, so that links can be cut. Use it with the ordinary commands:

  argon --dir DIR/s1 status`
	cmd.PersistentFlags().StringVar(&dir, "dir", "", "the cluster's directory (default ~/.cache/argon-dev)")
	completeFiles(cmd, "dir")
	// find opens the cluster when a command runs.
	find := func() (*devcluster.Cluster, error) {
		path, err := devDir(dir)
		if err != nil {
			return nil, err
		}
		return devcluster.Open(path)
	}
	cmd.AddCommand(
		a.devUpCommand(&dir), a.devListCommand(find), a.devDownCommand(find), a.devStartCommand(find),
		a.devKillCommand(find), a.devPauseCommand(find), a.devResumeCommand(find),
		a.devCutCommand(find), a.devHealCommand(find))
	return cmd
}

// findCluster opens the dev cluster that the flags name.
type findCluster func() (*devcluster.Cluster, error)

func devDir(flag string) (string, error) {
	if flag != "" {
		return flag, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", errors.New("dev: no home directory: say where the cluster is with --dir")
	}
	return filepath.Join(cache, "argon-dev"), nil
}

func (a *app) devUpCommand(dir *string) *cobra.Command {
	var o devcluster.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start servers and make a cluster of them",
		Example: `  argon dev up --servers 3
  argon dev up --servers 3 --witness --dir /tmp/try
  sudo argon dev up --servers 5 --netns`,
		Args: noArgs,
	}
	cmd.Flags().IntVar(&o.Servers, "servers", 3, "how many")
	cmd.Flags().BoolVar(&o.Witness, "witness", false, "the last one only votes")
	cmd.Flags().BoolVar(&o.Netns, "netns", false, "put each into a network namespace of its own (needs root)")
	cmd.Flags().BoolVar(&o.Zones, "zones", false, "put each into a zone of its own")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var err error
		if o.Dir, err = devDir(*dir); err != nil {
			return err
		}
		p := a.startProgress("starting servers")
		o.Progress = p.Set
		began := a.now()
		c, err := devcluster.Up(cmd.Context(), o)
		p.Stop()
		if err != nil {
			return err
		}
		fmt.Fprintf(a.out, "%s up after %.1fs\n\n", english.Plural(o.Servers, "server", ""), a.now().Sub(began).Seconds())
		if err := a.printDevServers(c); err != nil {
			return err
		}
		fmt.Fprintf(a.out, "\nto use them: argon --dir %s status\nto end them: argon dev down%s\n", c.Servers()[0].Dir, dirFlag(*dir))
		return nil
	}
	return cmd
}

func dirFlag(dir string) string {
	if dir == "" {
		return ""
	}
	return " --dir " + dir
}

func (a *app) devListCommand(find findCluster) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the servers of the dev cluster",
		Example: "  argon dev ls\n  argon dev ls -o json | jq -r '.[].directory'",
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		c, err := find()
		if err != nil {
			return err
		}
		if *f == formatTable {
			return a.printDevServers(c)
		}
		list := make([]map[string]string, 0, len(c.Servers()))
		for _, s := range c.Servers() {
			record := make(map[string]string)
			for _, column := range devColumns {
				record[column.name] = column.value(s).text
			}
			list = append(list, record)
		}
		return writeData(a.out, *f, list)
	}
	return cmd
}

func (a *app) printDevServers(c *devcluster.Cluster) error {
	return writeTable(a.out, isColored(a.out), c.Servers(), devColumns)
}

var devColumns = []column[*devcluster.Server]{
	{"name", func(s *devcluster.Server) cell { return plain(s.Name) }},
	{"processes", devCondition},
	{"links", devLinks},
	{"address", func(s *devcluster.Server) cell { return plain(s.Address) }},
	{"directory", func(s *devcluster.Server) cell { return plain(s.Dir) }},
}

func devLinks(s *devcluster.Server) cell {
	switch {
	case s.IsCut:
		return cell{"cut", red}
	case len(s.CutFrom) > 0:
		return cell{"mute to " + strings.Join(s.CutFrom, ","), yellow}
	}
	return plain("whole")
}

func devCondition(s *devcluster.Server) cell {
	condition, err := s.Condition()
	if err != nil {
		return cell{err.Error(), red}
	}
	switch condition {
	case "running":
		return cell{condition, green}
	case "stopped":
		return cell{condition, red}
	}
	return cell{condition, yellow}
}

func (a *app) devDownCommand(find findCluster) *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use:     "down",
		Short:   "End the dev cluster and remove what it left",
		Example: "  argon dev down\n  argon dev down --keep-data   # directories and logs stay",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := find()
			if err != nil {
				return err
			}
			defer a.startProgress("stopping servers").Stop()
			return c.Down(cmd.Context(), devcluster.Keep(keep))
		},
	}
	cmd.Flags().BoolVar(&keep, "keep-data", false, "keep the directories")
	return cmd
}

// devServerCommand is one that does something to one server.
func (a *app) devServerCommand(find findCluster, use, short, example string, do func(context.Context, *devcluster.Server) error) *cobra.Command {
	return &cobra.Command{
		Use:               use + " NAME",
		Short:             short,
		Example:           example,
		Args:              takes("NAME"),
		ValidArgsFunction: completeDev(find),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := find()
			if err != nil {
				return err
			}
			s, err := c.Server(args[0])
			if err != nil {
				return err
			}
			defer a.startProgress(use + " " + args[0]).Stop()
			return do(cmd.Context(), s)
		},
	}
}

func completeDev(find findCluster) cobra.CompletionFunc {
	return func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		c, err := find()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []string
		for _, s := range c.Servers() {
			names = append(names, s.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) devStartCommand(find findCluster) *cobra.Command {
	return a.devServerCommand(find, "start", "Start a server that was killed", "  argon dev start s1",
		func(ctx context.Context, s *devcluster.Server) error { return s.Start(ctx) })
}

func (a *app) devResumeCommand(find findCluster) *cobra.Command {
	return a.devServerCommand(find, "resume", "Let a paused server go on", "  argon dev resume s1",
		func(_ context.Context, s *devcluster.Server) error { return s.Resume() })
}

func (a *app) devKillCommand(find findCluster) *cobra.Command {
	var only []string
	cmd := a.devServerCommand(find, "kill", "Kill all processes of a server at once, like a power cut",
		"  argon dev kill s1\n  argon dev kill s1 --only daemon",
		func(ctx context.Context, s *devcluster.Server) error { return s.Kill(ctx, parts(only)...) })
	addOnly(cmd, &only)
	return cmd
}

func (a *app) devPauseCommand(find findCluster) *cobra.Command {
	var only []string
	cmd := a.devServerCommand(find, "pause", "Stop all processes of a server with SIGSTOP: silent, but not gone",
		"  argon dev pause s1\n  argon dev pause s1 --only guests",
		func(ctx context.Context, s *devcluster.Server) error { return s.Pause(ctx, parts(only)...) })
	addOnly(cmd, &only)
	return cmd
}

// addOnly lets a fault happen to some of a server's processes.
func addOnly(cmd *cobra.Command, only *[]string) {
	cmd.Flags().StringSliceVar(only, "only", nil, "only these `PROCESSES`: guard, daemon, guests")
	completeWords(cmd, "only", "guard", "daemon", "guests")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		for _, p := range parts(*only) {
			if !slices.Contains(devcluster.Parts, p) {
				return usage(cmd, "--only %s is none of guard, daemon, guests", p)
			}
		}
		return nil
	}
}

func parts(words []string) []devcluster.Part {
	list := make([]devcluster.Part, len(words))
	for i, w := range words {
		list[i] = devcluster.Part(w)
	}
	return list
}

func (a *app) devCutCommand(find findCluster) *cobra.Command {
	var oneWay bool
	cmd := a.devLinkCommand(find, "cut", "Sever a server's links, or those between two servers",
		`  argon dev cut s1
  argon dev cut s1 s2             # only between these two
  argon dev cut s1 s2 --one-way   # only from s1 to s2`,
		(*devcluster.Server).Cut,
		func(ctx context.Context, from, to *devcluster.Server) error {
			if err := from.Mute(ctx, to); err != nil || oneWay {
				return err
			}
			return to.Mute(ctx, from)
		})
	cmd.Flags().BoolVar(&oneWay, "one-way", false, "the other direction stays")
	return cmd
}

func (a *app) devHealCommand(find findCluster) *cobra.Command {
	return a.devLinkCommand(find, "heal", "Undo a cut", "  argon dev heal s1\n  argon dev heal s1 s2",
		(*devcluster.Server).Heal,
		func(ctx context.Context, from, to *devcluster.Server) error {
			return errors.Join(from.Unmute(ctx, to), to.Unmute(ctx, from))
		})
}

// devLinkCommand is one that does something to one server's links, or to those
// between two.
func (a *app) devLinkCommand(find findCluster, use, short, example string,
	one func(*devcluster.Server, context.Context) error,
	pair func(ctx context.Context, from, to *devcluster.Server) error,
) *cobra.Command {
	return &cobra.Command{
		Use:     use + " NAME [NAME]",
		Short:   short,
		Long:    short + ".\nNeeds a cluster that was started with --netns.",
		Example: example,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 && args[0] == args[1] {
				return usage(cmd, "%s and %s are one server", args[0], args[1])
			}
			return takes([]string{"NAME", "NAME"}[:max(1, min(len(args), 2))]...)(cmd, args)
		},
		ValidArgsFunction: completeDev(find),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := find()
			if err != nil {
				return err
			}
			servers := make([]*devcluster.Server, len(args))
			for i, name := range args {
				if servers[i], err = c.Server(name); err != nil {
					return err
				}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), linkWithin)
			defer cancel()
			if len(servers) == 1 {
				return one(servers[0], ctx)
			}
			return pair(ctx, servers[0], servers[1])
		},
	}
}

// linkWithin bounds how long changing a link may take.
const linkWithin = 10 * time.Second
