// Package harness is what the end-to-end tests share: an argon built from this
// tree, clusters of real servers, guests that count, and watchers of them.
//
// What lives here: helpers that any end-to-end test may need. What must not:
// assertions about one behaviour (test/e2e), faults (internal/devcluster).
package harness

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
)

// Patience bounds each wait of a test. It is no expectation of speed: a test
// that needs it has failed.
const Patience = 3 * time.Minute

// Root is the top folder of this tree.
func Root(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatalf("finding the top folder: %v", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}

var (
	buildOnce sync.Once
	binary    string
	errBuild  error
)

// Binary builds argon once for all tests of a package.
func Binary(t testing.TB) string {
	t.Helper()
	root := Root(t)
	buildOnce.Do(func() {
		binary = filepath.Join(root, "build", "test", "argon")
		cmd := Build(binary)
		cmd.Dir = root
		var out []byte
		if out, errBuild = cmd.CombinedOutput(); errBuild != nil {
			t.Logf("%s", out)
		}
	})
	if errBuild != nil {
		t.Fatalf("building argon: %v", errBuild)
	}
	return binary
}

// Build is the command that builds argon of the tree that it runs in, as `make
// build` does: what one has compiled the other need not.
func Build(output string) *exec.Cmd {
	cmd := exec.Command("go", "build", "-trimpath", "-o", output, "./cmd/argon")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	return cmd
}

// NeedRoot skips a test that makes network namespaces or mounts.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
}

// Cluster is a dev cluster that ends with its test. Its methods fail the test.
type Cluster struct {
	*devcluster.Cluster
	T testing.TB
}

// Up starts a cluster. When the test fails, the ends of the servers' logs and
// the events are printed.
func Up(t testing.TB, o devcluster.Options) *Cluster {
	t.Helper()
	if o.Binary == "" {
		o.Binary = Binary(t)
	}
	if o.Dir == "" {
		dir, err := os.MkdirTemp("", "argon-e2e-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		o.Dir = dir
	}
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	dc, err := devcluster.Up(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{Cluster: dc, T: t}
	t.Cleanup(c.down)
	return c
}

// For is the same cluster for a part of its test.
func (c *Cluster) For(t testing.TB) *Cluster { return &Cluster{Cluster: c.Cluster, T: t} }

func (c *Cluster) down() {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if c.T.Failed() {
		c.explain(ctx)
	}
	if err := c.Down(ctx, devcluster.KeepNothing); err != nil {
		c.T.Errorf("ending the cluster: %v", err)
	}
}

// explain prints what a reader of a failure wants to see.
func (c *Cluster) explain(ctx context.Context) {
	for _, s := range c.Servers() {
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		if out, err := s.Exec(short, "events"); err == nil {
			c.T.Logf("events:\n%s", out)
			cancel()
			break
		}
		cancel()
	}
	for _, s := range c.Servers() {
		data, _ := os.ReadFile(s.LogPath())
		if len(data) > 6000 {
			data = data[len(data)-6000:]
		}
		c.T.Logf("%s (%s), end of its log:\n%s", s.Name, s.Address, data)
	}
}

// S is the n-th server, from 1.
func (c *Cluster) S(n int) *devcluster.Server { return c.Servers()[n-1] }

// ByName is the server of that name.
func (c *Cluster) ByName(name string) *devcluster.Server {
	c.T.Helper()
	s, err := c.Server(name)
	if err != nil {
		c.T.Fatal(err)
	}
	return s
}

// Other is a server that is none of these.
func (c *Cluster) Other(not ...string) *devcluster.Server {
	c.T.Helper()
	for _, s := range c.Servers() {
		found := false
		for _, name := range not {
			found = found || s.Name == name
		}
		if !found {
			return s
		}
	}
	c.T.Fatalf("there is no server but %v", not)
	return nil
}

// Argon runs the command line against a server.
func (c *Cluster) Argon(s *devcluster.Server, args ...string) string {
	c.T.Helper()
	ctx, cancel := context.WithTimeout(c.T.Context(), Patience)
	defer cancel()
	out, err := s.Exec(ctx, args...)
	if err != nil {
		c.T.Fatal(err)
	}
	return out
}

// ArgonFails runs a command that must fail, and returns the error's line.
func (c *Cluster) ArgonFails(s *devcluster.Server, args ...string) string {
	c.T.Helper()
	ctx, cancel := context.WithTimeout(c.T.Context(), Patience)
	defer cancel()
	out, err := s.Exec(ctx, args...)
	if err == nil {
		c.T.Fatalf("argon %s was carried out:\n%s", strings.Join(args, " "), out)
	}
	return err.Error()
}

// API is a client of a server's local socket, for this test.
func (c *Cluster) API(s *devcluster.Server) *client.Client {
	c.T.Helper()
	api, err := s.Client()
	if err != nil {
		c.T.Fatal(err)
	}
	c.T.Cleanup(api.Close)
	return api
}

// Machine asks a server for a machine's view.
func (c *Cluster) Machine(s *devcluster.Server, name string) (*argonv1.MachineView, error) {
	ctx, cancel := context.WithTimeout(c.T.Context(), 10*time.Second)
	defer cancel()
	res, err := client.Call(ctx, c.API(s).Machines.GetMachine, &argonv1.GetMachineRequest{Name: name})
	return res.GetMachine(), err
}

// Volume asks a server for a volume's view.
func (c *Cluster) Volume(s *devcluster.Server, name string) (*argonv1.VolumeView, error) {
	ctx, cancel := context.WithTimeout(c.T.Context(), 10*time.Second)
	defer cancel()
	res, err := client.Call(ctx, c.API(s).Volumes.GetVolume, &argonv1.GetVolumeRequest{Name: name})
	return res.GetVolume(), err
}

// Status asks a server for the cluster's.
func (c *Cluster) Status(s *devcluster.Server) (*argonv1.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(c.T.Context(), 10*time.Second)
	defer cancel()
	return client.Call(ctx, c.API(s).Cluster.Status, &argonv1.StatusRequest{})
}

// ByID is the server that the cluster knows by an id, as server s says.
func (c *Cluster) ByID(s *devcluster.Server, id string) *devcluster.Server {
	c.T.Helper()
	res, err := c.Status(s)
	if err != nil {
		c.T.Fatal(err)
	}
	for _, v := range res.GetServers() {
		if m := v.GetServer().GetMeta(); m.GetId() == id {
			return c.ByName(m.GetName())
		}
	}
	c.T.Fatalf("no server has the id %s", id)
	return nil
}

// Eventually waits until f returns true; what says what is waited for.
func (c *Cluster) Eventually(what string, f func() bool) {
	c.T.Helper()
	deadline := time.Now().Add(Patience)
	for !f() {
		if time.Now().After(deadline) {
			c.T.Fatalf("still not so after %s: %s", Patience, what)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Running waits until a machine runs on some server other than these, as seen
// by server s, and returns that one's name.
func (c *Cluster) Running(s *devcluster.Server, machine string, not ...string) string {
	c.T.Helper()
	on := ""
	c.Eventually("machine "+machine+" runs (not on "+strings.Join(not, ", ")+")", func() bool {
		m, err := c.Machine(s, machine)
		if err != nil || m.GetMachine().GetStatus().GetState() != argonv1.MachineState_MACHINE_STATE_RUNNING {
			return false
		}
		on = m.GetServerName()
		for _, n := range not {
			if n == on {
				return false
			}
		}
		return true
	})
	return on
}

// Healthy waits until a volume has all its replicas in sync.
func (c *Cluster) Healthy(s *devcluster.Server, volume string) {
	c.T.Helper()
	c.Eventually("volume "+volume+" is healthy", func() bool {
		v, err := c.Volume(s, volume)
		return err == nil && v.GetHealth() == "healthy"
	})
}
