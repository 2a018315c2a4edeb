package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// drainWord is what a person types to have machines moved.
const drainWord = "move them"

func (a *app) serverDrainCommand() *cobra.Command {
	req := &argonv1.DrainServerRequest{}
	var wait waitFlags
	var sure confirmFlag
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Move machines off a server, and place none on it",
		Long: `Records that a server is drained: nothing is placed on it, and its machines are
moved away while they run, a few at a time. One that can't be moved so is shut
down there and started elsewhere. A machine that fits nowhere else stays and
runs. With --evacuate replicas and copies of images leave as well: each goes
when enough others are in sync, never the last one. The server stays drained
until it is activated.`,
		Example: `  argon server drain s2 --yes             # before maintenance
  argon server drain s2 --evacuate        # before it is removed
  argon server activate s2`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(serverNames),
	}
	f := addFormat(cmd)
	cmd.Flags().BoolVar(&req.Evacuate, "evacuate", false, "move replicas and copies of images, too")
	cmd.Flags().Uint32Var(&req.Parallel, "parallel", 2, "how many machines are moved at once")
	wait.addBounded(cmd, time.Hour)
	sure.add(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		before, err := client.Call(ctx, c.Servers.GetServer, &argonv1.GetServerRequest{Name: req.GetName()})
		if err != nil {
			return err
		}
		if n := before.GetServer().GetMachines(); n > 0 {
			what := fmt.Sprintf("what runs on server %s (machines: %d) is moved while it runs; what can't be is shut down there and started elsewhere", req.GetName(), n)
			if err := a.confirm(ctx, sure, []string{what}, drainWord); err != nil {
				return fmt.Errorf("draining server %s: %w", req.GetName(), err)
			}
		}
		res, err := client.Call(ctx, c.Servers.DrainServer, req)
		if err != nil {
			return err
		}
		v, err := a.waitDrained(ctx, c, res.GetServer(), wait)
		if err != nil {
			return err
		}
		return printOne(a, *f, v, a.serverColumns())
	})
	return cmd
}

// waitDrained waits until nothing is to leave the server any more, and shows what
// is.
func (a *app) waitDrained(ctx context.Context, c *client.Client, v *argonv1.ServerView, wait waitFlags) (*argonv1.ServerView, error) {
	name := v.GetServer().GetMeta().GetName()
	p := a.startProgress("draining server " + name)
	defer p.Stop()
	limit := time.NewTimer(wait.timeout)
	defer limit.Stop()
	for !wait.noWait && len(v.GetDraining()) > 0 {
		left := v.GetDraining()
		if v.GetServer().GetDrain() == nil {
			return nil, fmt.Errorf("server %s: somebody has activated it", name)
		}
		p.Set(fmt.Sprintf("server %s: %d to go: %s", name, len(left), left[0]))
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-limit.C:
			return nil, fmt.Errorf("server %s is not empty after %v: %s", name, wait.timeout, strings.Join(left, "; "))
		case <-time.After(pollEvery):
		}
		res, err := client.Call(ctx, c.Servers.GetServer, &argonv1.GetServerRequest{Name: name})
		if err != nil && !transient(err) {
			return nil, err
		}
		if err == nil {
			v = res.GetServer()
		}
	}
	return v, nil
}

func (a *app) serverActivateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "activate NAME",
		Short:             "Let a drained server take machines and replicas again",
		Example:           "  argon server activate s2",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(serverNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Servers.ActivateServer, &argonv1.ActivateServerRequest{Name: args[0]})
		if err != nil {
			return err
		}
		return printOne(a, *f, res.GetServer(), a.serverColumns())
	})
	return cmd
}
