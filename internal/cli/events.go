package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// eventFlags select what is shown.
type eventFlags struct {
	follow     bool
	limit      uint32
	since      time.Duration
	kind, name string
}

func (a *app) eventsCommand() *cobra.Command {
	var flags eventFlags
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what happened in the cluster",
		Long: `Shows what happened in the cluster, oldest first. With --follow it goes on until
interrupted; -o json then prints one event a line.`,
		Example: `  argon events
  argon events -f
  argon events --kind machine --name web --since 1h
  argon events -f -o json | jq -r .reason`,
		Aliases: []string{"event"},
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.Flags().BoolVarP(&flags.follow, "follow", "f", false, "go on with new events")
	cmd.Flags().Uint32VarP(&flags.limit, "limit", "n", 100, "show the newest so many")
	cmd.Flags().DurationVar(&flags.since, "since", 0, "only what happened in this time, such as 1h")
	cmd.Flags().StringVar(&flags.kind, "kind", "", "only about this kind: "+strings.Join(eventKinds, ", "))
	cmd.Flags().StringVar(&flags.name, "name", "", "only about the one of this name")
	completeWords(cmd, "kind", eventKinds...)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case flags.kind != "" && !slices.Contains(eventKinds, flags.kind):
			return usage(cmd, "--kind %q is none of %s", flags.kind, strings.Join(eventKinds, ", "))
		case flags.since < 0:
			return usage(cmd, "--since %v: write how long ago, such as 1h", flags.since)
		case flags.limit == 0 && !flags.follow:
			return usage(cmd, "--limit 0 shows nothing without --follow")
		}
		return exclusive(cmd, "follow", "since")
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		if flags.follow {
			return a.followEvents(ctx, c, flags, *f)
		}
		req := &argonv1.ListEventsRequest{Limit: flags.limit, Kind: flags.kind, Name: flags.name}
		if flags.since > 0 {
			req.Since = timestamppb.New(a.now().Add(-flags.since))
		}
		res, err := client.Call(ctx, c.Events.ListEvents, req)
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetEvents(), eventColumns)
	})
	return cmd
}

// eventKinds are the kinds of what events are about.
var eventKinds = []string{"server", "volume", "machine", "image", "catalog"}

// followEvents prints until interrupted, which is its normal end.
func (a *app) followEvents(ctx context.Context, c *client.Client, flags eventFlags, f format) error {
	stream, err := c.Events.WatchEvents(ctx, connect.NewRequest(&argonv1.WatchEventsRequest{
		Backlog: flags.limit, Kind: flags.kind, Name: flags.name,
	}))
	if err != nil {
		return err
	}
	defer stream.Close()
	for first := true; stream.Receive(); first = false {
		if first && f == formatTable {
			if err := a.printEventLine(nil); err != nil {
				return err
			}
		}
		if err := a.printEvent(stream.Msg().GetEvent(), f); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return stream.Err()
}

func (a *app) printEvent(e *argonv1.Event, f format) error {
	if f == formatTable {
		return a.printEventLine(e)
	}
	data, err := toJSON(e)
	if err != nil {
		return err
	}
	if f == formatYAML {
		fmt.Fprintln(a.out, "---")
		return writeData(a.out, f, data)
	}
	return json.NewEncoder(a.out).Encode(data)
}

// eventWidths are those of columns whose later lines are not known yet.
var eventWidths = []int{len(timeLayout), len("severity"), len("machine"), 16, len("replica-out-of-sync")}

// printEventLine prints one event of a table that goes on; nil: the table's head.
func (a *app) printEventLine(e *argonv1.Event) error {
	line := make([]cell, len(eventColumns))
	for i, c := range eventColumns {
		line[i] = cell{strings.ToUpper(c.name), bold}
		if e != nil {
			line[i] = c.value(e)
		}
	}
	return writeAligned(a.out, isColored(a.out), [][]cell{line}, eventWidths...)
}

var eventColumns = []column[*argonv1.Event]{
	{"time", func(e *argonv1.Event) cell { return plain(formatTime(e.GetTime())) }},
	{"severity", eventSeverity},
	{"kind", func(e *argonv1.Event) cell { return plain(e.GetKind()) }},
	{"name", func(e *argonv1.Event) cell { return plain(firstOf(e.GetSubjectName(), e.GetSubjectId())) }},
	{"reason", func(e *argonv1.Event) cell { return plain(e.GetReason()) }},
	{"message", func(e *argonv1.Event) cell { return plain(e.GetMessage()) }},
}

func eventSeverity(e *argonv1.Event) cell {
	c := plain(enumWord(e.GetSeverity(), "SEVERITY_"))
	switch e.GetSeverity() {
	case argonv1.Severity_SEVERITY_WARNING:
		c.color = yellow
	case argonv1.Severity_SEVERITY_ERROR:
		c.color = red
	}
	return c
}
