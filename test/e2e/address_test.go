package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/argon-cluster/argon/test/harness"
)

// isolated makes a network namespace with one interface and no route but to its
// own network, and starts an unconfigured server there.
func isolated(t *testing.T, address string) (dir string) {
	t.Helper()
	ns := fmt.Sprintf("argon-address-%d", os.Getpid())
	add := []string{"-n", ns, "addr", "add", address, "dev", "eth0"}
	if strings.Contains(address, ":") {
		add = append(add, "nodad") // nobody else is there to have it
	}
	for _, args := range [][]string{
		{"netns", "add", ns},
		{"-n", ns, "link", "set", "lo", "up"},
		{"-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"},
		add,
		{"-n", ns, "link", "set", "eth0", "up"},
		{"-n", ns, "link", "set", "eth1", "up"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
		if args[0] == "netns" {
			t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
		}
	}
	dir, err := os.MkdirTemp("", "argon-e2e-") // short enough for a socket's path
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	server := exec.Command("ip", "netns", "exec", ns, harness.Binary(t), "server", "--dir", dir)
	must(t, server.Start())
	t.Cleanup(func() {
		_ = server.Process.Signal(os.Interrupt)
		_ = server.Wait()
	})
	for deadline := time.Now().Add(harness.Patience); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, "run", "admin.sock")); err == nil {
			return dir
		}
		if time.Now().After(deadline) {
			t.Fatal("the server does not start")
		}
	}
}

// A host without a default route takes the address that it has, and never loopback.
// Where it has none, init says so and leaves the server unconfigured.
func TestAddressWithoutDefaultRoute(t *testing.T) {
	harness.NeedRoot(t)
	for _, tt := range []struct{ name, address, want string }{
		{"IPv4", "10.61.0.1/24", "10.61.0.1"},
		{"IPv6", "fd61::1/64", "fd61::1"},
		{"link-local only", "169.254.7.7/16", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := isolated(t, tt.address)
			argon := func(args ...string) (string, error) {
				out, err := exec.Command(harness.Binary(t), append([]string{"--dir", dir}, args...)...).CombinedOutput()
				return string(out), err
			}
			out, err := argon("init", "--name", "s1")
			if tt.want == "" {
				if err == nil || !strings.Contains(out, "--address") {
					t.Errorf("init: %v: %s", err, out)
				}
				// And with what it says to give it works.
				out, err = argon("init", "--name", "s1", "--address", strings.Split(tt.address, "/")[0])
				tt.want = "169.254.7.7"
			}
			if err != nil {
				t.Fatalf("init: %v: %s", err, out)
			}
			if out, err := argon("server", "ls"); err != nil || !strings.Contains(out, tt.want) {
				t.Errorf("want %s: %v: %s", tt.want, err, out)
			}
		})
	}
}
