package e2e_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// The file system of a server's directory is full to the last block, and what is
// kept for the catalog carries it: nothing new is taken, what is there can be
// removed, and the daemon starts again. With room all is as before.
func TestCatalogOutlivesAFullDisk(t *testing.T) {
	harness.NeedRoot(t)
	c := harness.Up(t, devcluster.Options{Servers: 1, Disk: 640 << 20})
	s := c.S(1)
	for _, name := range []string{"a", "b"} {
		c.Argon(s, "volume", "create", name, "--size", "1MiB", "--replicas", "1")
		c.Healthy(s, name)
	}
	daemon, err := s.PIDs(devcluster.Daemon)
	must(t, err)

	filler := filepath.Join(s.Dir, "of-somebody-else")
	toTheLastBlock(t, filler)
	c.Eventually("status warns", func() bool { return warns(c, s, "is full: its records live on what was kept") })
	c.Eventually("nothing new is taken", func() bool {
		_, err := s.Exec(t.Context(), "token", "create")
		return err != nil && strings.Contains(err.Error(), "the catalog is full")
	})
	changeMuch(c, s)
	c.Argon(s, "volume", "rm", "a")
	c.Eventually("a volume is removed", func() bool { _, err := c.Volume(s, "a"); return err != nil })
	if now, err := s.PIDs(devcluster.Daemon); err != nil || !slices.Equal(now, daemon) {
		t.Errorf("the daemon was process %v, is %v, %v", daemon, now, err)
	}
	if out := c.Argon(s, "events"); !strings.Contains(out, "directory-full") || !strings.Contains(out, "catalog-full") {
		t.Errorf("events:\n%s", out)
	}

	must(t, s.Kill(t.Context(), devcluster.Daemon))
	c.Eventually("another daemon serves", func() bool {
		now, err := s.PIDs(devcluster.Daemon)
		res, statusErr := c.Status(s)
		return err == nil && len(now) == 1 && now[0] != daemon[0] && statusErr == nil && res.GetState() == "ready"
	})
	c.Argon(s, "volume", "rm", "b")

	must(t, os.Remove(filler))
	c.Eventually("status warns no more", func() bool { return !warns(c, s, "is full") })
	c.Eventually("new things are taken", func() bool {
		_, err := s.Exec(t.Context(), "volume", "create", "new", "--size", "1MiB", "--replicas", "1")
		return err == nil
	})
}

// toTheLastBlock makes a file of all that is free, also of what only root may use.
func toTheLastBlock(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	at, step := int64(0), int64(64<<20)
	for step >= 512 {
		switch err := unix.Fallocate(int(f.Fd()), 0, at, step); {
		case err == nil:
			at += step
		case errors.Is(err, unix.ENOSPC):
			step /= 2
		default:
			t.Fatal(err)
		}
	}
}

func warns(c *harness.Cluster, s *devcluster.Server, what string) bool {
	c.T.Helper()
	res, err := c.Status(s)
	must(c.T, err)
	return slices.ContainsFunc(res.GetWarnings(), func(w string) bool { return strings.Contains(w, what) })
}

// changeMuch writes more to the catalog than the blocks that its files had when it
// was new.
func changeMuch(c *harness.Cluster, s *devcluster.Server) {
	c.T.Helper()
	api := c.API(s)
	for i := range 400 {
		_, err := client.Call(c.T.Context(), api.Cluster.SetCluster, &argonv1.SetClusterRequest{CpuOvercommit: proto.Uint32(uint32(4 + i%2))})
		must(c.T, err)
	}
}
