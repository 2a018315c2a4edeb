package e2e_test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// Clients that others wrote use a replicated volume on a server that has a
// replica and on one that has none: fio writes, trims and flushes at random and
// reads all again, qemu-img copies images there and back, libnbd finds what the
// protocol's document promises.
func TestClients(t *testing.T) {
	for name, pkg := range map[string]string{"fio": "fio", "nbdsh": "python3-libnbd", "nbdinfo": "libnbd-bin", "qemu-img": "qemu-utils"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("needs %s, of the package %s", name, pkg)
		}
	}
	c := harness.Up(t, devcluster.Options{Servers: 3})
	c.Argon(c.S(1), "volume", "create", "data", "--size", "64MiB")
	near := replicaOf(t, c, "data")
	far := c.Other(near.Name, withReplica(c, near, "data", near).Name)
	for _, s := range []*devcluster.Server{near, far} {
		uri, end, err := c.Connect(s, "data")
		if err != nil {
			t.Fatal(err)
		}
		fio(t, uri)
		qemuImg(t, uri)
		libnbd(t, uri)
		c.Argon(s, "volume", "resize", "data", fmt.Sprintf("%dB", sizeOf(t, uri)+8<<20))
		end()
	}
	u := use(c, near, "data")
	defer u.end()
	if u.Size != 80<<20 {
		t.Errorf("a connection after two times 8 MiB of growth is told %d bytes", u.Size)
	}
	c.Healthy(near, "data")
}

func fio(t *testing.T, uri string) {
	t.Helper()
	for _, args := range [][]string{
		{"--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--iodepth=16", "--size=32M", "--verify_async=2", "--serialize_overlap=1"},
		{"--rw=randrw", "--bs=4k", "--iodepth=8", "--size=8M", "--offset_increment=8M", "--numjobs=4", "--fsync=16"},
		{"--rw=randtrimwrite", "--bs=4k", "--iodepth=1", "--size=4M", "--offset_increment=8M", "--numjobs=2", "--fdatasync=32"},
	} {
		run(t, "fio", append([]string{
			"--name=e2e", "--ioengine=nbd", "--uri=" + uri, "--thread=1", "--aux-path=" + t.TempDir(),
			"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=7", "--end_fsync=1",
		}, args...)...)
	}
}

func qemuImg(t *testing.T, uri string) {
	t.Helper()
	in, out := filepath.Join(t.TempDir(), "in.qcow2"), filepath.Join(t.TempDir(), "out.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", in, fmt.Sprint(sizeOf(t, uri)))
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 3M", "-c", "write -P 8 30M 512", in)
	run(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", in, uri)
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", in, uri)
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, out)
	run(t, "qemu-img", "compare", in, out)
}

// libnbd asks for what only a protocol's letter says.
func libnbd(t *testing.T, uri string) {
	t.Helper()
	run(t, "sh", "-c", `PATH=/usr/bin:/bin exec nbdsh -u "$1" -c "$2"`, "sh", uri, `
import errno
assert h.get_protocol() == "newstyle-fixed" and h.get_structured_replies_negotiated()
assert h.can_multi_conn() and h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_df()
h.set_strict_mode(0)
def fails(want, what, *args):
    try:
        what(*args)
    except nbd.Error as e:
        assert e.errnum == want, e
    else:
        raise AssertionError(args)
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.pread, 100, 0)
fails(errno.ENOSPC, h.pwrite, bytes(512), size)
fails(errno.EOVERFLOW, h.pread, 64 << 20, 0)
h.zero(1 << 20, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.pwrite(b"z" * 1024, 512, nbd.CMD_FLAG_FUA)
assert h.pread(2048, 0) == bytes(512) + b"z" * 1024 + bytes(512)
h.trim(1 << 20, 0)
h.flush()
assert h.pread(2048, 0) == bytes(2048)
`)
}

// sizeOf is what nbdinfo says.
func sizeOf(t *testing.T, uri string) int64 {
	t.Helper()
	var info struct {
		Exports []struct {
			Size int64 `json:"export-size"`
		}
	}
	if err := json.Unmarshal(run(t, "nbdinfo", "--json", uri), &info); err != nil || len(info.Exports) != 1 {
		t.Fatalf("nbdinfo of %s: %v", uri, err)
	}
	return info.Exports[0].Size
}
