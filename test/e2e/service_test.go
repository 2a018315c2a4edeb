package e2e_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/cluster"
	"github.com/argon-cluster/argon/test/harness"
)

// service is a server as a service manager starts it: a process, and a socket that
// it tells its state on.
type service struct {
	t   *testing.T
	dir string
	// address is where it is reached; of its own for each test.
	address string
	socket  *net.UnixConn
	heard   []string
}

// newService has a small file system for its directory.
func newService(t *testing.T, address string) *service {
	t.Helper()
	harness.NeedRoot(t)
	top, err := os.MkdirTemp("", "argon-service-")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(top) })
	s := &service{t: t, dir: filepath.Join(top, "d"), address: address}
	must(t, os.Mkdir(s.dir, 0o700))
	must(t, unix.Mount("tmpfs", s.dir, "tmpfs", 0, "size=400m"))
	t.Cleanup(func() { must(t, unix.Unmount(s.dir, 0)) })
	s.socket, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(top, "notify")})
	must(t, err)
	t.Cleanup(func() { _ = s.socket.Close() })
	return s
}

// start returns the process; it is stopped with the test.
func (s *service) start() *exec.Cmd {
	s.t.Helper()
	cmd := exec.Command(harness.Binary(s.t), "server", "--dir", s.dir, "--address", s.address)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+s.socket.LocalAddr().String())
	cmd.Stderr = s.t.Output()
	must(s.t, cmd.Start())
	s.t.Cleanup(func() { s.stop(cmd) })
	return cmd
}

func (s *service) stop(cmd *exec.Cmd) {
	s.t.Helper()
	if cmd.ProcessState != nil {
		return
	}
	must(s.t, cmd.Process.Signal(unix.SIGTERM))
	must(s.t, cmd.Wait())
}

// hear waits for a message with all of these in it, one of which may be a line.
// What comes before must have nothing that is not to be said yet.
func (s *service) hear(not string, parts ...string) {
	s.t.Helper()
	must(s.t, s.socket.SetReadDeadline(time.Now().Add(harness.Patience)))
	buf := make([]byte, 4096)
	for {
		n, err := s.socket.Read(buf)
		if err != nil {
			s.t.Fatalf("waiting for %q: %v; heard %q", parts, err, s.heard)
		}
		message := string(buf[:n])
		s.heard = append(s.heard, message)
		if not != "" && strings.Contains(message, not) {
			s.t.Fatalf("waiting for %q: heard %q", parts, s.heard)
		}
		has := true
		for _, p := range parts {
			has = has && strings.Contains(message, p)
		}
		if has {
			return
		}
	}
}

const isReady = "READY=1"

// A server tells the service manager what it waits for at its start, and goes on by
// itself when that has come: another daemon ends, its disk can be written, has room,
// its clock is set.
func TestServiceWaits(t *testing.T) {
	t.Parallel()
	s := newService(t, "127.22.9.1")
	lock, err := os.Create(filepath.Join(s.dir, "lock"))
	must(t, err)
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	cmd := s.start()
	s.hear(isReady, "STATUS=waits: another server uses the directory")
	must(t, lock.Close())
	s.hear("", isReady, "argon init")

	init := exec.CommandContext(t.Context(), harness.Binary(t), "--dir", s.dir, "init")
	out, err := init.CombinedOutput()
	if err != nil {
		t.Fatalf("init: %v: %s", err, out)
	}
	s.hear("", isReady, "STATUS=serves its cluster")
	must(t, cmd.Process.Signal(unix.SIGHUP))
	s.hear(isReady, "RELOADING=1", "MONOTONIC_USEC=")
	s.hear("", isReady)
	must(t, cmd.Process.Signal(unix.SIGTERM))
	s.hear("", "STOPPING=1")
	must(t, cmd.Wait())

	must(t, unix.Mount("", s.dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	cmd = s.start()
	s.hear(isReady, "STATUS=waits:", "read-only file system")
	must(t, unix.Mount("", s.dir, "", unix.MS_REMOUNT, ""))
	s.hear("", isReady)
	s.stop(cmd)

	must(t, os.Remove(filepath.Join(s.dir, "ballast")))
	filler := filepath.Join(s.dir, "filler")
	toTheLastBlock(t, filler)
	cmd = s.start()
	s.hear(isReady, "STATUS=waits:", "MiB free")
	must(t, os.Remove(filler))
	s.hear("", isReady)
	s.stop(cmd)

	// Its certificate is of a host whose clock was two days ahead.
	r, err := cluster.PrepareRecovery(t.Context(), cluster.RecoverOptions{Dir: s.dir, Now: func() time.Time { return time.Now().Add(48 * time.Hour) }})
	must(t, err)
	_, err = r.Carry(t.Context())
	must(t, errors.Join(err, r.Close()))
	s.start()
	s.hear(isReady, "STATUS=waits:", "set the clock")
}
