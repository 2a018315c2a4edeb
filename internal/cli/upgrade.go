package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) upgradeCommand() *cobra.Command {
	return group("upgrade", "Help with rolling an upgrade over the cluster", "  argon upgrade check",
		a.upgradeCheckCommand())
}

func (a *app) upgradeCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say whether the daemon of the next server may be replaced",
		Long: `Says whether the daemon of one more server may be replaced now: every server is
alive, every volume is healthy, and enough servers vote. Says in what order, and
which versions run. Fails, with the reasons, while it should wait.`,
		Example: "  argon upgrade check && ssh s2 systemctl reload argon",
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		s, err := client.Call(ctx, c.Cluster.Status, &argonv1.StatusRequest{})
		if err != nil {
			return err
		}
		why, order := mustWait(s), upgradeOrder(s)
		if *f != formatTable {
			err = writeData(a.out, *f, map[string]any{"ready": len(why) == 0, "reasons": append([]string{}, why...), "order": order})
		}
		if len(why) > 0 {
			return errors.Join(err, errors.New("wait with the next server: "+strings.Join(why, "; ")))
		}
		if *f == formatTable {
			fmt.Fprintln(a.out, "the next server may follow")
			return writeTable(a.out, isColored(a.out), order, upgradeColumns)
		}
		return err
	})
	return cmd
}

// mustWait says what speaks against taking another server's daemon away now.
func mustWait(s *argonv1.StatusResponse) []string {
	var why []string
	if s.GetState() != "ready" {
		why = append(why, firstOf(s.GetDetail(), "this server is "+s.GetState()))
	}
	for _, v := range s.GetServers() {
		if !v.GetAlive() {
			why = append(why, fmt.Sprintf("server %s is down", v.GetServer().GetMeta().GetName()))
		}
	}
	if n := s.GetVolumesDegraded(); n > 0 {
		why = append(why, fmt.Sprintf("not healthy: %d of %s: see `argon volume ls`", n, english.Plural(int(s.GetVolumesTotal()), "volume", "")))
	}
	if s.GetLeaderId() == "" {
		why = append(why, "nobody leads the cluster")
	}
	return why
}

// upgradeStep is a server in the order to go by.
type upgradeStep struct {
	Server  string `json:"server"`
	Version string `json:"version"`
	Leads   bool   `json:"leads"`
}

var upgradeColumns = []column[upgradeStep]{
	{"server", func(s upgradeStep) cell { return plain(s.Server) }},
	{"version", func(s upgradeStep) cell { return plain(s.Version) }},
	{"order", func(s upgradeStep) cell {
		if s.Leads {
			return plain("last: it leads")
		}
		return plain("")
	}},
}

// upgradeOrder lists the servers in the order to go by, the leader last.
func upgradeOrder(s *argonv1.StatusResponse) []upgradeStep {
	steps, last := []upgradeStep{}, []upgradeStep{}
	for _, v := range s.GetServers() {
		m := v.GetServer()
		step := upgradeStep{Server: m.GetMeta().GetName(), Version: m.GetVersion(), Leads: m.GetMeta().GetId() == s.GetLeaderId()}
		if step.Leads {
			last = append(last, step)
			continue
		}
		steps = append(steps, step)
	}
	return append(steps, last...)
}
