package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// This file: `argon server ls|show|rm`. The daemon itself is in server.go.

func (a *app) serverListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the servers of the cluster",
		Example: `  argon server ls
  argon server ls -o json | jq -r '.[] | select(.alive | not) | .server.meta.name'`,
		Args: noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Servers.ListServers, &argonv1.ListServersRequest{})
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetServers(), a.serverColumns())
	})
	return cmd
}

func (a *app) serverShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one server",
		Example:           "  argon server show s1",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(serverNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Servers.GetServer, &argonv1.GetServerRequest{Name: args[0]})
		if err != nil {
			return err
		}
		return showOne(a, *f, res.GetServer(), a.serverColumns(), serverDetails)
	})
	return cmd
}

func (a *app) serverRemoveCommand() *cobra.Command {
	var force bool
	var sure confirmFlag
	cmd := &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove servers from the cluster",
		Long: `Removes servers from the cluster. Refused while one that is alive has machines
or replicas: drain it first. One that is lost is removed if nothing is lost with
it; --force says what would be, and removes it all the same.`,
		Example: `  argon server drain s4 --evacuate && argon server rm s4
  argon server rm s4 --force   # it burned down`,
		Args:              takesSome("NAME"),
		ValidArgsFunction: a.completeEach(serverNames),
	}
	cmd.Flags().BoolVar(&force, "force", false, "remove a lost server with what only it had")
	sure.add(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		return a.forEach(args, "server %s removed", func(name string) error {
			if force {
				if err := a.confirmRemoval(ctx, c, sure, name); err != nil {
					return err
				}
			}
			_, err := client.Call(ctx, c.Servers.RemoveServer, &argonv1.RemoveServerRequest{Name: name, Force: force})
			return err
		})
	})
	return cmd
}

// confirmRemoval says what the removal by force costs, if anything.
func (a *app) confirmRemoval(ctx context.Context, c *client.Client, sure confirmFlag, name string) error {
	res, err := client.Call(ctx, c.Servers.GetServer, &argonv1.GetServerRequest{Name: name})
	if err != nil {
		return err
	}
	costs := res.GetServer().GetRemovalCosts()
	if len(costs) == 0 || res.GetServer().GetAlive() {
		return nil // nothing to ask, or it will be refused
	}
	if err := a.confirm(ctx, sure, append([]string{"with server " + name + " goes what it has:"}, costs...), name); err != nil {
		return fmt.Errorf("removing server %s: %w", name, err)
	}
	return nil
}

// serversByID are the servers' names by their ids.
func serversByID(ctx context.Context, c *client.Client) (map[string]string, error) {
	res, err := client.Call(ctx, c.Servers.ListServers, &argonv1.ListServersRequest{})
	names := make(map[string]string)
	for _, s := range res.GetServers() {
		names[s.GetServer().GetMeta().GetId()] = s.GetServer().GetMeta().GetName()
	}
	return names, err
}

func (a *app) serverColumns() []column[*argonv1.ServerView] {
	type view = *argonv1.ServerView
	return []column[view]{
		{"name", func(v view) cell { return plain(v.GetServer().GetMeta().GetName()) }},
		{"state", func(v view) cell {
			switch {
			case !v.GetAlive():
				return cell{"lost", red}
			case len(v.GetDraining()) > 0:
				return cell{"draining", yellow}
			case v.GetServer().GetDrain() != nil:
				return cell{"drained", yellow}
			case badDisk(v.GetServer()) != "":
				return cell{"bad disk", red}
			}
			return cell{"alive", green}
		}},
		{"address", func(v view) cell { return plain(v.GetServer().GetAddress()) }},
		{"zone", func(v view) cell { return plain(v.GetServer().GetZone()) }},
		{"role", func(v view) cell { return plain(serverRole(v.GetServer())) }},
		{"machines", func(v view) cell { return number(v.GetMachines()) }},
		{"replicas", func(v view) cell { return number(v.GetReplicas()) }},
		{"cpus", func(v view) cell {
			return plain(fmt.Sprintf("%d/%d", v.GetAllocated().GetCpus(), v.GetServer().GetCapacity().GetCpus()))
		}},
		{"memory", func(v view) cell {
			return share(v.GetAllocated().GetMemoryBytes(), v.GetServer().GetCapacity().GetMemoryBytes())
		}},
		{"disk", func(v view) cell {
			return share(v.GetServer().GetUsed().GetDiskBytes(), v.GetServer().GetCapacity().GetDiskBytes())
		}},
		{"age", func(v view) cell { return plain(formatAge(a.now(), v.GetServer().GetMeta().GetCreated())) }},
	}
}

// serverDetails are shown of a single server only.
var serverDetails = []column[*argonv1.ServerView]{
	{"bad disk", func(v *argonv1.ServerView) cell { return cell{badDisk(v.GetServer()), red} }},
	{"volumes", func(v *argonv1.ServerView) cell { return plain(volumesOn(v.GetUsage())) }},
	{"images", func(v *argonv1.ServerView) cell {
		if v.GetUsage() == nil {
			return plain("")
		}
		return plain(formatBytes(v.GetUsage().GetImagesBytes()))
	}},
	{"promised", func(v *argonv1.ServerView) cell {
		return plain(formatBytes(v.GetAllocated().GetDiskBytes()) + ", if all volumes and images here were full")
	}},
	{"acceleration", func(v *argonv1.ServerView) cell {
		if why := v.GetServer().GetAccelerationDetail(); why != "" {
			return cell{v.GetServer().GetAcceleration() + ": " + why, yellow}
		}
		return plain(v.GetServer().GetAcceleration())
	}},
	{"still to leave", func(v *argonv1.ServerView) cell { return plain(strings.Join(v.GetDraining(), "; ")) }},
	{"containment", func(v *argonv1.ServerView) cell { return plain(v.GetServer().GetContainment()) }},
	{"confinement", func(v *argonv1.ServerView) cell { return plain(v.GetServer().GetConfinement()) }},
	{"guests' network", func(v *argonv1.ServerView) cell {
		if why := v.GetServer().GetClosedNetwork(); why != "" {
			return cell{"published ports only, no connections of their own: " + why, yellow}
		}
		return plain("leads outside, not to this host's loopback")
	}},
	{"version", func(v *argonv1.ServerView) cell { return plain(v.GetServer().GetVersion()) }},
	{"ports", func(v *argonv1.ServerView) cell {
		s := v.GetServer()
		return plain(fmt.Sprintf("api %d, data %d, etcd peers %d, etcd clients %d",
			s.GetApiPort(), s.GetDataPort(), s.GetPeerPort(), s.GetEtcdPort()))
	}},
	{"id", func(v *argonv1.ServerView) cell { return plain(v.GetServer().GetMeta().GetId()) }},
}

// badDisk says which disk of a server is not used, and why; empty: none.
func badDisk(s *argonv1.Server) string {
	for _, d := range s.GetDisks() {
		if d.GetProblem() != "" {
			return d.GetPath() + ": " + d.GetProblem()
		}
	}
	return ""
}

// volumesOn sums up what the replicas on a server take.
func volumesOn(u *argonv1.Usage) string {
	if u == nil {
		return ""
	}
	var used, snapshots uint64
	for _, r := range u.GetReplicas() {
		used += r.GetUsedBytes()
		snapshots += r.GetSnapshotBytes()
	}
	if snapshots == 0 {
		return formatBytes(used)
	}
	return formatBytes(used) + ", of that " + formatBytes(snapshots) + " for snapshots only"
}

func serverRole(s *argonv1.Server) string {
	role := enumWord(s.GetVoterRole(), "VOTER_ROLE_")
	if s.GetWitness() {
		return role + ", witness"
	}
	return role
}

func share(used, of uint64) cell {
	if of == 0 {
		return plain("")
	}
	c := plain(formatBytes(used) + "/" + formatBytes(of))
	if used > of/10*9 {
		c.color = yellow
	}
	return c
}

// enumWord is an enum's value as people write it: IN_SYNC is "in-sync".
func enumWord(e fmt.Stringer, prefix string) string {
	word := strings.ToLower(strings.TrimPrefix(e.String(), prefix))
	if word == "unspecified" {
		return ""
	}
	return strings.ReplaceAll(word, "_", "-")
}
