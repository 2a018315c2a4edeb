package e2e_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// Every bad input gets one line that says what is wrong, and leaves nothing
// behind.
func TestBadInput(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	s := c.S(1)
	dir := t.TempDir()
	tiny := harness.TinyImage(t)
	c.Argon(s, "image", "import", "tiny", tiny)
	c.Argon(s, "volume", "create", "data", "--size", "64MiB")
	c.Argon(s, "machine", "create", "m", "--image", "tiny", "--memory", "128MiB", "--stopped", "--publish", "9000:80")
	noise, cut := filepath.Join(dir, "noise.qcow2"), filepath.Join(dir, "cut.qcow2")
	junk := make([]byte, 4096)
	_, _ = rand.Read(junk)
	must(t, os.WriteFile(noise, junk, 0o600))
	qcow := filepath.Join(dir, "whole.qcow2")
	run(t, "qemu-img", "convert", "-O", "qcow2", tiny, qcow)
	whole, err := os.ReadFile(qcow)
	must(t, err)
	must(t, os.WriteFile(cut, whole[:len(whole)/2], 0o600))
	lie, big := filepath.Join(dir, "lie.qcow2"), filepath.Join(dir, "big")
	const sizeAt = 24 // of the disk inside, in a qcow2 header
	large := bytes.Clone(whole)
	binary.BigEndian.PutUint64(large[sizeAt:], 1<<62)
	must(t, os.WriteFile(lie, large, 0o600))
	must(t, os.WriteFile(big, bytes.Repeat([]byte("#"), 64<<10+1), 0o600))
	c.Argon(s, "volume", "create", "alone", "--size", "64MiB", "--replicas", "1")
	keeper := replicaOf(t, c, "alone").Name
	before := everything(c, s)

	for _, tt := range []struct {
		name string
		args []string
		want string // part of the error
	}{
		{"a volume's name twice", []string{"volume", "create", "data", "--size", "1GiB"}, `volume "data" exists already`},
		{"an image's name twice", []string{"image", "import", "tiny", tiny}, `image "tiny" exists already`},
		{"a machine's name twice", []string{"machine", "create", "m", "--image", "tiny"}, `machine "m" exists already`},
		{"a name that is none", []string{"volume", "create", "Data!", "--size", "1GiB"}, "use 1 to 63 of a-z"},
		{"a volume larger than one can be", []string{"volume", "create", "huge", "--size", "1PiB"}, "more than a volume can have"},
		{"a volume that would grow larger than that", []string{"volume", "resize", "data", "1PiB"}, "more than a volume can have"},
		{"no replicas", []string{"volume", "create", "none", "--size", "1GiB", "--replicas", "9"}, "1, 2 and 3 are possible"},
		{"an image that is none", []string{"image", "import", "noise", noise, "--format", "qcow2"}, "noise"},
		{"an image that was cut", []string{"image", "import", "cut", cut}, "cut"},
		{"an image that lies about its size", []string{"image", "import", "lie", lie}, "at most"},
		{"a seed over its limit", []string{"machine", "create", "m2", "--image", "tiny", "--user-data", big}, "at most 65536"},
		{"an image that is not there", []string{"image", "import", "none", filepath.Join(dir, "none")}, "none"},
		{"an image with another checksum", []string{"image", "import", "sum", tiny, "--sha256", strings.Repeat("00", 32)}, "checksum"},
		{"a disk smaller than its image", []string{"machine", "create", "small", "--image", "tiny", "--disk", "1MiB"}, "less than image tiny needs"},
		{"a machine of no image", []string{"machine", "create", "m2", "--image", "none"}, `image "none" does not exist`},
		{"a machine of no volume", []string{"machine", "create", "m2", "--volume", "none"}, `volume "none" does not exist`},
		{"more memory than any server has", []string{"machine", "create", "m2", "--image", "tiny", "--memory", "2TiB"}, "memory"},
		{"a port twice", []string{"machine", "create", "m2", "--image", "tiny", "--publish", "9000:80"}, "9000"},
		{"a volume that a machine has", []string{"machine", "create", "m2", "--volume", "m"}, "volume m"},
		{"removing a volume that a machine has", []string{"volume", "rm", "m"}, "machine m"},
		{"removing a machine that is not there", []string{"machine", "rm", "none"}, `machine "none" does not exist`},
		{"removing a server with the only replica", []string{"server", "rm", keeper}, keeper},
		{"a wrong token", []string{"join", c.S(2).Address, "nonsense"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := c.For(t)
			got := c.ArgonFails(s, tt.args...)
			if strings.Count(strings.TrimSpace(got), "\n") > 0 || !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want one line with %q", got, tt.want)
			}
			if now := everything(c, s); now != before {
				t.Errorf("something was left behind:\n%s\nbefore:\n%s", now, before)
			}
		})
	}

	c.Argon(s, "machine", "start", "m")
	c.Running(s, "m")
}

// everything is all names that the cluster knows.
func everything(c *harness.Cluster, s *devcluster.Server) string {
	c.T.Helper()
	var names []string
	for _, noun := range []string{"server", "image", "volume", "machine"} {
		for line := range strings.Lines(c.Argon(s, noun, "ls")) {
			names = append(names, noun+" "+strings.Fields(line + " -")[0])
		}
	}
	return strings.Join(names, "\n")
}
