package e2e_test

import (
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// A machine goes round the servers while it runs, its port and its console with
// it: it is never restarted, and loses nothing.
func TestMigrate(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
	w := c.Watch(port, c.Servers()...)
	counts(c, w, 5)
	boot := lastBoot(t, w)
	for range 4 {
		next := c.Other(home.Name)
		if c.S(1) != home && c.S(2) != home {
			next = c.S(2)
		}
		out := c.Argon(home, "machine", "migrate", machine, "--to", next.Name)
		t.Logf("%s", out)
		if on := c.Running(home, machine); on != next.Name {
			t.Fatalf("it runs on %s, not on %s", on, next.Name)
		}
		counts(c, w, 5)
		oneCopy(c)
		con := console(t, c, home, machine)
		con.say("echo $((6 * 7)) is what it says\n")
		con.hear("42 is what it says")
		if now := lastBoot(t, w); now != boot {
			t.Fatalf("the guest was restarted: boot %s, then %s: %s", boot, now, con.out.Bytes())
		}
		home = next
	}
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}
	c.Healthy(home, machine)
	t.Logf("%s", c.Argon(home, "machine", "show", machine))
}
