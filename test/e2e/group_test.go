package e2e_test

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
	"github.com/argon-cluster/argon/test/harness"
)

// A guest writes each number to its first disk, and when it is there, to its
// second one. Whatever is taken of both while it does so is of one instant: the
// second disk has the number of the first, or the one before.
func TestDisksOfOneInstant(t *testing.T) {
	liveSaving(t)
	c := harness.Up(t, devcluster.Options{Servers: 2})
	s := c.S(1)
	c.Argon(s, "image", "import", "tiny", harness.TinyImage(t))
	c.Argon(s, "volume", "create", "second", "--size", "1MiB")
	c.Healthy(s, "second")
	c.Argon(s, "machine", "create", machine, "--image", "tiny", "--volume", "second", "--memory", "128MiB")
	c.Running(s, machine)
	con := console(t, c, s, machine)
	con.hear("count 1")
	con.say(`put() { printf '%-511s\n' $1 | dd of=$2 bs=512 seek=$3 conv=fsync,notrunc 2>/dev/null; }
n=0; while :; do n=$((n+1)); put $n /dev/vda2 40; put $n /dev/vdb 0; [ $((n % 5)) = 0 ] && echo written $n; done &
`)

	const times = 3
	last := 0
	for i := range times {
		con.hear(fmt.Sprintf("written %d", 5*(i+1)))
		taken, first, second := fmt.Sprintf("group-%d", i), fmt.Sprintf("first-%d", i), fmt.Sprintf("second-%d", i)
		c.Argon(s, "machine", "snapshot", machine, taken)
		c.Argon(s, "volume", "create", first, "--snapshot", machine+"/"+taken)
		c.Argon(s, "volume", "create", second, "--snapshot", "second/"+taken)
		last = compare(t, c, first, second, last)
	}
	c.Argon(s, "machine", "checkpoint", machine, "--name", "then")
	c.Argon(s, "machine", "clone", machine, "twin", "--from", "then")
	c.Running(s, "twin")
	c.Argon(s, "machine", "rm", "twin", "--force", "--keep-volumes")
	c.Argon(s, "machine", "rm", machine, "--force", "--keep-volumes")
	// The twin has gone on from there: its own numbers are further, in order.
	compare(t, c, "twin", "twin-1", last)
}

// compare looks at what the guest has written to two disks, and returns the
// number of the first.
func compare(t *testing.T, c *harness.Cluster, first, second string, after int) int {
	t.Helper()
	a, b := use(c, c.S(1), first), use(c, c.S(1), second)
	defer a.end()
	defer b.end()
	table := sector(t, a.Client, 0)
	const partition = 446 + 16 // the second one
	n := number(t, a.Client, int64(binary.LittleEndian.Uint32(table[partition+8:]))+40)
	m := number(t, b.Client, 0)
	if n < m || n-m > 1 || n < after {
		t.Errorf("the first disk has %d, the second %d; before, the first had %d", n, m, after)
	}
	t.Logf("the first disk has %d, the second %d", n, m)
	return n
}

func sector(t *testing.T, client *nbdtest.Client, at int64) []byte {
	t.Helper()
	data := make([]byte, 512)
	_, err := client.ReadAt(data, at*512)
	must(t, err)
	return data
}

func number(t *testing.T, client *nbdtest.Client, at int64) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(string(sector(t, client, at))))
	must(t, err)
	return n
}
