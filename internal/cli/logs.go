package cli

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) logsCommand() *cobra.Command {
	req := &argonv1.ReadLogRequest{}
	var since moment
	cmd := &cobra.Command{
		Use:   "logs [SERVER]",
		Short: "Show what a server logs",
		Long: `Shows what the daemon and the guard of a server log, the oldest first: of the
server that is asked, or of another one. Kept are the last 8 to 16 MiB, whatever
ended the daemon. What happened to machines and volumes is in "argon events".`,
		Example: `  argon logs
  argon logs s2 -f
  argon logs s2 --since 1h
  argon logs -n 20
  argon logs s2 -o json | jq -r .line`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.complete(serverNames),
	}
	f := addFormat(cmd)
	cmd.Flags().BoolVarP(&req.Follow, "follow", "f", false, "go on with new lines")
	cmd.Flags().Uint32VarP(&req.Lines, "lines", "n", 100, "show the last so many; 0: all, as with --since")
	cmd.Flags().Var(&since, "since", "only what was logged after this `TIME`: how long ago, such as 1h, or a date with or without a time")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		if len(args) > 0 {
			req.Server = args[0]
		}
		req.Since = since.at(a.now())
		if req.Since != nil && !cmd.Flags().Changed("lines") {
			req.Lines = 0 // the time says how much
		}
		stream, err := c.Servers.ReadLog(ctx, connect.NewRequest(req))
		if err != nil {
			return err
		}
		defer stream.Close()
		for stream.Receive() {
			for _, line := range stream.Msg().GetLines() {
				if err := a.printLogLine(*f, line); err != nil {
					return err
				}
			}
		}
		if ctx.Err() != nil {
			return nil // interrupted, which is the normal end
		}
		return stream.Err()
	})
	return cmd
}

func (a *app) printLogLine(f format, line string) error {
	if f == formatTable {
		_, err := fmt.Fprintln(a.out, line)
		return err
	}
	return a.printOneOfMany(f, map[string]string{"line": line})
}
