package cli

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) tokenCommand() *cobra.Command {
	return group("token", "Allow servers to join",
		`  argon token create --servers 2
  argon token ls
  argon token rm 01J9ZK`,
		a.tokenCreateCommand(), a.tokenListCommand(), a.tokenRemoveCommand())
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var ttl time.Duration
	var seconds, servers uint32
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a token that lets servers join",
		Long: `Makes a token that lets one server join, or several, until it expires. It is
shown only now, with a line to run on each new server: it fetches Argon from
this one, installs it and joins.`,
		Example: `  argon token create
  argon token create --servers 2 --ttl 10m`,
		Args: noArgs,
	}
	f := addFormat(cmd)
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it can be used; at most 720h")
	cmd.Flags().Uint32Var(&servers, "servers", 1, "how many it lets join")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) (err error) {
		if servers == 0 {
			return usage(cmd, "--servers 0: give at least 1")
		}
		if seconds, err = wholeSeconds(ttl); err != nil {
			return usage(cmd, "--ttl %v: %v", ttl, err)
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Cluster.CreateToken, &argonv1.CreateTokenRequest{TtlSeconds: seconds, Servers: servers})
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printData(a, *f, res)
		}
		// Scripts read the token, people the rest.
		fmt.Fprintln(a.out, res.GetToken())
		fmt.Fprintf(a.err, "\nto have a new server install Argon and join, run there as root:\n\n    %s\n\n", res.GetInstallCommand())
		fmt.Fprintf(a.err, "where Argon is installed: `argon join %s TOKEN`\n", res.GetAddress())
		return nil
	})
	return cmd
}

func (a *app) tokenListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the tokens",
		Example: "  argon token ls",
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Cluster.ListTokens, &argonv1.ListTokensRequest{})
		if err != nil {
			return err
		}
		servers, err := serversByID(ctx, c)
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetTokens(), []column[*argonv1.Token]{
			{"id", func(t *argonv1.Token) cell { return plain(t.GetId()) }},
			{"state", func(t *argonv1.Token) cell { return a.tokenState(t, servers) }},
			{"expires", func(t *argonv1.Token) cell { return plain(formatTime(t.GetExpires())) }},
			{"age", func(t *argonv1.Token) cell { return plain(formatAge(a.now(), t.GetCreated())) }},
		})
	})
	return cmd
}

func (a *app) tokenState(t *argonv1.Token, servers map[string]string) cell {
	var used []string
	for _, id := range t.GetAdmitted() {
		used = append(used, firstOf(servers[id], id))
	}
	if len(used) == 0 && t.GetUsedBy() != "" { // of before tokens for several
		used = []string{firstOf(servers[t.GetUsedBy()], t.GetUsedBy())}
	}
	by := "used by " + strings.Join(used, ", ")
	switch {
	case t.GetUsedBy() != "":
		return plain(by)
	case t.GetExpires().AsTime().Before(a.now()):
		return plain("expired")
	case len(used) > 0:
		return cell{fmt.Sprintf("%d of %d left, %s", int(t.GetServers())-len(used), t.GetServers(), by), green}
	case t.GetServers() > 1:
		return cell{fmt.Sprintf("fresh, for %d servers", t.GetServers()), green}
	}
	return cell{"fresh", green}
}

func (a *app) tokenRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm ID...",
		Short:             "Remove tokens, so that they can't be used any more",
		Example:           "  argon token rm 01J9ZK",
		Args:              takesSome("ID"),
		ValidArgsFunction: a.completeEach(tokenIDs),
		RunE: a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
			return a.forEach(args, "token %s removed", func(id string) error {
				_, err := client.Call(ctx, c.Cluster.DeleteToken, &argonv1.DeleteTokenRequest{Id: id})
				return err
			})
		}),
	}
}

// forEach does the same to each name, says so, and stops at the first error.
func (a *app) forEach(names []string, done string, do func(name string) error) error {
	for _, name := range names {
		if err := do(name); err != nil {
			return err
		}
		fmt.Fprintf(a.out, done+"\n", name)
	}
	return nil
}

// wholeSeconds turns a flag into what the API takes.
func wholeSeconds(d time.Duration) (uint32, error) {
	if d < time.Second || d%time.Second != 0 || d/time.Second > math.MaxUint32 {
		return 0, fmt.Errorf("not a whole number of seconds, at least 1s")
	}
	return uint32(d / time.Second), nil
}
