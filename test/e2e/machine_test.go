package e2e_test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// A machine's ordinary life, led through a server that it does not run on.
func TestMachineLife(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
	other := c.Other(home.Name)
	// Its port is open on every server's address.
	for _, s := range c.Servers() {
		w := c.Watch(port, s)
		counts(c, w, 3)
		w.Stop()
	}
	w := c.Watch(port, other)
	counts(c, w, 3)

	// Its console: what it has printed, and what it says to what is typed.
	con := console(t, c, other, machine)
	con.hear("boot, counter was 0")
	con.say("echo $((6 * 7)) is what it says\n")
	con.hear("42 is what it says")

	// Its disk grows while it runs, and its kernel sees that.
	c.Argon(other, "volume", "resize", machine, "1GiB")
	con.say("until [ $(cat /sys/block/vda/size) = $((2048 * 1024)) ]; do sleep 1; done; echo $((1000 + 24)) MiB\n")
	con.hear("1024 MiB")
	counts(c, w, 3)

	// The power button, then a start, and it has lost nothing.
	c.Argon(other, "machine", "stop", machine)
	if n := copies(c); n != 0 {
		t.Errorf("%d guests run after the stop", n)
	}
	if out := c.Argon(other, "events"); strings.Contains(out, "machine-stop-forced") {
		t.Errorf("it did not obey its power button:\n%s", out)
	}
	// What it printed last is still there, on whichever server is asked.
	c.Eventually("its last words are kept", func() bool {
		out, err := other.Exec(t.Context(), "machine", "console", machine)
		return err == nil && strings.Contains(string(out), "reboot: Power down")
	})
	v, err := c.Volume(other, machine)
	must(t, err)
	if !v.GetVolume().GetClean() {
		t.Error("its volume was not left clean")
	}
	c.Argon(other, "machine", "start", machine)
	counts(c, w, 3)

	// Off from inside: it stays off.
	con = console(t, c, other, machine)
	con.hear("boot, counter was")
	con.say("poweroff -f\n")
	c.Eventually("the machine is stopped", func() bool {
		m, err := c.Machine(other, machine)
		return err == nil && m.GetMachine().GetStatus().GetState() == argonv1.MachineState_MACHINE_STATE_STOPPED
	})
	c.Argon(other, "machine", "rm", machine)
	c.Eventually("nothing of it is left", func() bool {
		return !strings.Contains(c.Argon(other, "machine", "ls")+c.Argon(other, "volume", "ls"), machine)
	})
}

// talk is `argon machine console`.
type talk struct {
	c     *harness.Cluster
	stdin io.Writer
	out   *safeBuffer
}

func console(t *testing.T, c *harness.Cluster, s *devcluster.Server, name string) *talk {
	t.Helper()
	cmd := exec.Command(harness.Binary(t), "--dir", s.Dir, "machine", "console", name)
	stdin, err := cmd.StdinPipe()
	must(t, err)
	out := &safeBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	return &talk{c: c, stdin: stdin, out: out}
}

func (k *talk) say(s string) {
	k.c.T.Helper()
	_, err := k.stdin.Write([]byte(s))
	must(k.c.T, err)
}

func (k *talk) hear(s string) {
	k.c.T.Helper()
	k.c.Eventually("the console shows "+s, func() bool { return bytes.Contains(k.out.Bytes(), []byte(s)) })
}

// safeBuffer is written by one goroutine and read by another.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// Bytes is a copy of what was written so far.
func (b *safeBuffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.buf.Bytes())
}

// A replica whose server does not come back is made anew on another.
func TestLostReplicaIsRebuilt(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3, Settings: &argonv1.Settings{ReplicaGraceSeconds: 2}})
	home := counting(t, c, "2")
	w := c.Watch(port, home)
	counts(c, w, 5)
	lost := replicaElsewhere(t, c, home)
	third := c.Other(home.Name, lost.Name)
	must(t, lost.Kill(t.Context()))
	c.Eventually("a replica is in sync on "+third.Name, func() bool {
		v, err := c.Volume(home, machine)
		if err != nil {
			return false
		}
		for _, r := range v.GetVolume().GetReplicas() {
			if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC && c.ByID(home, r.GetServerId()) == third {
				return true
			}
		}
		return false
	})
	counts(c, w, 5)
	// The new one is what the machine goes on with when home is lost, too, now
	// that the first one is back to make a majority.
	must(t, lost.Start(t.Context()))
	c.Healthy(home, machine)
	must(t, home.Kill(t.Context()))
	after := c.Watch(port, third)
	c.Running(third, machine, home.Name)
	c.Eventually("the guest answers", func() bool { return after.Highest() > 0 })
	if r := after.Reports()[0]; r.Found < w.Highest() {
		t.Errorf("the guest found %d after it had told %d", r.Found, w.Highest())
	}
}

// An administrator without an account on any server uses a certificate; one
// without a certificate is refused.
func TestRemoteAdministrator(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 1})
	s := c.S(1)
	certs := filepath.Join(t.TempDir(), "alice")
	c.Argon(s, "client", "create", "alice", certs)
	remote := func(certs string) (string, error) {
		cmd := exec.Command(harness.Binary(t), "--server", s.Address, "--certs", certs, "server", "ls")
		cmd.Env = append(os.Environ(), "ARGON_DIR=")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := remote(certs); err != nil || !strings.Contains(out, s.Name) {
		t.Errorf("with a certificate: %v\n%s", err, out)
	}
	followsServers(t, certs, s)
	other := harness.Up(t, devcluster.Options{Servers: 1})
	foreign := filepath.Join(t.TempDir(), "mallory")
	other.Argon(other.S(1), "client", "create", "mallory", foreign)
	if out, err := remote(foreign); err == nil {
		t.Errorf("with another cluster's certificate:\n%s", out)
	}
	if out, err := remote(t.TempDir()); err == nil {
		t.Errorf("without a certificate:\n%s", out)
	}
	c.Argon(s, "client", "rm", "alice")
	if out, err := remote(certs); err == nil || !strings.Contains(out, "revoked") {
		t.Errorf("with a revoked certificate: %v\n%s", err, out)
	}
	st, err := os.Stat(filepath.Join(s.Dir, "run", "admin.sock"))
	must(t, err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("the local socket has mode %v", st.Mode())
	}
}

// followsServers checks that a certificate comes with the list of servers, that the
// next one is asked where one does not answer, and that the list follows.
func followsServers(t *testing.T, certs string, s *devcluster.Server) {
	t.Helper()
	list := filepath.Join(certs, "servers")
	as := func() string {
		data, err := os.ReadFile(list)
		must(t, err)
		return string(data)
	}
	want := s.Address + ":7440\n"
	if got := as(); got != want {
		t.Errorf("the certificate came with the servers %q, want %q", got, want)
	}
	// Nothing listens there.
	must(t, os.WriteFile(list, []byte("127.0.0.1:1\n"+want), 0o600))
	cmd := exec.Command(harness.Binary(t), "--certs", certs, "server", "ls")
	cmd.Env = append(os.Environ(), "ARGON_DIR=", "ARGON_SERVER=")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), s.Name) {
		t.Errorf("by the list: %v\n%s", err, out)
	}
	if got := as(); got != want {
		t.Errorf("afterwards the list is %q, want %q", got, want)
	}
}
