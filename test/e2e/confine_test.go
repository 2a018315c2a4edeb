package e2e_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// What the kernel says of the real QEMU: a user of its own without capabilities,
// a seccomp filter, no way to more rights, a control group of its own; and nobody
// else gets at its monitor or its disk.
func TestConfinement(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 1})
	home := counting(t, c, "1")
	pid := guestPIDs(t, home)[0]
	status := procFile(t, pid, "status")
	for field, want := range map[string]string{"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0000000000000000"} {
		if os.Geteuid() != 0 && field == "CapEff" {
			continue
		}
		if got := statusField(status, field); got != want {
			t.Errorf("%s is %s, want %s", field, got, want)
		}
	}
	staysOut(t, c, home)
	show := c.Argon(home, "server", "show", home.Name)
	if os.Geteuid() != 0 {
		if !strings.Contains(show, "it is not root") {
			t.Errorf("who guests run as is not told:\n%s", show)
		}
		return
	}
	uid := strings.Fields(statusField(status, "Uid"))
	for _, u := range uid {
		if u != uid[0] || u == "0" {
			t.Errorf("QEMU's users are %v", uid)
		}
	}
	if gid := strings.Fields(statusField(status, "Gid")); gid[0] != uid[0] {
		t.Errorf("QEMU's groups are %v", gid)
	}
	if !strings.Contains(show, "a user of its own") {
		t.Errorf("who guests run as is not told:\n%s", show)
	}

	run := filepath.Join(home.Dir, "run")
	machines, err := filepath.Glob(filepath.Join(run, "machines", "*"))
	must(t, err)
	if len(machines) != 1 {
		t.Fatalf("guests' directories: %v", machines)
	}
	ownedBy(t, machines[0], 0o700, uid[0])
	disks, err := filepath.Glob(filepath.Join(run, "volumes", "*.nbd"))
	must(t, err)
	if len(disks) != 1 {
		t.Fatalf("disks' sockets: %v", disks)
	}
	ownedBy(t, disks[0], 0o600, uid[0])
	for _, path := range []string{filepath.Join(machines[0], "qmp.sock"), disks[0]} {
		if err := connectAs(path, 65534); err == nil {
			t.Errorf("nobody may connect to %s", path)
		}
	}
	if err := connectAs(disks[0], uidOf(t, disks[0])); err != nil {
		t.Errorf("the guest's user: %v", err)
	}
	if strings.Contains(show, "control groups") {
		if groups := procFile(t, pid, "cgroup"); !strings.Contains(groups, filepath.Base(machines[0])) {
			t.Errorf("QEMU is in no control group of its own:\n%s", groups)
		}
	}
}

// staysOut: the guest does not reach what listens on its host's loopback.
func staysOut(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	var came atomic.Int32
	go func() {
		for conn, err := ln.Accept(); err == nil; conn, err = ln.Accept() {
			came.Add(1)
			_ = conn.Close()
		}
	}()
	con := console(t, c, home, machine)
	con.hear("count ")
	_, port, err := net.SplitHostPort(ln.Addr().String())
	must(t, err)
	con.say("nc 10.0.2.2 " + port + " </dev/null; echo tri''ed $?\n")
	con.hear("tried ")
	if n := came.Load(); n > 0 {
		t.Errorf("the guest has reached what listens on its host's loopback %d times", n)
	}
}

func procFile(t *testing.T, pid int, name string) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	must(t, err)
	return string(data)
}

func statusField(status, name string) string {
	for line := range strings.Lines(status) {
		if field, value, ok := strings.Cut(line, ":"); ok && field == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func ownedBy(t *testing.T, path string, mode os.FileMode, user string) {
	t.Helper()
	st, err := os.Lstat(path)
	must(t, err)
	if got := fmt.Sprint(st.Sys().(*syscall.Stat_t).Uid); got != user || st.Mode().Perm() != mode {
		t.Errorf("%s: user %s, mode %v; want %s, %v", path, got, st.Mode().Perm(), user, mode)
	}
}

func uidOf(t *testing.T, path string) int {
	t.Helper()
	st, err := os.Lstat(path)
	must(t, err)
	return int(st.Sys().(*syscall.Stat_t).Uid)
}

// connectAs tries a socket with a user's rights: only this thread's, for a
// moment.
func connectAs(path string, user int) error {
	done := make(chan error, 1)
	go func() {
		done <- asUser(user, func() error {
			nc, err := net.Dial("unix", path)
			if err == nil {
				err = nc.Close()
			}
			return err
		})
	}()
	return <-done
}
