package cli

import (
	"context"
	"encoding/json"
	"errors"
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
	follow       bool
	limit        uint32
	since, until moment
	kind, name   string
	server       string
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
  argon events --on s1 --since 2026-11-26 --until 2h
  argon events -f -o json | jq -r .reason`,
		Aliases: []string{"event"},
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.Flags().BoolVarP(&flags.follow, "follow", "f", false, "go on with new events")
	cmd.Flags().Uint32VarP(&flags.limit, "limit", "n", 100, "show the newest so many")
	cmd.Flags().Var(&flags.since, "since", "only what happened after this `TIME`: how long ago, such as 1h, or a date with or without a time")
	cmd.Flags().Var(&flags.until, "until", "only what happened before this `TIME`")
	cmd.Flags().StringVar(&flags.server, "on", "", "only what this `SERVER` saw, or what is about it")
	a.completeFlag(cmd, "on", serverNames)
	cmd.Flags().StringVar(&flags.kind, "kind", "", "only about this kind: "+strings.Join(eventKinds, ", "))
	cmd.Flags().StringVar(&flags.name, "name", "", "only about the one of this name")
	completeWords(cmd, "kind", eventKinds...)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case flags.kind != "" && !slices.Contains(eventKinds, flags.kind):
			return usage(cmd, "--kind %q is none of %s", flags.kind, strings.Join(eventKinds, ", "))
		case flags.limit == 0 && !flags.follow:
			return usage(cmd, "--limit 0 shows nothing without --follow")
		}
		return errors.Join(exclusive(cmd, "follow", "since"), exclusive(cmd, "follow", "until"))
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		if flags.follow {
			return a.followEvents(ctx, c, flags, *f)
		}
		req := &argonv1.ListEventsRequest{Limit: flags.limit, Kind: flags.kind, Name: flags.name, Server: flags.server}
		req.Since, req.Until = flags.since.at(a.now()), flags.until.at(a.now())
		res, err := client.Call(ctx, c.Events.ListEvents, req)
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetEvents(), eventColumns)
	})
	return cmd
}

// moment is a flag's value: how long ago, or a time of this host's zone.
type moment struct {
	ago  time.Duration
	time time.Time
	text string
}

// momentLayouts are how a time can be written.
var momentLayouts = []string{time.RFC3339, timeLayout, "2006-01-02T15:04:05", "2006-01-02 15:04", "2006-01-02"}

func (m *moment) String() string { return m.text }
func (m *moment) Type() string   { return "TIME" }

func (m *moment) Set(s string) error {
	if ago, err := time.ParseDuration(s); err == nil && ago >= 0 {
		*m = moment{ago: ago, text: s}
		return nil
	}
	for _, layout := range momentLayouts {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			*m = moment{time: t, text: s}
			return nil
		}
	}
	return fmt.Errorf("%q: write how long ago, such as 1h, or a time such as \"2026-11-26 00:07\"", s)
}

// at is nil if the flag was not given.
func (m *moment) at(now time.Time) *timestamppb.Timestamp {
	switch {
	case m.text == "":
		return nil
	case !m.time.IsZero():
		return timestamppb.New(m.time)
	}
	return timestamppb.New(now.Add(-m.ago))
}

// eventKinds are the kinds of what events are about.
var eventKinds = []string{"server", "volume", "machine", "image", "catalog"}

// followEvents prints until interrupted, which is its normal end.
func (a *app) followEvents(ctx context.Context, c *client.Client, flags eventFlags, f format) error {
	stream, err := c.Events.WatchEvents(ctx, connect.NewRequest(&argonv1.WatchEventsRequest{
		Backlog: flags.limit, Kind: flags.kind, Name: flags.name, Server: flags.server,
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
	return a.printOneOfMany(f, data)
}

// printOneOfMany prints data that more follow: a document of YAML, or a line of JSON.
func (a *app) printOneOfMany(f format, data any) error {
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
