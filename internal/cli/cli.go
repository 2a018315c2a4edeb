// Package cli is the command line of argon.
//
// What lives here: the commands (one file per noun), how records are printed,
// how errors become one line and an exit code. What must not: anything the API
// does not offer; every command but `server` and `dev` is a client of it.
package cli

import (
	"context"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/argon-cluster/argon/client"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	// exitFinal: a server that is started again ends again; install.Unit knows it.
	exitFinal = 3
)

// app is what the commands share: where they read and write, and which server
// they talk to.
type app struct {
	in       io.Reader
	out, err io.Writer
	version  string
	now      func() time.Time

	// Flags of every command.
	dir, socket, server, certs string
	// runs: a command was understood and its body began.
	runs bool
}

// Main runs one command and returns the process's exit code: 0 fine, 1 failed,
// 2 the command was not understood. SIGINT and SIGTERM end the command.
func Main(args []string, version string, in io.Reader, out, errs io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	a := &app{in: in, out: out, err: errs, version: buildVersion(version), now: time.Now}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	return a.exit(root.ExecuteContext(ctx))
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "argon",
		Short: "Makes a set of Linux servers one machine",
		Long: `Argon makes a set of ordinary Linux servers one machine: their disks form one
replicated store, and virtual machines run on any server and start again
elsewhere when theirs is lost.

Commands talk to the server on this host (--dir says which, when there are
several), or with --server and a client certificate to any server.`,
		Example: `  argon server                 # on every server: run the daemon
  argon init                   # on the first one: make a cluster
  argon token create           # allow another server to join
  argon join 10.0.0.1 TOKEN    # on the other one
  argon demo                   # see it work, on this machine only`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args:              noArgs,
		RunE:              needsCommand,
		PersistentPreRunE: a.prepare,
		Annotations:       map[string]string{onlyGroup: "yes"},
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.dir, "dir", "", "data directory of the local server (default $ARGON_DIR or "+client.DefaultDir+")")
	flags.StringVar(&a.socket, "socket", "", "admin socket of a local server that was started with --run-dir")
	flags.StringVar(&a.server, "server", "", "talk to this server, `HOST[:PORT]`, over HTTPS, or to the first of several, separated by commas, that answers (default $ARGON_SERVER, or those that --certs lists)")
	flags.StringVar(&a.certs, "certs", "", "`DIR` with a client certificate and the list of servers (default $ARGON_CERTS or ~/.config/argon)")
	addGroup(root, "What runs", a.machineCommand(), a.imageCommand(), a.volumeCommand(), a.snapshotCommand(), a.checkpointCommand())
	addGroup(root, "The cluster", a.statusCommand(), a.eventsCommand(), a.logsCommand(), a.serverCommand(), a.initCommand(), a.joinCommand(),
		a.tokenCommand(), a.clientCommand(), a.clusterCommand(), a.upgradeCommand())
	addGroup(root, "To try it out", a.demoCommand(), a.devCommand())
	root.AddCommand(a.versionCommand())
	root.SetFlagErrorFunc(flagError)
	root.SetUsageFunc(printUsage)
	setUpCompletion(root)
	setUpHelp(root)
	addAliases(root)
	a.noteRuns(root)
	return root
}

// addGroup adds commands under a title.
func addGroup(root *cobra.Command, title string, commands ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: title, Title: title})
	for _, c := range commands {
		c.GroupID = title
	}
	root.AddCommand(commands...)
}

// addAliases gives the verbs the other names that people look for.
func addAliases(cmd *cobra.Command) {
	switch cmd.Name() {
	case "ls":
		cmd.Aliases = []string{"list"}
	case "rm":
		cmd.Aliases = []string{"remove", "delete"}
	}
	for _, c := range cmd.Commands() {
		addAliases(c)
	}
}

// noteRuns notes when a command's body begins: an error from then on is not
// one of usage.
func (a *app) noteRuns(cmd *cobra.Command) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			a.runs = true
			return run(cmd, args)
		}
	}
	for _, c := range cmd.Commands() {
		a.noteRuns(c)
	}
}

// prepare runs before every command.
func (a *app) prepare(cmd *cobra.Command, _ []string) error {
	a.tellSizes(cmd)
	local := a.dir != "" || a.socket != ""
	switch {
	case local && a.server != "":
		return usage(cmd, "--server given, and --dir or --socket: choose one")
	case !local:
		a.server = firstOf(a.server, os.Getenv("ARGON_SERVER"), a.listedServers())
	}
	var err error
	a.dir, err = filepath.Abs(firstOf(a.dir, os.Getenv("ARGON_DIR"), client.DefaultDir))
	return err
}

// dial makes the client that the flags ask for.
func (a *app) dial() (*client.Client, error) {
	if a.server == "" {
		return client.Dial(client.Options{Socket: firstOf(a.socket, client.SocketPath(a.dir))})
	}
	certs, err := a.credentialsDir()
	if err != nil {
		return nil, err
	}
	credentials, err := client.LoadCredentials(certs)
	if err != nil {
		return nil, err
	}
	return client.Dial(client.Options{Address: a.server, Credentials: credentials})
}

// withClient makes a command's body out of one that needs a client.
func (a *app) withClient(run func(ctx context.Context, c *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		ctx, stop := endOnHangup(cmd.Context())
		defer stop()
		if err := run(ctx, c, args); err != nil {
			return err
		}
		a.followServers(ctx, c)
		return nil
	}
}

// endOnHangup has a lost terminal end a command in order, unless the command
// was started to outlive it (nohup). A server means something else by SIGHUP.
func endOnHangup(ctx context.Context) (context.Context, context.CancelFunc) {
	if signal.Ignored(syscall.SIGHUP) {
		return context.WithCancel(ctx)
	}
	return signal.NotifyContext(ctx, syscall.SIGHUP)
}

// waiting makes one call, and says on a terminal what is waited for.
func waiting[Req, Res any](
	ctx context.Context, a *app, what string,
	method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req,
) (*Res, error) {
	defer a.startProgress(what).Stop()
	return client.Call(ctx, method, req)
}

// group is a command that only holds others.
func group(use, short, example string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Example: example, Args: noArgs, RunE: needsCommand,
		Annotations: map[string]string{onlyGroup: "yes"},
	}
	cmd.AddCommand(commands...)
	return cmd
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
