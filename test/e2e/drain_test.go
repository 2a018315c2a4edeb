package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/cgroup"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// A machine's shares change while it runs; then its server is drained: the machine
// goes elsewhere, and runs on.
func TestSharesAndDrain(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
	other := c.Other(home.Name)
	w := c.Watch(port, other)
	counts(c, w, 5)
	guest := guestPIDs(t, home)

	if line := c.ArgonFails(other, "machine", "set", machine, "--cpu-cap", "150%"); !strings.Contains(line, "at most 100") {
		t.Errorf("a cap of more than there is: %s", line)
	}
	if line := c.ArgonFails(other, "machine", "set", machine, "--memory", "1TiB"); !strings.Contains(line, "memory free") {
		t.Errorf("more memory than any server has: %s", line)
	}
	c.Argon(other, "machine", "set", machine, "--cpu-cap", "80%", "--disk-iops", "500", "--network-rate", "10MiB")
	if strings.Contains(c.Argon(home, "server", "show", home.Name), "limits of processors") {
		c.Eventually("the guest has its cap", func() bool { return cpuCap(t, home, guest[0]) == "80000" })
	}
	counts(c, w, 5)
	if now := guestPIDs(t, home); len(now) != 1 || now[0] != guest[0] {
		t.Errorf("the guest's process was %v, is %v", guest, now)
	}

	evacuates(t, c, home, w)

	if line := c.ArgonFails(other, "server", "rm", home.Name); !strings.Contains(line, "server drain "+home.Name) {
		t.Errorf("the removal of a server in use: %s", line)
	}
	if line := c.ArgonFails(other, "server", "drain", home.Name); !strings.Contains(line, "not confirmed") {
		t.Errorf("a drain that nobody confirmed: %s", line)
	}
	boot := lastBoot(t, w)
	c.Argon(other, "server", "drain", home.Name, "--yes", "--timeout", "3m")
	if on := c.Running(other, machine); on == home.Name {
		t.Errorf("the machine runs on %s, which is drained", on)
	}
	oneCopy(c)
	counts(c, w, 5)
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s:\n%s", boot, now, c.Argon(other, "events"))
	}
	c.Argon(other, "server", "activate", home.Name)
	if out := c.Argon(other, "server", "ls"); strings.Contains(out, "drain") {
		t.Errorf("a server is drained after its activation:\n%s", out)
	}
}

// evacuates empties a server that keeps a replica of the disk of a machine that
// runs elsewhere. The guest goes on, on the replica that was made meanwhile.
func evacuates(t *testing.T, c *harness.Cluster, home *devcluster.Server, w *harness.Watcher) {
	t.Helper()
	boot, guest := lastBoot(t, w), guestPIDs(t, home)
	far := replicaElsewhere(t, c, home)
	c.Argon(home, "server", "drain", far.Name, "--evacuate", "--yes", "--timeout", "3m")
	v, err := c.Volume(home, machine)
	must(t, err)
	for _, r := range v.GetVolume().GetReplicas() {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC || c.ByID(home, r.GetServerId()) == far {
			t.Errorf("after %s was emptied: %v", far.Name, r)
		}
	}
	if len(v.GetVolume().GetReplicas()) != 2 || v.GetVolume().GetAttachment() == nil {
		t.Errorf("after %s was emptied: %v", far.Name, v)
	}
	if files, err := filepath.Glob(filepath.Join(far.Dir, "volumes", v.GetVolume().GetMeta().GetId(), "*")); err != nil || len(files) > 0 {
		t.Errorf("%s still keeps %v, %v", far.Name, files, err)
	}
	counts(c, w, 5)
	if now := guestPIDs(t, home); lastBoot(t, w) != boot || !slices.Equal(now, guest) {
		t.Errorf("the guest was started anew: %v, then %v", guest, now)
	}
	c.Argon(home, "server", "activate", far.Name)
}

// cpuCap is what the kernel shows of a guest's cap: microseconds of each tenth of
// a second.
func cpuCap(t *testing.T, s *devcluster.Server, pid int) string {
	t.Helper()
	for line := range strings.Lines(procFile(t, pid, "cgroup")) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), cgroup.ServerName(s.Dir))
		for _, file := range []string{
			fmt.Sprintf("/sys/fs/cgroup/cpu/%s%s/cpu.cfs_quota_us", cgroup.ServerName(s.Dir), path),
			fmt.Sprintf("/sys/fs/cgroup/cpu,cpuacct/%s%s/cpu.cfs_quota_us", cgroup.ServerName(s.Dir), path),
			fmt.Sprintf("/sys/fs/cgroup%s/cpu.max", strings.TrimPrefix(strings.TrimSpace(line), "0::")),
		} {
			if data, err := os.ReadFile(file); err == nil && path != "" {
				return strings.Fields(string(data))[0]
			}
		}
	}
	return ""
}
