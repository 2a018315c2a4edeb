package e2e_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// A machine leaves as an OVA and as a qcow2 image, and comes back from each, and
// from the formats of others, with what was on its disk.
func TestMachineTransfer(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
	w := c.Watch(port, home)
	counts(c, w, 5)
	other := c.Other(home.Name)
	dir := t.TempDir()
	ova, qcow := filepath.Join(dir, "m.ova"), filepath.Join(dir, "m.qcow2")
	if out := c.ArgonFails(other, "machine", "export", machine, ova); !strings.Contains(out, "stop it first") {
		t.Errorf("one that runs:\n%s", out)
	}
	c.Argon(other, "machine", "stop", machine)
	w.Stop()
	last := w.Highest()
	c.Argon(other, "machine", "export", machine, ova)
	c.Argon(other, "machine", "export", machine, qcow)
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", qcow)
	vmdk, vhdx := filepath.Join(dir, "m.vmdk"), filepath.Join(dir, "m.vhdx")
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "vmdk", qcow, vmdk)
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "vhdx", qcow, vhdx)

	c.Argon(home, "machine", "import", "from-ova", ova)
	show := c.Argon(other, "machine", "show", "from-ova", "-o", "json")
	if !strings.Contains(show, `"134217728"`) {
		t.Errorf("the OVA's memory is lost:\n%s", show)
	}
	c.Argon(other, "machine", "import", "two", vmdk, vhdx, "--memory", "128MiB")
	if show := c.Argon(other, "machine", "show", "two"); !strings.Contains(show, "two, two-2") {
		t.Errorf("its disks:\n%s", show)
	}
	for _, name := range []string{"from-ova", "two"} {
		c.Argon(other, "machine", "start", name)
		con := console(t, c, other, name)
		con.hear("boot, counter was ")
		c.Argon(other, "machine", "stop", name, "--force")
		if found := boots(t, con.out.Bytes()); found < last {
			t.Errorf("%s found %d, %d was acknowledged", name, found, last)
		}
	}

	// What can't be imported leaves nothing behind.
	before := everything(c, other)
	whole, err := os.ReadFile(vmdk)
	must(t, err)
	cut := filepath.Join(dir, "cut.vmdk")
	must(t, os.WriteFile(cut, whole[:len(whole)-5000], 0o600))
	for _, args := range [][]string{{cut}, {vmdk, cut}, {vmdk, filepath.Join(dir, "none")}} {
		out := c.ArgonFails(other, append([]string{"machine", "import", "bad"}, args...)...)
		if strings.Count(strings.TrimSpace(out), "\n") > 0 {
			t.Errorf("%v:\n%s", args, out)
		}
	}
	if after := everything(c, other); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// boots is what a guest found when it booted last.
func boots(t *testing.T, printed []byte) uint64 {
	t.Helper()
	found := regexp.MustCompile(`boot, counter was (\d+)\s`).FindAllSubmatch(printed, -1)
	if len(found) == 0 {
		t.Fatalf("it says nothing of a boot:\n%s", printed)
	}
	n, err := strconv.ParseUint(string(found[len(found)-1][1]), 10, 64)
	must(t, err)
	return n
}
