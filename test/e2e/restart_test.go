package e2e_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// Every daemon of a cluster is replaced, one after the other, first in order, as
// an upgrade does, then by SIGKILL, while a guest writes: its process and its
// uptime go on, its console comes back by itself, its port too.
func TestEveryDaemonRestarts(t *testing.T) {
	// A daemon that was killed has a lease's time to return, on any machine.
	c := harness.Up(t, devcluster.Options{Servers: 3, Settings: &argonv1.Settings{LeaseSeconds: 30}})
	home := counting(t, c, "2")
	other := c.Other(home.Name)
	w := c.Watch(port, c.Servers()...)
	counts(c, w, 5)
	boot, guest := lastBoot(t, w), guestPIDs(t, home)
	con := console(t, c, other, machine)
	con.hear("boot, counter was 0")

	for how, restart := range map[string]func(*devcluster.Server) error{
		"in order": func(s *devcluster.Server) error { return s.Reload() },
		"killed":   func(s *devcluster.Server) error { return s.Kill(t.Context(), devcluster.Daemon) },
	} {
		for _, s := range c.Servers() {
			c.Healthy(other, machine)
			replaceDaemon(c, s, restart)
			counts(c, w, 10)
			r, _ := w.Last()
			t.Logf("%s, %s: the longest stall so far is %v", s.Name, how, r.Stall)
		}
	}
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}
	if now := guestPIDs(t, home); !slices.Equal(now, guest) {
		t.Errorf("the guest's process was %v, is %v", guest, now)
	}
	// What a server logs is read on any other; the last words of daemons are in it.
	if log := c.Argon(other, "logs", home.Name, "-n", "0"); !strings.Contains(log, "the daemon has ended") || !strings.Contains(log, "msg=serving") {
		t.Errorf("the log of %s is %q", home.Name, log)
	}
	con.say("echo $((6 * 7)) is what it says\n")
	con.hear("42 is what it says")
	c.Healthy(other, machine)
}

// replaceDaemon waits until another daemon serves.
func replaceDaemon(c *harness.Cluster, s *devcluster.Server, restart func(*devcluster.Server) error) {
	c.T.Helper()
	before, err := s.PIDs(devcluster.Daemon)
	must(c.T, err)
	began := time.Now()
	must(c.T, restart(s))
	c.Eventually("another daemon serves on "+s.Name, func() bool {
		now, err := s.PIDs(devcluster.Daemon)
		if err != nil || len(now) != 1 || slices.Equal(now, before) {
			return false
		}
		res, err := c.Status(s)
		return err == nil && res.GetState() == "ready"
	})
	c.T.Logf("%s: another daemon serves after %v", s.Name, time.Since(began).Round(time.Millisecond))
}
