package bench_test

import (
	"context"
	"errors"
	"flag"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var losses = flag.String("losses", "", "the kinds of loss to measure, with commas between; empty: all")

// loss is a way to lose a server, or only what runs on it, and to have it back.
type loss struct {
	name   string
	lose   func(context.Context, *harness.Cluster, *devcluster.Server) error
	recall func(context.Context, *harness.Cluster, *devcluster.Server) error
	// stays: the machine may start again on the same server.
	stays bool
}

func start(ctx context.Context, _ *harness.Cluster, s *devcluster.Server) error { return s.Start(ctx) }

func heal(ctx context.Context, _ *harness.Cluster, s *devcluster.Server) error { return s.Heal(ctx) }

var kinds = []loss{
	{"kill", func(ctx context.Context, _ *harness.Cluster, s *devcluster.Server) error { return s.Kill(ctx) }, start, false},
	{"power", func(ctx context.Context, c *harness.Cluster, s *devcluster.Server) error { return c.PowerCut(ctx, s) }, start, false},
	{"cut", func(ctx context.Context, _ *harness.Cluster, s *devcluster.Server) error { return s.Cut(ctx) }, heal, false},
	{"mute", toOthers((*devcluster.Server).Mute), toOthers((*devcluster.Server).Unmute), false},
	{
		"hang", func(ctx context.Context, _ *harness.Cluster, s *devcluster.Server) error { return s.Pause(ctx) },
		func(_ context.Context, _ *harness.Cluster, s *devcluster.Server) error { return s.Resume() }, false,
	},
	{"qemu", stopGuests, func(context.Context, *harness.Cluster, *devcluster.Server) error { return nil }, true},
}

// stopGuests stops the QEMUs of a server, and nothing else of it.
func stopGuests(_ context.Context, _ *harness.Cluster, s *devcluster.Server) error {
	pids, err := s.PIDs(devcluster.Guests)
	for _, pid := range pids {
		err = errors.Join(err, syscall.Kill(pid, syscall.SIGSTOP))
	}
	return err
}

// toOthers does something to the links from a server to each other one.
func toOthers(do func(s *devcluster.Server, ctx context.Context, to *devcluster.Server) error) func(context.Context, *harness.Cluster, *devcluster.Server) error {
	return func(ctx context.Context, c *harness.Cluster, s *devcluster.Server) error {
		for _, other := range c.Servers() {
			if other == s {
				continue
			}
			if err := do(s, ctx, other); err != nil {
				return err
			}
		}
		return nil
	}
}

func runsElsewhere(b *testing.B, c *harness.Cluster, home *devcluster.Server) bool {
	for _, s := range c.Servers() {
		pids, err := s.PIDs(devcluster.Guests)
		must(b, err)
		if s != home && len(pids) > 0 {
			return true
		}
	}
	return false
}

// BenchmarkLosses loses the server that runs a machine in each way there is,
// -rounds times, and measures until QEMU runs on another one.
func BenchmarkLosses(b *testing.B) {
	harness.NeedRoot(b)
	c := harness.Up(b, devcluster.Options{Servers: 3, Netns: true, Disk: 2 << 30})
	s := c.S(1)
	c.Argon(s, "image", "import", "tiny", harness.TinyImage(b))
	c.Argon(s, "machine", "create", "m", "--image", "tiny", "--memory", "128MiB", "--replicas", "3")
	home := c.ByName(c.Running(s, "m"))
	for _, kind := range kinds {
		if *losses != "" && !slices.Contains(strings.Split(*losses, ","), kind.name) {
			continue
		}
		b.Run(kind.name, func(b *testing.B) {
			c := c.For(b)
			var elsewhere []time.Duration
			for range *rounds {
				c.Healthy(home, "m")
				// One that has just come back tries out what runs guests there.
				c.Eventually("no QEMU runs elsewhere", func() bool { return !runsElsewhere(b, c, home) })
				before, err := home.PIDs(devcluster.Guests)
				must(b, err)
				lost := time.Now()
				must(b, kind.lose(b.Context(), c, home))
				next := anotherGuest(b, c, func(s *devcluster.Server, pid int) bool {
					return (s != home || kind.stays) && !slices.Contains(before, pid)
				})
				elsewhere = append(elsewhere, time.Since(lost))
				b.Logf("%s is lost: on %s after %.2f s", home.Name, next.Name, time.Since(lost).Seconds())
				must(b, kind.recall(b.Context(), c, home))
				c.Running(next, "m")
				c.Healthy(next, "m")
				home = next
			}
			report(b, kind.name+" → QEMU runs elsewhere", elsewhere)
		})
	}
}
