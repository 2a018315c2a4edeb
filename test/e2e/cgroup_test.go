package e2e_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/argon-cluster/argon/test/harness"
)

// The tests of control groups run on a kernel that has version 2 only, whatever
// this one has: in a guest, in its root group, and in one that was delegated to
// them, as a service manager does.
func TestVersion2Only(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs QEMU, of the package qemu-system-x86")
	}
	program := filepath.Join(t.TempDir(), "cgroup.test")
	build := exec.Command("go", "test", "-c", "-o", program, "./internal/cgroup")
	build.Dir, build.Env = harness.Root(t), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	st, err := os.Stat(program)
	must(t, err)
	must(t, os.Truncate(program, (st.Size()+511)&^511))

	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, "-nodefaults", "-machine", "pc", "-m", "192", "-display", "none", "-serial", "stdio",
		"-accel", "tcg,tb-size=64", "-drive", "format=raw,if=virtio,snapshot=on,file="+harness.TinyImage(t),
		"-drive", "format=raw,if=virtio,snapshot=on,file="+program)
	in, err := cmd.StdinPipe()
	must(t, err)
	out := &safeBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	must(t, cmd.Start())
	defer func() {
		cancel()
		_ = cmd.Wait() // it was killed
	}()
	say := func(command, hear string) string {
		t.Helper()
		before := len(out.Bytes())
		_, err := in.Write([]byte(command))
		must(t, err)
		for !bytes.Contains(out.Bytes()[before:], []byte(hear)) {
			if ctx.Err() != nil {
				t.Fatalf("the guest never says %q:\n%s", hear, out.Bytes())
			}
			time.Sleep(10 * time.Millisecond)
		}
		return string(out.Bytes()[before:])
	}
	say("", "count 1")
	say("mount -t cgroup2 none /sys/fs/cgroup; dd if=/dev/vdb of=/run/t bs=1M 2>/dev/null; chmod 755 /run/t; echo copied $((6 * 7))\n", "copied 42")
	const run = "/run/t -test.v -test.count=5 -test.run "
	for _, tt := range []struct {
		command string
		passes  []string
	}{
		{"mkdir /sys/fs/cgroup/svc; echo '+cpu +memory' >/sys/fs/cgroup/cgroup.subtree_control; " +
			"sh -c \"echo \\$\\$ >/sys/fs/cgroup/svc/cgroup.procs; exec " + run + "TestSet/as\"", []string{"TestSet/as_it_is"}},
		{"TMPDIR=/run " + run + "'TestEnd|TestSweep|TestSet'", []string{"TestEnd/as_it_is", "TestSweep/as_it_is", "TestSet/as_it_is"}},
	} {
		said := say(tt.command+"; echo ended $((40 + $?))\n", "ended 4")
		for _, name := range tt.passes {
			if n := strings.Count(said, "--- PASS: "+name); n != 5 {
				t.Errorf("%s passed %d times of 5:\n%s", name, n, said)
			}
		}
		if strings.Contains(said, "FAIL") {
			t.Errorf("something failed:\n%s", said)
		}
	}
}
