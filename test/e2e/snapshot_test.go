package e2e_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// The life of snapshots, clones and streams, on one cluster.
func TestSnapshots(t *testing.T) {
	if _, err := exec.LookPath("nbdcopy"); err != nil {
		t.Skip("needs nbdcopy, of the package libnbd-bin")
	}
	c := harness.Up(t, devcluster.Options{Servers: 3})
	s := c.S(1)
	const size = 32 << 20
	monday := make([]byte, size)
	_, _ = rand.Read(monday[4<<20 : 12<<20])
	tuesday := bytes.Clone(monday)
	_, _ = rand.Read(tuesday[11<<20 : 13<<20])
	clear(tuesday[5<<20 : 6<<20])

	c.Argon(s, "volume", "create", "db", "--size", "32MiB")
	c.Healthy(s, "db")
	put(t, c, s, "db", monday)
	c.Argon(s, "snapshot", "create", "db", "monday")
	put(t, c, s, "db", tuesday)
	c.Argon(s, "snapshot", "create", "db", "tuesday")

	t.Run("clone", func(t *testing.T) {
		c.Argon(s, "volume", "create", "copy", "--snapshot", "db/monday")
		if !bytes.Equal(content(t, c, s, "copy"), monday) {
			t.Error("the clone is not what the snapshot holds")
		}
		if err := c.ArgonFails(s, "snapshot", "rm", "db", "monday"); !strings.Contains(err, "volume copy is based on snapshot db/monday") {
			t.Errorf("a snapshot with a clone: %s", err)
		}
		if err := c.ArgonFails(s, "volume", "rm", "db"); !strings.Contains(err, "copy") {
			t.Errorf("a volume whose snapshot has a clone: %s", err)
		}
		put(t, c, s, "copy", tuesday)
		if !bytes.Equal(content(t, c, s, "db"), tuesday) {
			t.Error("writing to the clone changed its parent")
		}
	})
	t.Run("rollback", func(t *testing.T) {
		_, end, err := c.Connect(s, "db")
		must(t, err)
		if err := c.ArgonFails(s, "snapshot", "rollback", "db", "monday"); !strings.Contains(err, "in use") {
			t.Errorf("a volume that is connected: %s", err)
		}
		end()
		c.Eventually("the volume can be rolled back", func() bool {
			_, err := s.Exec(t.Context(), "snapshot", "rollback", "db", "monday")
			return err == nil
		})
		if !bytes.Equal(content(t, c, s, "db"), monday) {
			t.Error("the volume is not what the snapshot holds")
		}
	})
	t.Run("streams", func(t *testing.T) { streams(t, c, monday, tuesday) })
	t.Run("detach", func(t *testing.T) {
		c.Argon(s, "snapshot", "rm", "db", "monday", "--detach")
		if !bytes.Equal(content(t, c, s, "copy"), tuesday) {
			t.Error("the clone changed as it was detached")
		}
		v, err := c.Volume(s, "copy")
		must(t, err)
		if v.GetVolume().GetBase() != nil {
			t.Errorf("still based on %s", v.GetBase())
		}
	})
	t.Run("accounting", func(t *testing.T) { accounts(t, c) })
}

// put makes a volume hold something.
func put(t *testing.T, c *harness.Cluster, s *devcluster.Server, volume string, data []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "data")
	must(t, os.WriteFile(file, data, 0o600))
	uri, end, err := c.Connect(s, volume)
	must(t, err)
	defer end()
	run(t, "nbdcopy", "--flush", file, uri)
}

func content(t *testing.T, c *harness.Cluster, s *devcluster.Server, volume string) []byte {
	t.Helper()
	uri, end, err := c.Connect(s, volume)
	must(t, err)
	defer end()
	return run(t, "nbdcopy", uri, "-")
}

// streams exports and imports, on servers that have the volume and on others.
func streams(t *testing.T, c *harness.Cluster, monday, tuesday []byte) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	read := func(name string) []byte {
		b, err := os.ReadFile(file(name))
		must(t, err)
		return b
	}
	for i, s := range c.Servers() {
		raw := fmt.Sprintf("raw%d", i)
		c.Argon(s, "volume", "export", "db/tuesday", file(raw))
		if !bytes.Equal(read(raw), tuesday) {
			t.Errorf("%s exports something else", s.Name)
		}
	}
	s := c.S(2)
	c.Argon(s, "volume", "export", "db", file("now.qcow2"))
	c.Argon(s, "volume", "import", "from-qcow2", file("now.qcow2"))
	if !bytes.Equal(content(t, c, s, "from-qcow2"), monday) {
		t.Error("qcow2 there and back is something else")
	}
	c.Argon(s, "volume", "export", "db/monday", file("monday.stream"))
	c.Argon(s, "volume", "export", "db/tuesday", file("tuesday.stream"), "--since", "monday")
	bad := read("tuesday.stream")
	bad[len(bad)/2] ^= 1
	must(t, os.WriteFile(file("bad.stream"), bad, 0o600))

	c.Argon(s, "volume", "import", "second", file("monday.stream"))
	if err := c.ArgonFails(s, "volume", "import", "second", file("bad.stream")); !strings.Contains(err, "damaged") {
		t.Errorf("a damaged stream: %s", err)
	}
	if !bytes.Equal(content(t, c, s, "second"), monday) {
		t.Error("a damaged stream has changed the volume, or the first was not imported right")
	}
	c.Argon(s, "volume", "import", "second", file("tuesday.stream"))
	if !bytes.Equal(content(t, c, s, "second"), tuesday) {
		t.Error("what differs was not imported right")
	}
}

// accounts compares what servers say with what lies on their disks.
func accounts(t *testing.T, c *harness.Cluster) {
	for _, s := range c.Servers() {
		var said, found uint64
		c.Eventually("server "+s.Name+" says what lies on its disk", func() bool {
			res, err := client.Call(t.Context(), c.API(s).Servers.GetServer, &argonv1.GetServerRequest{Name: s.Name})
			if err != nil {
				return false
			}
			said = 0
			for _, r := range res.GetServer().GetUsage().GetReplicas() {
				said += r.GetUsedBytes()
			}
			fields := strings.Fields(string(run(t, "du", "-s", "--block-size=1", filepath.Join(s.Dir, "volumes"))))
			found, err = strconv.ParseUint(fields[0], 10, 64)
			must(t, err)
			return max(said, found)-min(said, found) <= found/100
		})
		t.Logf("%s: %d bytes said, %d found", s.Name, said, found)
	}
}

// A clone of a volume of 1 TiB is made without copying anything, and grows by
// what is written to it.
func TestHugeVolume(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("needs qemu-io, of the package qemu-utils")
	}
	c := harness.Up(t, devcluster.Options{Servers: 1})
	s := c.S(1)
	c.Argon(s, "volume", "create", "huge", "--size", "1TiB", "--replicas", "1")
	uri, end, err := c.Connect(s, "huge")
	must(t, err)
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 900G 4M", "-c", "flush", uri)
	c.Argon(s, "snapshot", "create", "huge", "now")

	// It grows while it is attached.
	c.Argon(s, "volume", "resize", "huge", "1025GiB")
	if got, want := strings.TrimSpace(string(run(t, "nbdinfo", "--size", uri))), strconv.Itoa(1025<<30); got != want {
		t.Errorf("a client that connects now sees a size of %s, want %s", got, want)
	}
	if err := c.ArgonFails(s, "volume", "resize", "huge", "1TiB"); !strings.Contains(err, "can only grow") {
		t.Errorf("shrinking: %s", err)
	}
	end()

	c.Argon(s, "volume", "create", "clone", "--snapshot", "huge/now", "--replicas", "1")
	v, err := c.Volume(s, "clone")
	must(t, err)
	dir := filepath.Join(s.Dir, "volumes", v.GetVolume().GetMeta().GetId())
	used := func() uint64 {
		n, err := strconv.ParseUint(strings.Fields(string(run(t, "du", "-s", "--block-size=1", dir)))[0], 10, 64)
		must(t, err)
		return n
	}
	if n := used(); n > 1<<20 {
		t.Errorf("the clone takes %d bytes before anything was written to it", n)
	}
	uri, end, err = c.Connect(s, "clone")
	must(t, err)
	defer end()
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 7 900G 4M", "-c", "read -P 0 500G 4M", "-c", "write -P 8 900G 1M", "-c", "flush",
		"-c", "read -P 8 900G 1M", uri)
	if n := used(); n > 8<<20 {
		t.Errorf("the clone takes %d bytes after 1 MiB was written to it", n)
	}
}
