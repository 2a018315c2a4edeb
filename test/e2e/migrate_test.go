package e2e_test

import (
	"flag"
	"slices"
	"strings"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var moves = flag.Int("moves", 3, "how often TestMigrate moves its machine")

// A machine that counts and hashes its disk goes round the servers while it runs,
// and daemons are replaced in between: it is never restarted, the count never goes
// back, and each block is what was written to it.
func TestMigrate(t *testing.T) {
	// A daemon that is replaced has a lease's time to return, on any machine.
	c := harness.Up(t, devcluster.Options{Servers: 3, Settings: &argonv1.Settings{LeaseSeconds: 30}})
	home := counting(t, c, "2", "--disk", harness.HasherDisk)
	w := c.Watch(port, c.Servers()...)
	counts(c, w, 5)
	boot, h := lastBoot(t, w), c.Hash(home, machine, port)
	// It is given a disk and a card while it runs, which go round with it.
	first := c.Other(home.Name)
	c.Argon(first, "volume", "create", "extra", "--size", "16MiB")
	c.Argon(first, "machine", "set", machine, "--attach", "extra", "--networks", "2")
	con := console(t, c, first, machine)
	con.say("until [ -b /dev/vdb ] && ifconfig eth1; do sleep 1; done; echo moves along | dd of=/dev/vdb conv=fsync; echo disk $((6 * 8))\n")
	con.hear("disk 48")
	before := h.Now()
	var all []harness.Move
	ups := []time.Duration{before.Up} // before the first move, and after each
	for n := range *moves {
		next := c.S((slices.Index(c.Servers(), home)+1)%3 + 1)
		all = append(all, c.Migrate(c.S(n%3+1), machine, next))
		home = next
		now := h.Now()
		c.Eventually("the guest hashes on", func() bool { return h.Now().Blocks > now.Blocks+16 })
		counts(c, w, 5)
		if now = h.Now(); now.Wrong > 0 || now.Up < before.Up {
			t.Fatalf("after %d moves: %+v, before the last one %+v", n+1, now, before)
		}
		before, ups = now, append(ups, now.Up)
		if now := lastBoot(t, w); now != boot {
			t.Fatalf("the guest was restarted by move %d: boot %s, then %s", n+1, boot, now)
		}
		oneCopy(c)
		// The next move is while what this server missed is being copied to it.
		replaceDaemon(c, c.S(n%3+1), func(s *devcluster.Server) error { return s.Reload() })
	}
	c.Healthy(home, machine)
	con = console(t, c, c.Other(home.Name), machine)
	con.say("echo $((6 * 7)) is what it says; head -n 1 /dev/vdb; echo goes on | dd of=/dev/vdb conv=fsync; head -n 1 /dev/vdb\n")
	con.hear("42 is what it says")
	con.hear("moves along\r\n")
	con.hear("goes on\r\n")
	// The guest lets go of both; the disk is another's then.
	c.Argon(home, "machine", "set", machine, "--detach", "extra", "--networks", "1")
	con.say("while [ -b /dev/vdb ] || ifconfig eth1 2>/dev/null; do sleep 1; done; echo let go of $((6 * 9))\n")
	con.hear("let go of 54")
	c.Eventually("its disk is free", func() bool { return !strings.Contains(c.Argon(home, "machine", "show", machine), "extra") })
	c.Argon(home, "machine", "create", "next", "--volume", "extra", "--stopped")
	counts(c, w, 5)
	blocks := h.Blocks()
	for i, m := range all {
		t.Logf("it stood still for %v, by QEMU for %v; by the guest's clock a block took %v at most; %v from the order until it went on",
			m.Still.Round(time.Millisecond), m.QEMU, harness.Longest(blocks, ups[i], ups[i+1]), m.Took.Round(time.Millisecond))
	}
	t.Logf("%d blocks were hashed", before.Blocks)
}
