package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// More replicas than servers: the volume is made, degraded and saying so, and
// healed when servers come.
func TestDegradedVolumeHeals(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	s, last := c.S(1), c.S(3)
	must(t, last.Kill(t.Context()))
	c.Eventually("the lease of the killed server ends", func() bool {
		res, err := c.Status(s)
		return err == nil && len(res.GetServers()) == 3 && !serverAlive(res, last.Name)
	})
	out := c.Argon(s, "volume", "create", "data", "--size", "64MiB", "--replicas", "3")
	if !strings.Contains(out, "degraded") {
		t.Errorf("nothing was said of a volume that has fewer replicas than wanted:\n%s", out)
	}
	c.Eventually("two replicas are in sync", func() bool { return inSync(c, s, "data") == 2 })
	v, err := c.Volume(s, "data")
	must(t, err)
	if v.GetHealth() != "degraded" || v.GetAdvice() == "" {
		t.Errorf("health %q, advice %q", v.GetHealth(), v.GetAdvice())
	}
	must(t, last.Start(t.Context()))
	c.Healthy(s, "data")
	if n := inSync(c, s, "data"); n != 3 {
		t.Errorf("%d replicas are in sync", n)
	}
}

func serverAlive(res *argonv1.StatusResponse, name string) bool {
	for _, v := range res.GetServers() {
		if v.GetServer().GetMeta().GetName() == name {
			return v.GetAlive()
		}
	}
	return false
}

func inSync(c *harness.Cluster, s *devcluster.Server, volume string) int {
	v, err := c.Volume(s, volume)
	if err != nil {
		return 0
	}
	n := 0
	for _, r := range v.GetVolume().GetReplicas() {
		if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
			n++
		}
	}
	return n
}

// Clients that others wrote use a volume through `argon volume connect`, on a
// server with a replica and on one without; the server of the first is killed
// after a flush.
func TestConnect(t *testing.T) {
	nbdcopy, err := exec.LookPath("nbdcopy")
	if err != nil {
		t.Skip("needs nbdcopy, of the package libnbd-bin")
	}
	c := harness.Up(t, devcluster.Options{Servers: 3})
	c.Argon(c.S(1), "volume", "create", "data", "--size", "64MiB")
	data := make([]byte, 64<<20)
	_, _ = rand.Read(data[8<<20 : 40<<20]) // and holes around it
	file := filepath.Join(t.TempDir(), "data")
	must(t, os.WriteFile(file, data, 0o600))

	first := replicaOf(t, c, "data")
	uri, _, err := c.Connect(first, "data")
	must(t, err)
	run(t, nbdcopy, "--flush", file, uri)
	var extents []string
	for line := range strings.Lines(string(run(t, "nbdinfo", "--map", uri))) {
		extents = append(extents, strings.Join(strings.Fields(line), " "))
	}
	if want := []string{"0 8388608 3 hole,zero", "8388608 33554432 0 data", "41943040 25165824 3 hole,zero"}; !slices.Equal(extents, want) {
		t.Errorf("where the volume has data: %q, want %q", extents, want)
	}
	must(t, first.Kill(t.Context()))

	for _, s := range c.Servers() {
		if s == first {
			continue
		}
		var uri string
		var end func()
		c.Eventually("the volume can be connected on "+s.Name, func() bool {
			var err error
			uri, end, err = c.Connect(s, "data")
			return err == nil
		})
		if got := run(t, nbdcopy, uri, "-"); !bytes.Equal(got, data) {
			t.Errorf("%s reads something else than was written on %s", s.Name, first.Name)
		}
		end()
	}
}

// replicaOf is a server with a replica in sync.
func replicaOf(t *testing.T, c *harness.Cluster, volume string) *devcluster.Server {
	t.Helper()
	c.Healthy(c.S(1), volume)
	v, err := c.Volume(c.S(1), volume)
	must(t, err)
	return c.ByID(c.S(1), v.GetVolume().GetReplicas()[0].GetServerId())
}

func run(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

// A full disk makes the writer wait, says so, and loses nothing: when there is
// room again it goes on as if nothing had been.
func TestFullDisk(t *testing.T) {
	harness.NeedRoot(t)
	nbdcopy, err := exec.LookPath("nbdcopy")
	if err != nil {
		t.Skip("needs nbdcopy, of the package libnbd-bin")
	}
	dir, err := os.MkdirTemp("", "argon-e2e-")
	must(t, err)
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1g,mode=0700"))
	t.Cleanup(func() {
		must(t, unix.Unmount(dir, 0))
		must(t, os.Remove(dir))
	})
	c := harness.Up(t, devcluster.Options{Servers: 3, Dir: filepath.Join(dir, "c")})
	home := counting(t, c, "2")
	w := c.Watch(port, home)
	counts(c, w, 5)
	boot := lastBoot(t, w)
	c.Argon(home, "volume", "create", "data", "--size", "128MiB")
	uri, _, err := c.Connect(home, "data")
	must(t, err)
	data := make([]byte, 128<<20)
	_, _ = rand.Read(data)
	file := filepath.Join(t.TempDir(), "data")
	must(t, os.WriteFile(file, data, 0o600))

	// Less than what is written stays free above the reserve: replicas take no
	// more then, and the catalog still does.
	filler := filepath.Join(dir, "filler")
	fill(t, dir, filler, 96<<20)
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		run(t, nbdcopy, "--flush", file, uri)
	}()
	c.Eventually("an event says that the disk is full", func() bool {
		return strings.Contains(c.Argon(home, "events"), "volume-full")
	})
	select {
	case <-copied:
		t.Fatal("the copy did not wait for room")
	default:
	}
	must(t, os.Remove(filler))
	<-copied
	if got := run(t, nbdcopy, uri, "-"); !bytes.Equal(got, data) {
		t.Error("what was written while the disk was full is not what is read")
	}
	counts(c, w, 5)
	if now := lastBoot(t, w); now != boot {
		t.Errorf("the guest was restarted: boot %s, then %s", boot, now)
	}
	c.Healthy(home, machine)
	c.Healthy(home, "data")
}

// fill leaves so many bytes free.
func fill(t *testing.T, dir, filler string, leave uint64) {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	f, err := os.Create(filler)
	must(t, err)
	defer f.Close()
	must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail*uint64(st.Bsize)-leave)))
}
