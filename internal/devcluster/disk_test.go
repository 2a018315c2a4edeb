package devcluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// writer stands in for a server: it notes the boot id that it sees, and writes
// with and without a sync.
const writer = `#!/bin/sh
echo kept > "$3/synced"
sync "$3/synced" "$3"
echo lost > "$3/unsynced"
cat /proc/sys/kernel/random/boot_id > "$3/../boot-of-$(basename "$3")"
exec sleep 1000
`

// withDisks is servers with disks of their own that run the writer.
func withDisks(t *testing.T, n int) *Cluster {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("disks need root, for mounts")
	}
	dir, err := os.MkdirTemp("", "argon-")
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "writer")
	if err := os.WriteFile(binary, []byte(writer), 0o700); err != nil {
		t.Fatal(err)
	}
	c, err := plan(Options{Dir: dir, Servers: n, Disk: 32 << 20, Binary: binary})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Down(context.Background(), KeepNothing); err != nil {
			t.Error(err)
		}
		for i := range n {
			_ = os.Remove(bootSeen(c.servers[i]))
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("something is left: %v", err)
		}
	})
	if err := c.save(func() {}); err != nil {
		t.Fatal(err)
	}
	for _, s := range c.servers {
		if err := s.makeDisk(t.Context(), c.state.Disk); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func bootSeen(s *Server) string { return filepath.Join(filepath.Dir(s.Dir), "boot-of-"+s.Name) }

// boots starts the writer and waits until it has written.
func boots(t *testing.T, s *Server) string {
	t.Helper()
	_ = os.Remove(bootSeen(s))
	if err := s.spawn(); err != nil {
		t.Fatal(err)
	}
	var id []byte
	waitUntil(t, func() bool {
		id, _ = os.ReadFile(bootSeen(s))
		return len(id) == 37
	})
	return string(id)
}

func TestPowerCut(t *testing.T) {
	c := withDisks(t, 2)
	cut, spared := c.servers[0], c.servers[1]
	real, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	before := boots(t, cut)
	boots(t, spared)
	if err := c.PowerCut(t.Context(), cut); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(cut.Dir, "synced")); err != nil || string(data) != "kept\n" {
		t.Errorf("what was synced is %q, %v", data, err)
	}
	if _, err := os.Stat(filepath.Join(cut.Dir, "unsynced")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was not synced is not lost: %v", err)
	}
	if _, err := os.Stat(filepath.Join(spared.Dir, "unsynced")); err != nil {
		t.Errorf("the other server lost something: %v", err)
	}
	if condition, err := cut.Condition(); err != nil || condition != "stopped" {
		t.Errorf("the server is %s, %v", condition, err)
	}
	if after := boots(t, cut); after == before || after == string(real) {
		t.Errorf("boot id %q, before the cut %q, the kernel's own %q", after, before, real)
	}
	// All at once, the ones that hold each other's mounts too.
	if err := c.PowerCut(t.Context(), c.servers...); err != nil {
		t.Fatal(err)
	}
}

func TestFill(t *testing.T) {
	c := withDisks(t, 1)
	s := c.servers[0]
	if err := s.Fill(1 << 20); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(s.Dir, "file")
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("writing to a full disk: %v", err)
	}
	if err := s.Empty(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
		t.Error(err)
	}
}

func TestDisksAreTheirOwn(t *testing.T) {
	c := &Cluster{state: state{Servers: []serverState{{Name: "s1"}}}}
	s := &Server{cluster: c, serverState: &c.state.Servers[0]}
	if c.PowerCut(t.Context(), s) == nil || s.Fill(0) == nil {
		t.Error("a disk was filled, or lost power, that is not the server's own")
	}
}
