package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) clientCommand() *cobra.Command {
	return group("client", "Remote administrators",
		`  argon client create alice ./alice
  argon --certs ./alice status
  argon client ls
  argon client rm alice`,
		a.clientCreateCommand(), a.clientListCommand(), a.clientRemoveCommand())
}

func (a *app) clientListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the client certificates that have not expired",
		Example: "  argon client ls",
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Cluster.ListClients, &argonv1.ListClientsRequest{})
		if err != nil {
			return err
		}
		type certificate = *argonv1.ClientCertificate
		return printList(a, *f, res.GetClients(), []column[certificate]{
			{"name", func(c certificate) cell { return plain(c.GetClient()) }},
			{"state", clientState},
			{"expires", func(c certificate) cell { return plain(formatTime(c.GetExpires())) }},
			{"made by", func(c certificate) cell { return plain(firstOf(c.GetIssuedBy(), "-")) }},
			{"serial", func(c certificate) cell { return plain(c.GetSerial()) }},
		})
	})
	return cmd
}

func clientState(c *argonv1.ClientCertificate) cell {
	if c.GetRevoked() != nil {
		return plain("revoked")
	}
	return cell{"good", green}
}

func (a *app) clientRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME|SERIAL...",
		Short: "Revoke client certificates",
		Long: `Revokes all certificates of a client, or the one with this serial number: every
server refuses them from then on, and ends what they have under way. They stay
in the list until they expire. It can't be undone: make another one instead.`,
		Example:           "  argon client rm alice\n  argon client rm 1f6e0c5b7a9d42c3b8e1d0a4c7f25e93",
		Args:              takesSome("NAME"),
		ValidArgsFunction: a.completeEach(clientNames),
		RunE: a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
			return a.forEach(args, "client %s revoked", func(name string) error {
				_, err := client.Call(ctx, c.Cluster.RevokeClient, &argonv1.RevokeClientRequest{Client: name})
				return err
			})
		}),
	}
}

func (a *app) clientCreateCommand() *cobra.Command {
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "create NAME DIR",
		Short: "Make a client certificate for a remote administrator",
		Long: `Makes a client certificate and its key in a new directory, DIR, with the list of
servers. Whoever has it administers the cluster: copy it to the other host's
~/.config/argon, and delete it here. Commands there talk to the first server
that answers, and keep the list as it is now; --server or $ARGON_SERVER names
others.`,
		Example: `  argon client create alice ./alice --ttl 720h
  argon --certs ./alice machine ls
  argon --server 10.0.0.1,10.0.0.2 --certs ./alice machine ls`,
		Args:              takes("NAME", "DIR"),
		ValidArgsFunction: a.completeThenFiles(nil),
	}
	cmd.Flags().DurationVar(&ttl, "ttl", 365*24*time.Hour, "how long it is valid")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if _, err := wholeSeconds(ttl); err != nil {
			return usage(cmd, "--ttl %v: %v", ttl, err)
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		credentials, err := c.RequestCredentials(ctx, args[0], ttl)
		if err != nil {
			return err
		}
		if err := credentials.Save(args[1]); err != nil {
			return err
		}
		fmt.Fprintf(a.out, "certificate of %s written to %s\n", args[0], args[1])
		return nil
	})
	return cmd
}
