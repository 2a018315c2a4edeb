package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// This file: `argon volume show`.

func (a *app) volumeShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one volume with its replicas",
		Example:           "  argon volume show db",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(volumeNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Volumes.GetVolume, &argonv1.GetVolumeRequest{Name: args[0]})
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printData(a, *f, res.GetVolume())
		}
		return a.showVolume(ctx, c, res.GetVolume())
	})
	return cmd
}

func (a *app) showVolume(ctx context.Context, c *client.Client, v *argonv1.VolumeView) error {
	byID, err := serversByID(ctx, c)
	if err != nil {
		return err
	}
	colored := isColored(a.out)
	if err := writeFields(a.out, colored, v, append(a.volumeColumns(), a.volumeDetails(byID)...)); err != nil {
		return err
	}
	for _, line := range v.GetActivity() {
		fmt.Fprintln(a.out, "now: "+line)
	}
	fmt.Fprintln(a.out)
	if err := writeTable(a.out, colored, v.GetVolume().GetReplicas(), a.replicaColumns(v, byID)); err != nil {
		return err
	}
	if len(v.GetVolume().GetSnapshots()) == 0 {
		return nil
	}
	fmt.Fprintln(a.out)
	res, err := client.Call(ctx, c.Snapshots.ListSnapshots, &argonv1.ListSnapshotsRequest{Volume: v.GetVolume().GetMeta().GetName()})
	if err != nil {
		return err
	}
	return writeTable(a.out, colored, res.GetSnapshots(), a.snapshotColumns())
}

func (a *app) replicaColumns(v *argonv1.VolumeView, byID map[string]string) []column[*argonv1.Replica] {
	type replica = *argonv1.Replica
	usage := func(r replica) *argonv1.ReplicaUsage {
		for _, u := range v.GetUsage() {
			if u.GetReplicaId() == r.GetId() {
				return u
			}
		}
		return nil
	}
	bytes := func(u *argonv1.ReplicaUsage, n uint64) cell {
		if u == nil {
			return plain("")
		}
		return plain(formatBytes(n))
	}
	return []column[replica]{
		{"replica", func(r replica) cell { return number(r.GetId()) }},
		{"server", func(r replica) cell { return plain(firstOf(byID[r.GetServerId()], r.GetServerId())) }},
		{"state", func(r replica) cell {
			c := cell{enumWord(r.GetState(), "REPLICA_STATE_"), yellow}
			if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
				c.color = green
			}
			return c
		}},
		{"for", func(r replica) cell { return plain(formatAge(a.now(), r.GetSince())) }},
		{"used", func(r replica) cell { return bytes(usage(r), usage(r).GetUsedBytes()) }},
		{"snapshots", func(r replica) cell { return bytes(usage(r), usage(r).GetSnapshotBytes()) }},
		{"reason", func(r replica) cell { return plain(r.GetReason()) }},
	}
}

// volumeDetails are shown of a single volume only.
func (a *app) volumeDetails(servers map[string]string) []column[*argonv1.VolumeView] {
	type view = *argonv1.VolumeView
	return []column[view]{
		{"holder", func(v view) cell {
			id := v.GetVolume().GetAttachment().GetServerId()
			return plain(firstOf(servers[id], id))
		}},
		{"epoch", func(v view) cell { return number(v.GetVolume().GetEpoch()) }},
		{"condition", func(v view) cell {
			return plain(strings.TrimSpace(v.GetStatus().GetCondition() + " " + v.GetStatus().GetDetail()))
		}},
		{"used", func(v view) cell { return plain(usedBytes(v)) }},
		{"base", func(v view) cell { return plain(v.GetBase()) }},
		{"clones", func(v view) cell { return plain(strings.Join(v.GetClones(), ", ")) }},
		{"scrub", func(v view) cell { return a.scrubState(v.GetVolume().GetScrub()) }},
		{"advice", func(v view) cell { return plain(v.GetAdvice()) }},
		{"id", func(v view) cell { return plain(v.GetVolume().GetMeta().GetId()) }},
	}
}

// usedBytes sums up what the volume takes on all servers.
func usedBytes(v *argonv1.VolumeView) string {
	if len(v.GetUsage()) == 0 {
		return ""
	}
	var used, snapshots uint64
	for _, u := range v.GetUsage() {
		used += u.GetUsedBytes()
		snapshots += u.GetSnapshotBytes()
	}
	text := formatBytes(used) + " on all servers"
	if snapshots > 0 {
		text += ", of that " + formatBytes(snapshots) + " for snapshots only"
	}
	return text
}

func (a *app) scrubState(s *argonv1.Scrub) cell {
	switch {
	case s.GetFinishedAt() == nil:
		return plain("never")
	case s.GetUnclear() > 0:
		return cell{fmt.Sprintf("%s ago: %s, nothing tells which copy is right", formatAge(a.now(), s.GetFinishedAt()), regionsDiffer(s.GetUnclear())), red}
	case s.GetRepaired() > 0:
		return cell{fmt.Sprintf("%s ago: %s repaired", formatAge(a.now(), s.GetFinishedAt()), english.Plural(int(s.GetRepaired()), "region", "")), yellow}
	}
	return cell{formatAge(a.now(), s.GetFinishedAt()) + " ago: all equal", green}
}

func regionsDiffer(n uint64) string {
	if n == 1 {
		return "1 region differs"
	}
	return fmt.Sprintf("%d regions differ", n)
}
