package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) serverSetCommand() *cobra.Command {
	req := &argonv1.SetServerRequest{}
	cmd := &cobra.Command{
		Use:   "set NAME --address ADDRESS",
		Short: "Change what others reach a server at",
		Long: `Has a running server reached at another address of its host. Its daemon is
started anew; its machines run on. One that was started with "argon server
--address" keeps that: start it with the new one instead. A server whose old
address is gone already is started with --address, too.`,
		Example:           "  argon server set s2 --address 10.0.1.2",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(serverNames),
	}
	f := addFormat(cmd)
	cmd.Flags().StringVar(&req.Address, "address", "", "IP address or name that other servers reach it at")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if req.GetAddress() == "" {
			return usage(cmd, "--address is missing: say what others shall reach the server at")
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		res, err := client.Call(ctx, c.Servers.SetServer, req)
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printOne(a, *f, res.GetServer(), a.serverColumns())
		}
		fmt.Fprintf(a.out, "server %s moves to %s; `argon server ls` shows it there in a moment\n", req.GetName(), req.GetAddress())
		return nil
	})
	return cmd
}

func (a *app) serverMeetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "meet ADDRESS...",
		Short: "Lead this server to others that have new addresses",
		Long: `Tells this server where others of its cluster are now, and them where it is. It
is for when so many have moved at once that those that keep the catalog can't
find each other. They prove by their certificates who they are, and tell each
other of those that they have met: naming all others on one server is enough.`,
		Example: "  argon server meet 10.1.0.2 10.1.0.3",
		Args:    takesSome("ADDRESS"),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Servers.MeetServers, &argonv1.MeetServersRequest{Addresses: args})
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetMet(), []column[*argonv1.Whereabouts]{
			{"name", func(w *argonv1.Whereabouts) cell { return plain(w.GetName()) }},
			{"address", func(w *argonv1.Whereabouts) cell { return plain(w.GetAddress()) }},
		})
	})
	return cmd
}
