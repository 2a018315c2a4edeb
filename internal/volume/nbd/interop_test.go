package nbd_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/argon-cluster/argon/internal/volume"
)

// The clients here were written by others.

// run runs a program, or skips the test if this host does not have it.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = t.TempDir() // fio leaves files behind
	// nbdsh wants the python that the distribution's module is for.
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin:"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func uri(path string) string { return "nbd+unix:///disk?socket=" + path }

func TestNbdinfo(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	var info struct {
		Protocol   string
		Structured bool
		Exports    []struct {
			Name       string   `json:"export-name"`
			Size       int64    `json:"export-size"`
			Contexts   []string `json:"contexts"`
			DF         bool     `json:"can_df"`
			FUA        bool     `json:"can_fua"`
			Flush      bool     `json:"can_flush"`
			FastZero   bool     `json:"can_fast_zero"`
			MultiConn  bool     `json:"can_multi_conn"`
			Trim       bool     `json:"can_trim"`
			Zero       bool     `json:"can_zero"`
			ReadOnly   bool     `json:"is_read_only"`
			BlockMin   int      `json:"block_size_minimum"`
			BlockPref  int      `json:"block_size_preferred"`
			MaxPayload int      `json:"block_size_maximum"`
		}
	}
	out := run(t, "nbdinfo", "--json", "--list", uri(path))
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 1 {
		t.Fatalf("%s", out)
	}
	e := info.Exports[0]
	if e.Name != "disk" || e.Size != testSize || e.ReadOnly || e.BlockMin != 512 || e.BlockPref != 4096 || e.MaxPayload != 32<<20 {
		t.Errorf("%s", out)
	}
	if !e.DF || !e.FUA || !e.Flush || !e.FastZero || !e.MultiConn || !e.Trim || !e.Zero {
		t.Errorf("%s", out)
	}
	if len(e.Contexts) != 1 || e.Contexts[0] != "base:allocation" {
		t.Errorf("contexts %v", e.Contexts)
	}
}

func TestNbdinfoMap(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 64k 8k", uri(path))
	var extents []struct {
		Offset, Length int64
		Type           int
	}
	out := run(t, "nbdinfo", "--json", "--map", uri(path))
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatal(err)
	}
	if len(extents) != 3 || extents[1].Offset != 64<<10 || extents[1].Length != 8<<10 || extents[1].Type != 0 || extents[0].Type != 3 {
		t.Errorf("%s", out)
	}
}

func TestNbdcopy(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	want := make([]byte, testSize)
	copy(want[1<<20:], pattern(1<<20, 3))
	if err := os.WriteFile(in, want, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "nbdcopy", "--flush", in, uri(path))
	if !bytes.Equal(d.Bytes(), want) {
		t.Error("the copy in differs")
	}
	d.PowerCut()
	run(t, "nbdcopy", uri(path), out)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the copy out differs")
	}
}

func TestQemuIO(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	out := run(t, "qemu-io", "-f", "raw",
		"-c", "write -P 1 0 1M",
		"-c", "write -f -P 2 512 512",
		"-c", "write -z 4k 4k",
		"-c", "write -z -u 8k 4k",
		"-c", "discard 16k 64k",
		"-c", "flush",
		"-c", "aio_write -P 3 100k 100k",
		"-c", "aio_read -P 1 512k 100k",
		"-c", "aio_flush",
		"-c", "read -P 1 0 512",
		"-c", "read -P 2 512 512",
		"-c", "read -P 0 4k 8k",
		"-c", "read -P 3 100k 100k",
		uri(path))
	for _, bad := range []string{"failed", "error", "Pattern"} {
		if strings.Contains(out, bad) {
			t.Fatalf("%s", out)
		}
	}
	if out := run(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 2 512 512", uri(path)); strings.Contains(out, "Pattern") {
		t.Errorf("%s", out)
	}
}

func TestQemuImg(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	qcow := filepath.Join(t.TempDir(), "in.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", qcow, fmt.Sprint(testSize))
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 300k", qcow)
	if _, err := dial(t, path, dialects["default export"]).WriteAt(pattern(testSize, 1), 0); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, uri(path))
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, uri(path))
	back := filepath.Join(t.TempDir(), "out.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(path), back)
	run(t, "qemu-img", "compare", qcow, back)
}

// TestQemuImgMap: copies skip what block status calls a hole.
func TestQemuImgMap(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "write -z 2M 64k", "-c", "write -z -u 3M 64k", uri(path))
	type extent struct {
		Start, Length int64
		Data, Zero    bool
	}
	var got []extent
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "-f", "raw", "--output=json", uri(path))), &got); err != nil {
		t.Fatal(err)
	}
	want := []extent{
		{0, 1 << 20, false, true},
		{1 << 20, 64 << 10, true, false},
		{1<<20 + 64<<10, testSize - 1<<20 - 64<<10, false, true},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	// What it takes for zeros, it does not read.
	var read atomic.Int64
	d.Judge(func(r *volume.Request) error {
		if r.Op == volume.OpRead {
			read.Add(r.Len)
		}
		return nil
	})
	out := filepath.Join(t.TempDir(), "out")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri(path), out)
	if n := read.Load(); n > 1<<20 {
		t.Errorf("%d bytes were read to copy 64 KiB of data", n)
	}
	d.Judge(nil)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri(path), out)
}

// TestNbdsh runs the checks in testdata/checks.py, with libnbd as the client.
func TestNbdsh(t *testing.T) {
	checks, err := filepath.Abs("testdata/checks.py")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"announces", "haggles", "tls", "old_handshake", "reads", "status", "contexts_of_another_name",
		"refuses", "zeroes_and_trims", "many_connections", "pipelines",
	} {
		t.Run(name, func(t *testing.T) {
			path, _ := serve(t, memDevice(t))
			run(t, "nbdsh", "-n", "-c", fmt.Sprintf("exec(open(%q).read())", checks), "-c", fmt.Sprintf("%s(%q)", name, path))
		})
	}
}

// TestFio lets fio write, trim and flush at random, and read again what it wrote.
func TestFio(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("fio is not installed")
	}
	if !strings.Contains(run(t, "fio", "--enghelp"), "\tnbd\n") {
		t.Skip("this fio has no NBD engine")
	}
	const jobs = 4
	own := []string{fmt.Sprint("--size=", testSize/jobs), fmt.Sprint("--offset_increment=", testSize/jobs), fmt.Sprint("--numjobs=", jobs)}
	all := []string{fmt.Sprint("--size=", testSize)}
	for name, args := range map[string][]string{
		"writes":       append(all, "--rw=randwrite", "--bs=4k", "--iodepth=32"),
		"sectors":      append(all, "--rw=randwrite", "--bs=512", "--iodepth=64"),
		"any size":     append(all, "--rw=randwrite", "--bsrange=512-256k", "--blockalign=512", "--iodepth=16", "--verify_async=2", "--serialize_overlap=1"),
		"mix, 4 jobs":  append(own, "--rw=randrw", "--bs=4k", "--iodepth=16", "--fsync=16", "--verify_async=2"),
		"trim, 4 jobs": append(own, "--rw=randtrimwrite", "--bs=4k", "--iodepth=1", "--fdatasync=32"),
	} {
		t.Run(name, func(t *testing.T) {
			path, _ := serve(t, memDevice(t))
			out := run(t, "fio", append([]string{
				"--name=verify", "--ioengine=nbd", "--uri=" + uri(path), "--thread=1",
				"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=7",
			}, args...)...)
			if !strings.Contains(out, "err= 0") || strings.Contains(out, "err=8") {
				t.Errorf("%s", out)
			}
		})
	}
}
