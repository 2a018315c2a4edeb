package install_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/argon-cluster/argon/test/harness"
)

// host is a server of its own: a file system over layers that it shares with
// others, and systemd in namespaces once it is booted.
type host struct {
	t     *testing.T
	name  string
	root  string // where its file system is mounted
	upper string // what it has written
	init  int    // its first process, as this host sees it; 0: it is off
	cmd   *exec.Cmd
}

// newHost mounts the file system of a host over layers, the uppermost first.
func newHost(t *testing.T, name string, layers ...string) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, name: name, root: filepath.Join(dir, "root"), upper: filepath.Join(dir, "upper")}
	for _, d := range []string{h.root, h.upper, filepath.Join(dir, "work")} {
		must(t, os.Mkdir(d, 0o755))
	}
	h.here("mount", "-t", "overlay", "-o", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(layers, ":"), h.upper, filepath.Join(dir, "work")), "overlay", h.root)
	t.Cleanup(h.unmount)
	h.write("/etc/hostname", name+"\n")
	return h
}

func (h *host) unmount() {
	if h.root == "" {
		return
	}
	out, err := exec.Command("umount", "--recursive", h.root).CombinedOutput()
	if err != nil {
		h.t.Errorf("unmounting %s: %v: %s", h.name, err, out)
	}
	h.root = ""
}

func (h *host) write(path, content string) {
	h.t.Helper()
	must(h.t, os.MkdirAll(filepath.Dir(filepath.Join(h.root, path)), 0o755))
	must(h.t, os.WriteFile(filepath.Join(h.root, path), []byte(content), 0o644))
}

func (h *host) remove(paths ...string) {
	h.t.Helper()
	for _, p := range paths {
		must(h.t, os.RemoveAll(filepath.Join(h.root, p)))
	}
}

func (h *host) has(path string) bool {
	_, err := os.Lstat(filepath.Join(h.root, path))
	return err == nil
}

// here runs a command on the host of the test.
func (h *host) here(args ...string) string {
	h.t.Helper()
	out, err := exec.CommandContext(h.t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s: %s: %v\n%s", h.name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// bind shows a directory of the test's host inside.
func (h *host) bind(from, to string) {
	h.t.Helper()
	inside := filepath.Join(h.root, to)
	must(h.t, os.MkdirAll(inside, 0o755))
	h.here("mount", "--bind", from, inside)
}

// prepare has commands of a host that is off reach what they need, the network
// of the test's host among it.
func (h *host) prepare() {
	h.t.Helper()
	for _, args := range [][]string{
		{"mount", "-t", "proc", "proc", filepath.Join(h.root, "proc")},
		{"mount", "--rbind", "/dev", filepath.Join(h.root, "dev")},
		{"mount", "--make-rslave", filepath.Join(h.root, "dev")},
	} {
		h.here(args...)
	}
	resolv, err := os.ReadFile("/etc/resolv.conf")
	must(h.t, err)
	h.remove("/etc/resolv.conf")
	h.write("/etc/resolv.conf", string(resolv))
}

// sh runs a line of shell as root in /root: in the host's namespaces, or, while it
// is off, in its file system.
func (h *host) sh(line string) (stdout, stderr string) {
	h.t.Helper()
	began := time.Now()
	stdout, stderr, err := h.try(line)
	if err != nil {
		h.t.Fatalf("%s# %s: %v\n%s%s", h.name, line, err, stdout, stderr)
	}
	h.t.Logf("%s# %s (%.1f s)", h.name, line, time.Since(began).Seconds())
	return stdout, stderr
}

func (h *host) try(line string) (stdout, stderr string, err error) {
	args := []string{"chroot", h.root}
	if h.init != 0 {
		args = []string{"nsenter", "--target", strconv.Itoa(h.init), "--all", "--root", "--wd"}
	}
	environment := []string{"env", "-i", "HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if h.init == 0 {
		environment = append(environment, goEnvironment...)
	}
	args = append(append(args, environment...), "sh", "-c", "cd /root && "+line)
	cmd := exec.CommandContext(h.t.Context(), args[0], args[1:]...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// boot starts the host, and connects it to the others.
func (h *host) boot(net *network, address string) {
	h.t.Helper()
	h.cmd = exec.Command("./boot.sh", h.root)
	var printed bytes.Buffer
	h.cmd.Stdout, h.cmd.Stderr = &printed, &printed
	must(h.t, h.cmd.Start())
	h.t.Cleanup(h.cut)
	eventually(h.t, h.name+" starts its first process", func() bool {
		out, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", h.cmd.Process.Pid))
		child := strings.Fields(string(out))
		if err != nil || len(child) != 1 {
			return false
		}
		name, _ := os.ReadFile("/proc/" + child[0] + "/comm")
		if string(name) != "systemd\n" && string(name) != "init\n" {
			return false
		}
		h.init, err = strconv.Atoi(child[0])
		return err == nil
	})
	net.connect(h, address)
	eventually(h.t, h.name+" is up", func() bool {
		out, _, _ := h.try("systemctl is-system-running")
		state := strings.TrimSpace(out)
		return state == "running" || state == "degraded"
	})
}

// cut takes the power away.
func (h *host) cut() {
	if h.init == 0 {
		return
	}
	h.init = 0
	_ = h.cmd.Process.Kill() // and the kernel its child, with all in its namespaces
	_ = h.cmd.Wait()
}

// network joins hosts by a bridge in a namespace of its own.
type network struct {
	t     *testing.T
	name  string
	ports int
}

func newNetwork(t *testing.T) *network {
	n := &network{t: t, name: fmt.Sprintf("argon-install-%d", os.Getpid())}
	n.ip("netns", "add", n.name)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", n.name).CombinedOutput(); err != nil {
			t.Errorf("removing the network: %v: %s", err, out)
		}
	})
	n.ip("-n", n.name, "link", "add", "bridge", "type", "bridge")
	n.ip("-n", n.name, "link", "set", "bridge", "up")
	return n
}

func (n *network) ip(args ...string) {
	n.t.Helper()
	if out, err := exec.CommandContext(n.t.Context(), "ip", args...).CombinedOutput(); err != nil {
		n.t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

func (n *network) connect(h *host, address string) {
	n.t.Helper()
	n.ports++
	port, pid := fmt.Sprint("port", n.ports), strconv.Itoa(h.init)
	n.ip("-n", n.name, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
	n.ip("-n", n.name, "link", "set", port, "master", "bridge", "up")
	inside := func(args ...string) {
		n.t.Helper()
		h.here(append([]string{"nsenter", "--target", pid, "--net", "ip"}, args...)...)
	}
	inside("address", "add", address+"/24", "dev", "eth0")
	inside("link", "set", "eth0", "up")
	inside("link", "set", "lo", "up")
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(harness.Patience); !is(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
