package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/install"
)

// answersWithin is how long a server that was just started may take to answer.
const answersWithin = 30 * time.Second

// newServer is what the server that is installed becomes.
type newServer struct {
	init                         bool
	join, token                  string
	cluster, name, zone, address string
	witness                      bool
	completion                   string
}

func (a *app) serverInstallCommand() *cobra.Command {
	n := &newServer{}
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install Argon on this host, and start its server",
		Long: `Installs this program as a service of this host and starts it: the program
itself, a unit for systemd, kernel settings, completion, and QEMU if it is
missing. With --init it then makes a cluster, with --join it joins one. What is
there already stays, so it can be run again. With a newer program it upgrades:
machines run on.

On further servers, run what ` + "`argon token create`" + ` prints: it fetches the program
from the cluster.`,
		Example: `  ./argon server install --init
  ./argon server install --init --name s1 --zone rack1
  ./argon server install --join 10.0.0.1 --token argon1.01J9ZK.4Tq9...
  ./argon server install                  # neither: later, or an upgrade`,
		Args: noArgs,
	}
	flags := cmd.Flags()
	flags.BoolVar(&n.init, "init", false, "make a cluster of this server")
	flags.StringVar(&n.cluster, "cluster-name", "argon", "name of the cluster that --init makes")
	flags.StringVar(&n.join, "join", "", "join the cluster of the server at `ADDRESS`")
	flags.StringVar(&n.token, "token", "-", "what lets it join; -: read from standard input")
	addServerFlags(cmd, &n.name, &n.zone, &n.address, &n.witness)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case n.init && n.join != "":
			return usage(cmd, "--init and --join: choose one")
		case n.join == "" && flags.Changed("token"):
			return usage(cmd, "--token without --join: say which server to join at")
		case !n.init && flags.Changed("cluster-name"):
			return usage(cmd, "--cluster-name without --init: the cluster that is joined has a name")
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var script strings.Builder
		if err := cmd.Root().GenBashCompletionV2(&script, true); err != nil {
			return err
		}
		n.completion = script.String()
		return a.install(cmd.Context(), n)
	}
	return cmd
}

// install makes this host a server, and the server part of a cluster.
func (a *app) install(ctx context.Context, n *newServer) error {
	token := ""
	if n.join != "" {
		var err error
		// First: what asks for it must not wait for packages.
		if token, err = a.readToken(ctx, n.token); err != nil {
			return err
		}
	}
	started, err := install.Run(ctx, install.Options{
		Witness: n.witness, Completion: n.completion, Output: a.err,
		Say: func(line string) { fmt.Fprintln(a.err, line) },
	})
	switch {
	case err != nil:
		return err
	case !started && (n.init || n.join != ""):
		return errors.New("install: all is in place, but without systemd running the server can't be started: run `argon init` or `argon join` when it is")
	case !started:
		return nil
	}
	c, err := client.Dial(client.Options{Socket: client.SocketPath(client.DefaultDir)})
	if err != nil {
		return err
	}
	defer c.Close()
	state, err := a.untilAnswers(ctx, c)
	if err != nil {
		return err
	}
	return a.becomePart(ctx, c, n, token, state)
}

// untilAnswers waits for the server that was just started.
func (a *app) untilAnswers(ctx context.Context, c *client.Client) (*argonv1.StatusResponse, error) {
	defer a.startProgress("starting the server").Stop()
	ctx, cancel := context.WithTimeout(ctx, answersWithin)
	defer cancel()
	for {
		s, err := client.Call(ctx, c.Cluster.Status, &argonv1.StatusRequest{})
		if err == nil {
			return s, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("install: the server was started but does not answer: see `journalctl -u argon`: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// becomePart makes or joins a cluster, unless the server is part of one.
func (a *app) becomePart(ctx context.Context, c *client.Client, n *newServer, token string, now *argonv1.StatusResponse) error {
	switch {
	case now.GetState() != "unconfigured":
		fmt.Fprintln(a.out, "the server runs; it is part of a cluster: `argon status` shows it")
		return nil
	case n.init:
		res, err := waiting(ctx, a, "making the cluster", c.Cluster.Init, &argonv1.InitRequest{
			ClusterName: n.cluster, ServerName: n.name, Zone: n.zone, Address: n.address, Witness: n.witness,
		})
		if err != nil {
			return err
		}
		a.tellMade(res)
	case n.join != "":
		res, err := waiting(ctx, a, "joining "+n.join, c.Cluster.Join, &argonv1.JoinRequest{
			Address: n.join, Token: token, ServerName: n.name, Zone: n.zone, OwnAddress: n.address, Witness: n.witness,
		})
		if err != nil {
			return err
		}
		a.tellJoined(res)
	default:
		fmt.Fprintln(a.out, "the server runs: `argon init` makes a cluster, `argon join` joins one")
	}
	return nil
}
