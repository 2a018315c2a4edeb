package e2e_test

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// Daemons of this commit and of the one before it in one cluster: a machine writes
// on, fails over between them, and they are restarted in both directions.
func TestOldAndNewDaemons(t *testing.T) {
	before, now := previousBinary(t), harness.Binary(t)
	path := filepath.Join(t.TempDir(), "argon")
	install(t, before, path)
	c := harness.Up(t, devcluster.Options{Servers: 3, Binary: path})
	home := counting(t, c, "2")
	other := c.Other(home.Name)
	w := c.Watch(port, c.Servers()...)
	counts(c, w, 5)

	install(t, now, path) // the guards stay as old as they are
	replaceDaemon(c, other, func(s *devcluster.Server) error { return s.Reload() })
	counts(c, w, 5)
	c.Healthy(other, machine)

	must(t, home.Kill(t.Context()))
	c.Running(other, machine, home.Name)
	counts(c, w, 5)
	must(t, home.Start(t.Context())) // guard and daemon are new
	c.Healthy(other, machine)

	install(t, before, path)
	replaceDaemon(c, home, func(s *devcluster.Server) error { return s.Reload() })
	counts(c, w, 5)
	c.Healthy(other, machine)
	oneCopy(c)
}

// previousBinary builds argon as it was one commit ago.
func previousBinary(t *testing.T) string {
	t.Helper()
	root, dir := harness.Root(t), t.TempDir()
	archive := filepath.Join(dir, "tree.tar")
	git := exec.Command("git", "archive", "--output", archive, "HEAD~1")
	git.Dir = root
	if out, err := git.CombinedOutput(); err != nil {
		t.Skipf("needs the commit before this one, to build it: %v: %s", err, out)
	}
	tree, binary := filepath.Join(dir, "tree"), filepath.Join(dir, "argon-before")
	must(t, os.Mkdir(tree, 0o755))
	if out, err := exec.Command("tar", "-xf", archive, "-C", tree).CombinedOutput(); err != nil {
		t.Fatalf("unpacking the commit before: %v: %s", err, out)
	}
	build := harness.Build(binary)
	build.Dir = tree
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the commit before: %v: %s", err, out)
	}
	return binary
}

// install puts a program in the place of another that may run.
func install(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	must(t, err)
	defer in.Close()
	out, err := os.OpenFile(to+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	must(t, err)
	_, err = io.Copy(out, in)
	must(t, err)
	must(t, out.Close())
	must(t, os.Rename(to+".new", to))
}
