package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/argon-cluster/argon/internal/agent"
)

// Each machine has a user of its own, the same each time, in the range that
// nobody else gives away.
func TestUser(t *testing.T) {
	c := confinement{on: true}
	a, b := c.user("01JDK6QZ3W5V8Y2N4M7P9R1T3A"), c.user("01JDK6QZ3W5V8Y2N4M7P9R1T3B")
	if a == b || a != c.user("01JDK6QZ3W5V8Y2N4M7P9R1T3A") {
		t.Errorf("users %d and %d", a, b)
	}
	for _, u := range []uint32{a, b} {
		if u < firstUser || u >= firstUser+1<<userBits {
			t.Errorf("user %d", u)
		}
	}
	if u := c.user(""); u != 0 {
		t.Errorf("what is no machine's belongs to user %d", u)
	}
	if u := (confinement{why: "not root"}).user("a"); u != 0 {
		t.Errorf("without confinement: user %d", u)
	}
}

func TestMachineOf(t *testing.T) {
	if got := machineOf(agent.GuestID("01J-X", 12)); got != "01J-X" {
		t.Errorf("got %s", got)
	}
}

func TestClosedTo(t *testing.T) {
	dir := t.TempDir()
	way := filepath.Join(dir, "a", "b")
	if err := os.MkdirAll(way, 0o711); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{filepath.Dir(dir), dir, filepath.Join(dir, "a"), way} {
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	if got := closedTo(way); got != "" && strings.HasPrefix(got, dir) {
		t.Errorf("closed at %s", got)
	}
	if err := os.Chmod(filepath.Join(dir, "a"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got := closedTo(way); got != filepath.Join(dir, "a") {
		t.Errorf("closed at %q", got)
	}
}

// What a guest has planted in its directory is given to it, not what that leads
// to.
func TestGive(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give files away")
	}
	dir := t.TempDir()
	secret, guest := filepath.Join(dir, "secret"), filepath.Join(dir, "guest")
	for _, err := range []error{
		os.WriteFile(secret, []byte("x"), 0o600), os.Mkdir(guest, 0o700),
		os.WriteFile(filepath.Join(guest, "seed.iso"), nil, 0o600), os.Symlink(secret, filepath.Join(guest, "link")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := (confinement{on: true}).give(guest, firstUser); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]uint32{secret: 0, guest: firstUser, filepath.Join(guest, "seed.iso"): firstUser} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := st.Sys().(*syscall.Stat_t).Uid; got != want {
			t.Errorf("%s belongs to %d, want %d", path, got, want)
		}
	}
}
