package guard

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Whoever connects to a socket that is kept waits for the next daemon; nobody is
// turned away meanwhile.
func TestKeptSocket(t *testing.T) {
	w := newWorld(t, "")
	w.must("ready")
	if got := w.ask("serve s"); !strings.Contains(got, "nothing is kept") {
		t.Fatalf("before anything is kept: %q", got)
	}
	w.must("keep s")
	for range 2 {
		daemon := w.must("pid")
		w.signal(w.cmd.Process.Pid, unix.SIGSTOP) // no new daemon yet
		w.signal(daemon, unix.SIGKILL)
		w.gone(daemon)
		nc, err := net.Dial("unix", filepath.Join(w.dir, "s"))
		if err != nil {
			t.Fatalf("while no daemon runs: %v", err)
		}
		w.signal(w.cmd.Process.Pid, unix.SIGCONT)
		w.must("serve s")
		line, err := bufio.NewReader(nc).ReadString('\n')
		if want := fmt.Sprintln("served by", w.must("pid")); err != nil || line != want {
			t.Errorf("got %q, %v, want %q", line, err, want)
		}
		_ = nc.Close()
	}
	w.must("drop s")
	if _, err := net.Dial("unix", filepath.Join(w.dir, "s")); err == nil {
		t.Error("a socket that was dropped still takes connections")
	}
	daemon := w.must("pid")
	w.signal(daemon, unix.SIGKILL)
	w.gone(daemon)
	if got := w.ask("serve s"); !strings.Contains(got, "nothing is kept") {
		t.Errorf("after the drop: %q", got)
	}
}

// A daemon that crashes before it has read an answer resets its connection; the
// guard says so, and nothing about how it reads.
func TestConnectionThatIsReset(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	nc, err := connOf(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Write([]byte("an answer\n")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fds[1]); err != nil {
		t.Fatal(err)
	}
	c := &conn{nc: nc}
	if err := c.serve(t.Context()); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %v", err)
	}
	_ = nc.Close()
}
