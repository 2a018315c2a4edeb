package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/argon-cluster/argon/internal/cgroup"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd"
	"github.com/argon-cluster/argon/internal/volume/volumetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = time.Minute // a hang, not a measure

// talker is the boot sector of a guest that says "booted", writes a sector when
// it gets a w (and says W or E), powers itself off when it gets a q, and sends
// everything else back.
func talker() []byte {
	block := make([]byte, 512)
	copy(block, []byte{
		0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, // segments and a stack
		0xba, 0xf8, 0x03, 0xbe, 0x51, 0x7c, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, // print what is at the end
		0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, 0xba, 0xf8, 0x03, 0xec, // wait for a byte on COM1, and read it
		0x3c, 0x71, 0x74, 0x20, // q: power off
		0x3c, 0x77, 0x74, 0x03, // w: write
		0xee, 0xeb, 0xe9, // anything else: send it back
		0xb8, 0x01, 0x03, 0xb9, 0x02, 0x00, 0xba, 0x80, 0x00, 0xbb, 0x00, 0x7c, 0xcd, 0x13, // int 13h: write one sector, behind this one
		0xb0, 0x57, 0x73, 0x02, 0xb0, 0x45, // W if that worked, E if it did not
		0xba, 0xf8, 0x03, 0xeb, 0xe4, // send that
		0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, // power off: PIIX4, S5
		0x62, 0x6f, 0x6f, 0x74, 0x65, 0x64, 0x0a, 0x00, // "booted\n"
	})
	block[510], block[511] = 0x55, 0xaa
	return block
}

// processes is a Launcher; see its words.
type processes struct {
	mu   sync.Mutex
	wg   sync.WaitGroup
	byID map[string]*process
	// limits are what was set last.
	limits cgroup.Limits
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func (l *processes) Start(_ context.Context, p Process) (int, error) {
	log, err := os.OpenFile(p.LogPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command(p.Path, p.Args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, p.Dir
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	one := &process{cmd, make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limits = p.Limits
	l.byID[p.ID] = one
	l.wg.Go(func() {
		_ = cmd.Wait()
		l.mu.Lock()
		delete(l.byID, p.ID)
		l.mu.Unlock()
		close(one.done)
	})
	return cmd.Process.Pid, nil
}

func (l *processes) find(id string) *process {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.byID[id]
}

func (l *processes) Kill(_ context.Context, id string) error {
	if p := l.find(id); p != nil {
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	return nil
}

func (l *processes) List(context.Context) ([]Running, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var list []Running
	for id, p := range l.byID {
		list = append(list, Running{id, p.cmd.Process.Pid})
	}
	return list, nil
}

// Limit keeps the limits for the test to see.
func (l *processes) Limit(_ context.Context, id string, limits cgroup.Limits) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limits = limits
	if l.byID[id] == nil {
		return errors.New("it does not run")
	}
	return nil
}

func (l *processes) Done(id string) <-chan struct{} {
	if p := l.find(id); p != nil {
		return p.done
	}
	gone := make(chan struct{})
	close(gone)
	return gone
}

// world is one guest with its disk.
type world struct {
	t        *testing.T
	dir      string
	launcher *processes
	monitor  *Monitor
	disk     *volumetest.MemDevice
	nbd      *nbd.Server
	spec     hypervisor.Spec
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if _, err := exec.LookPath(DefaultBinary); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	dir, err := os.MkdirTemp("", "argon-qemu-")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, launcher: &processes{byID: map[string]*process{}}, disk: volumetest.New(1<<20, 1)}
	w.monitor = w.newMonitor()
	w.spec = hypervisor.Spec{
		ID: "g", Name: "a,b", CPUs: 1, MemoryBytes: 64 << 20, Acceleration: hypervisor.TCG,
		Disks: []hypervisor.Disk{{Socket: filepath.Join(dir, "d.nbd"), Export: "e,x", Serial: "s1"}},
		Dir:   w.guestDir("g"), Generation: startedAs,
	}
	if err := os.Mkdir(w.spec.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w.serveDisk()
	w.write(0, talker())
	t.Cleanup(func() {
		for _, r := range must1(w.launcher.List(context.Background())) {
			_ = w.launcher.Kill(context.Background(), r.ID)
		}
		w.launcher.wg.Wait()
		w.monitor.Close()
		_ = w.nbd.Close()
		_ = w.disk.Close()
		_ = os.RemoveAll(dir)
	})
	return w
}

func (w *world) guestDir(id string) string { return filepath.Join(w.dir, "guest-"+id) }

func (w *world) newMonitor() *Monitor {
	return New(Options{Launcher: w.launcher, Dir: w.guestDir, Log: slog.New(slog.DiscardHandler)})
}

func (w *world) serveDisk() {
	w.t.Helper()
	s, err := nbd.Serve(context.Background(), nbd.Options{
		SocketPath: w.spec.Disks[0].Socket, Device: w.disk, Export: w.spec.Disks[0].Export, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.nbd = s
}

func (w *world) write(off int64, data []byte) {
	w.t.Helper()
	done := make(chan error, 1)
	w.disk.Submit(&volume.Request{Op: volume.OpWrite, Off: off, Len: int64(len(data)), Data: data, Done: func(err error) { done <- err }})
	if err := <-done; err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) start() hypervisor.Guest {
	w.t.Helper()
	g, err := w.monitor.Start(w.t.Context(), w.spec)
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// forgetful starts processes, and does not come to say so.
type forgetful struct{ *processes }

func (l forgetful) Start(ctx context.Context, p Process) (int, error) {
	if _, err := l.processes.Start(ctx, p); err != nil {
		return 0, err
	}
	return 0, context.DeadlineExceeded
}

// A guest that was started, though nobody has heard so in time, is ended: the next
// one of its id can be started.
func TestStartWithoutAnAnswer(t *testing.T) {
	w := newWorld(t)
	monitor := New(Options{Launcher: forgetful{w.launcher}, Dir: w.guestDir, Log: slog.New(slog.DiscardHandler)})
	defer monitor.Close()
	if _, err := monitor.Start(t.Context(), w.spec); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if got := must1(w.monitor.List(t.Context())); len(got) != 0 {
		t.Errorf("%v run", got)
	}
}

// QEMU's last words become a part of records, and may be a guest's.
func TestExplainIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "qemu.log")
	if err := os.WriteFile(path, []byte("first\n\x1b[2J"+strings.Repeat("x", 1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	err := explain(errors.New("gone"), path)
	if got := err.Error(); len(got) > mostSaid+100 || strings.ContainsRune(got, '\x1b') || !strings.HasPrefix(got, "QEMU says: [2Jxxx") {
		t.Errorf("%d bytes: %.100q", len(got), got)
	}
}

// A guest that was there before may have put a link where its firmware's settings
// go.
func TestFirmwareGoesThroughNoLink(t *testing.T) {
	dir := t.TempDir()
	from, other, to := filepath.Join(dir, "from"), filepath.Join(dir, "other"), filepath.Join(dir, "to")
	for _, path := range []string{from, other} {
		if err := os.WriteFile(path, []byte(path), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(other, to); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := copyFile(from, to); err != nil {
			t.Fatal(err)
		}
		if data := must1(os.ReadFile(to)); string(data) != from {
			t.Errorf("it is %q", data)
		}
	}
	if data := must1(os.ReadFile(other)); string(data) != other {
		t.Errorf("what the link led to is %q", data)
	}
}

// QEMU hangs when its monitor's connection has broken: who wants something of it
// waits no longer than he wants to, whoever else does.
func TestMonitorThatHangs(t *testing.T) {
	dir := t.TempDir()
	ln, err := net.Listen("unix", monitorSocket(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		fmt.Fprintln(theirs, `{"QMP":{}}`)
		if _, err := bufio.NewReader(theirs).ReadString('\n'); err == nil {
			fmt.Fprintln(theirs, `{"return":{},"id":1}`)
		}
	}()
	client, err := qmp.New(t.Context(), ours, nil)
	if err != nil {
		t.Fatal(err)
	}
	<-client.Done()
	g := &guest{dir: dir, pid: os.Getpid(), done: make(chan struct{}), qmp: client, dialling: make(chan struct{}, 1), news: make(chan struct{}, 1)}
	defer g.letGo()
	patient, giveUp := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := g.Status(patient)
		first <- err
	}()
	held, err := ln.Accept() // and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := g.PressPower(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	giveUp()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first got %v", err)
	}
}

// A guest may make its sockets links to others: nobody is taken for its QEMU who is
// not.
func TestForeignSocket(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	ln, err := net.Listen("unix", filepath.Join(w.dir, "other.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, path := range []string{displaySocket(w.spec.Dir), agentSocket(w.spec.Dir), consoleSocket(w.spec.Dir), monitorSocket(w.spec.Dir)} {
		if conn, err := dial(t.Context(), path, g.PID()); err != nil {
			t.Error(err)
		} else {
			_ = conn.Close()
		}
		if err := errors.Join(os.Remove(path), os.Symlink(ln.Addr().String(), path)); err != nil {
			t.Fatal(err)
		}
		if _, err := dial(t.Context(), path, g.PID()); !errors.Is(err, errForeign) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := g.Display(t.Context()); !errors.Is(err, errForeign) {
		t.Errorf("its screen: %v", err)
	}
}

// talk is an open console.
type talk struct {
	t    *testing.T
	rwc  io.ReadWriteCloser
	seen chan byte
	wg   sync.WaitGroup
}

func listen(t *testing.T, g hypervisor.Guest) *talk {
	t.Helper()
	rwc, err := g.Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &talk{t: t, rwc: rwc, seen: make(chan byte, 1<<20)}
	c.wg.Go(func() {
		defer close(c.seen)
		for b := make([]byte, 100); ; {
			n, err := rwc.Read(b)
			for _, one := range b[:n] {
				c.seen <- one
			}
			if err != nil {
				return
			}
		}
	})
	t.Cleanup(func() {
		_ = rwc.Close()
		c.wg.Wait()
	})
	return c
}

func (c *talk) say(s string) {
	c.t.Helper()
	if _, err := c.rwc.Write([]byte(s)); err != nil {
		c.t.Fatal(err)
	}
}

// hear waits until the guest has printed something.
func (c *talk) hear(want string) {
	c.t.Helper()
	var got []byte
	for timeout := time.After(patience); !bytes.Contains(got, []byte(want)); {
		select {
		case b, ok := <-c.seen:
			if !ok {
				c.t.Fatalf("the console ended after %q, waiting for %q", got, want)
			}
			got = append(got, b)
		case <-timeout:
			c.t.Fatalf("heard %q, waiting for %q", got, want)
		}
	}
}

func until(t *testing.T, g hypervisor.Guest, want hypervisor.Status) {
	t.Helper()
	var got hypervisor.Status
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var err error
		if got, err = g.Status(t.Context()); err == nil && got == want {
			return
		}
	}
	t.Fatalf("status %+v, want %+v", got, want)
}

func TestConsole(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	a := listen(t, g)
	a.hear("booted\n")
	b := listen(t, g)
	b.hear("booted\n") // the history
	a.say("x")
	a.hear("x")
	b.hear("x")
	b.say("y")
	a.hear("y")
	_ = b.rwc.Close()
	a.say("z")
	a.hear("z")
}

func TestStatusAndKill(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
	if got := must1(w.monitor.List(t.Context())); len(got) != 1 || got[0] != "g" || g.ID() != "g" {
		t.Errorf("%v run", got)
	}
	c := listen(t, g)
	if err := g.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	c.wg.Wait() // its console ends with it
	if _, err := g.Status(t.Context()); err == nil {
		t.Error("a guest that is gone has a status")
	}
	if _, err := w.monitor.Adopt(t.Context(), "g"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was taken up: %v", err)
	}
}

// A QEMU that a signal has stopped says nothing: the guest is halted, and goes on
// with it.
func TestHalted(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
	signal := func(s syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(g.PID(), s); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	until(t, g, hypervisor.Status{State: hypervisor.Halted, Detail: "stopped by a signal"})
	signal(syscall.SIGCONT)
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
	if isStopped(os.Getpid()) || isStopped(1<<30) {
		t.Error("a process that runs, or none, is stopped")
	}
}

// A guest that has powered itself off says so, also to a daemon that was not
// there then.
func TestPowerOff(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	c.say("q")
	want := hypervisor.Status{State: hypervisor.ShutDown, Detail: "shutdown"}
	until(t, g, want)
	w.monitor.Close()
	w.monitor = w.newMonitor()
	g, err := w.monitor.Adopt(t.Context(), "g")
	if err != nil {
		t.Fatal(err)
	}
	until(t, g, want)
}

// The daemon is restarted: the new one finds guest and history.
func TestAdopt(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	pid := g.PID()
	w.monitor.Close()
	c.wg.Wait()

	w.monitor = w.newMonitor()
	g, err := w.monitor.Adopt(t.Context(), "g")
	if err != nil {
		t.Fatal(err)
	}
	if g.PID() != pid {
		t.Errorf("pid %d, was %d", g.PID(), pid)
	}
	c = listen(t, g)
	c.hear("booted")
	for {
		// The console's connection is made in the background.
		if _, err := c.rwc.Write([]byte("x")); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.hear("x")
}

// The volume's socket goes away while the guest writes, and comes back: the
// guest sees a slow disk.
func TestDiskAway(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	_ = w.nbd.Close()
	c.say("w")
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
	w.serveDisk()
	c.hear("W")
	if got := w.disk.Bytes()[512:1024]; !bytes.Equal(got, talker()) {
		t.Error("what the guest wrote is not on the disk")
	}
}

// A volume that fails a write, full or broken, stops the guest; when it works
// again, the guest goes on and never knew.
func TestDiskFails(t *testing.T) {
	for _, failure := range []error{volume.ErrNoSpace, errors.New("broken")} {
		t.Run(failure.Error(), func(t *testing.T) {
			w := newWorld(t)
			var fails atomic.Bool
			w.disk.Judge(func(r *volume.Request) error {
				if r.Op == volume.OpWrite && fails.Load() {
					return failure
				}
				return nil
			})
			g := w.start()
			c := listen(t, g)
			c.hear("booted")
			fails.Store(true)
			c.say("w")
			for range 2 { // the second time after it was told to try again
				until(t, g, hypervisor.Status{State: hypervisor.Paused, Detail: "io-error"})
				if err := g.Resume(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			until(t, g, hypervisor.Status{State: hypervisor.Paused, Detail: "io-error"})
			fails.Store(false)
			if err := g.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.hear("W")
		})
	}
}

// What stops QEMU from starting is told in its own words, and nothing is left.
func TestStartFails(t *testing.T) {
	w := newWorld(t)
	w.spec.Ports = []hypervisor.Port{{HostAddress: "192.0.2.1", HostPort: 1, GuestPort: 80}} // RFC 5737: nobody's
	_, err := w.monitor.Start(t.Context(), w.spec)
	if err == nil || !strings.Contains(err.Error(), "Could not set up host forwarding rule") {
		t.Errorf("got %v", err)
	}
	if got := must1(w.monitor.List(t.Context())); len(got) != 0 {
		t.Errorf("%v run", got)
	}
	w.spec.Ports = nil
	w.start()
}

func TestNoQEMU(t *testing.T) {
	m := New(Options{Binary: "qemu-that-is-not-there", Log: slog.New(slog.DiscardHandler)})
	defer m.Close()
	if _, err := m.Probe(t.Context()); err == nil || !strings.Contains(err.Error(), "install QEMU") {
		t.Errorf("probe: %v", err)
	}
	if _, err := m.Start(t.Context(), hypervisor.Spec{}); err == nil || !strings.Contains(err.Error(), "install QEMU") {
		t.Errorf("start: %v", err)
	}
}

// What the probe runs does run where guests do.
func TestBootSector(t *testing.T) {
	path, err := exec.LookPath(DefaultBinary)
	if err != nil {
		t.Skip("needs QEMU: ", err)
	}
	if err := bootSector(t.Context(), path, hypervisor.TCG, nil); err != nil {
		t.Error(err)
	}
}

// The probe believes only what it has seen run.
func TestProbe(t *testing.T) {
	w := newWorld(t)
	p, err := w.monitor.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", p)
	if (p.Acceleration == hypervisor.TCG) != (p.Reason != "") || p.Version == "" {
		t.Errorf("%+v", p)
	}
	if strings.Contains(p.Reason, "\n") {
		t.Errorf("the reason has several lines: %q", p.Reason)
	}
}

func TestLogIsShortened(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(consoleLog(dir), bytes.Repeat([]byte("old\n"), 100), 0o600); err != nil {
		t.Fatal(err)
	}
	c := newConsole(dir, os.Getpid(), slog.New(slog.DiscardHandler))
	line := append(bytes.Repeat([]byte("x"), 1023), '\n')
	for range 2 * logSize / len(line) {
		c.print(line)
	}
	st, err := os.Stat(consoleLog(dir))
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() != historySize {
		t.Errorf("the log is %d bytes long", st.Size())
	}
	if again := newConsole(dir, os.Getpid(), c.log); !bytes.Equal(again.history, c.history) {
		t.Error("the history is another one after a restart")
	}
}
