package e2e_test

import (
	"path/filepath"
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
	"github.com/argon-cluster/argon/test/soak"
)

// Two of three voters are lost, with all that was written on the third one as well.
// That one goes on by itself. The others are refused when they come back, until one
// rejoins with its replica. Then the catalog is restored from a backup.
func TestMostVotersAreLost(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, devcluster.Options{Servers: 3})
	left, back, gone := c.S(3), c.S(1), c.S(2)
	c.Argon(left, "volume", "create", "data", "--size", "16MiB", "--replicas", "3")
	c.Healthy(left, "data")
	l := soak.NewLedger(1, 0, 8<<20/soak.CellSize, 1)
	writeSome(t, c, left, l)
	status, err := c.Status(left)
	must(t, err)
	name := status.GetCluster().GetName()

	must(t, back.Kill(t.Context()))
	must(t, gone.Kill(t.Context()))
	if said := c.ArgonFails(left, "cluster", "recover", "--yes", name); !strings.Contains(said, "another server uses the directory") {
		t.Errorf("recovery of a server that runs: %s", said)
	}
	must(t, left.Stop(t.Context()))
	if said := c.ArgonFails(left, "cluster", "recover", "--yes", "another"); !strings.Contains(said, "not confirmed") {
		t.Errorf("recovery of a cluster of another name: %s", said)
	}
	out, err := left.Command(t.Context(), "cluster", "recover", "--yes", name).CombinedOutput()
	must(t, err)
	for _, says := range []string{"they have 3 servers (s1, s2, s3), 1 volume, 0 machines", "the only voter"} {
		if !strings.Contains(string(out), says) {
			t.Errorf("recover does not say %q:\n%s", says, out)
		}
	}
	must(t, left.Start(t.Context()))
	answers(c, left)
	holds(t, c, left, l)
	writeSome(t, c, left, l) // what the others never saw

	refused(t, c, back, gone)
	rejoin(c, left, back)
	c.Eventually("the replica of "+back.Name+" is in sync again", func() bool { return inSync(c, left, "data") >= 2 })
	holds(t, c, back, l)

	file := filepath.Join(t.TempDir(), "catalog")
	c.Argon(left, "cluster", "backup", file)
	c.Argon(left, "volume", "create", "later", "--size", "1MiB", "--replicas", "1")
	must(t, back.Stop(t.Context()))
	must(t, left.Stop(t.Context()))
	c.Argon(left, "cluster", "restore", file, "--yes", name)
	must(t, left.Start(t.Context()))
	answers(c, left)
	if out := c.Argon(left, "volume", "ls"); !strings.Contains(out, "data") || strings.Contains(out, "later") {
		t.Errorf("the restored catalog has\n%s", out)
	}
	holds(t, c, left, l)
	refused(t, c, back)
}

// writeSome writes a volume on a server, and flushes it.
func writeSome(t *testing.T, c *harness.Cluster, s *devcluster.Server, l *soak.Ledger) {
	t.Helper()
	u := use(c, s, "data")
	defer u.end()
	w := write(t, l, u.Client)
	w.more(c, 300)
	w.stop()
}

// holds reads it there.
func holds(t *testing.T, c *harness.Cluster, s *devcluster.Server, l *soak.Ledger) {
	t.Helper()
	u := use(c, s, "data")
	defer u.end()
	if err := l.Verify(u.Client, func() {}); err != nil {
		t.Errorf("%s: %v", s.Name, err)
	}
}

func answers(c *harness.Cluster, s *devcluster.Server) {
	c.T.Helper()
	c.Eventually(s.Name+" serves", func() bool {
		res, err := c.Status(s)
		return err == nil && res.GetState() == "ready"
	})
}

// refused starts servers, which end by themselves, for good.
func refused(t *testing.T, c *harness.Cluster, all ...*devcluster.Server) {
	t.Helper()
	for _, s := range all {
		if err := s.Start(t.Context()); err != nil {
			t.Logf("%s: %v", s.Name, err) // it may find out before it answers
		}
	}
	for _, s := range all {
		c.Eventually(s.Name+" has ended", func() bool {
			pids, err := s.PIDs(devcluster.Guard)
			return err == nil && len(pids) == 0
		})
		if err := s.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "recovered without this server") {
			t.Errorf("%s was started again: %v", s.Name, err)
		}
	}
}

// rejoin brings one back.
func rejoin(c *harness.Cluster, at, s *devcluster.Server) {
	c.T.Helper()
	token, err := client.Call(c.T.Context(), c.API(at).Cluster.CreateToken, &argonv1.CreateTokenRequest{})
	must(c.T, err)
	c.Argon(s, "cluster", "rejoin", at.Address, token.GetToken())
	must(c.T, s.Start(c.T.Context()))
	answers(c, s)
}
