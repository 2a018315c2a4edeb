package e2e_test

import (
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// UEFI starts a system that only it can start, from the fallback path of its
// disk's EFI system partition: its settings are made anew each time.
func TestUEFI(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 1})
	s := c.S(1)
	c.Argon(s, "image", "import", "uefi", harness.UEFIImage(t))
	c.Argon(s, "machine", "create", machine, "--image", "uefi", "--replicas", "1", "--firmware", "uefi",
		"--memory", "256MiB", "--publish", "8080:80", "--stop-timeout", "20s")
	w := c.Watch(port, s)
	counts(c, w, 5)
	con := console(t, c, s, machine)
	con.say("ls -d /sys/firmware/efi\n")
	con.hear("\n/sys/firmware/efi")
	c.Argon(s, "machine", "stop", machine)
	boot := lastBoot(t, w)
	c.Argon(s, "machine", "start", machine)
	c.Eventually("it boots again", func() bool {
		now, _ := w.Last()
		return now.Boot != boot
	})
	counts(c, w, 5)
}
