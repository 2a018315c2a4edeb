package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/argon-cluster/argon/client"
)

func (a *app) clientCommand() *cobra.Command {
	return group("client", "Remote administrators",
		`  argon client create alice ./alice
  argon --server 10.0.0.1 --certs ./alice status`,
		a.clientCreateCommand())
}

func (a *app) clientCreateCommand() *cobra.Command {
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "create NAME DIR",
		Short: "Make a client certificate for a remote administrator",
		Long: `Makes a client certificate and its key in a new directory, DIR. Whoever has it
administers the cluster: copy it to the other host's ~/.config/argon, say which
server to talk to with --server or $ARGON_SERVER, and delete it here.`,
		Example: `  argon client create alice ./alice --ttl 720h
  argon --server 10.0.0.1 --certs ./alice machine ls`,
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
