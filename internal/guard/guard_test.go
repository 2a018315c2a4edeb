package guard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/boottime"
	"github.com/argon-cluster/argon/internal/cgroup"
)

// The tests run real processes: this program again, as guard or daemon.
const (
	roleName = "ARGON_GUARD_TEST_ROLE"
	dirName  = "ARGON_GUARD_TEST_DIR"
	// mountsName holds other mounts than there are, watchdogName a watchdog.
	mountsName   = "ARGON_GUARD_TEST_MOUNTS"
	watchdogName = "ARGON_GUARD_TEST_WATCHDOG"
	patience     = 30 * time.Second // a hang, not a measure
	finalCode    = 3
)

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleName); role {
	case "":
		goleak.VerifyTestMain(m)
	case "guard":
		os.Exit(beGuard())
	case "daemon":
		os.Exit(beDaemon())
	case "waits":
		waitForEver()
	}
}

func beGuard() int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	_ = os.Setenv(roleName, "daemon")
	restart := make(chan os.Signal, 1)
	signal.Notify(restart, unix.SIGHUP)
	err := Run(ctx, Options{
		Daemon: []string{os.Args[0]}, Final: finalCode, Watchdog: os.Getenv(watchdogName), Restart: restart,
		Groups: groupsOf(os.Getenv(dirName)),
		Log:    slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if exit := (*ExitError)(nil); errors.As(err, &exit) {
		return exit.Code
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// groupsOf is what a guard's control groups are made by.
func groupsOf(dir string) cgroup.Options {
	return cgroup.Options{Name: "argon-test-" + filepath.Base(filepath.Dir(dir)), Mounts: os.Getenv(mountsName)}
}

// beDaemon carries out what the test writes to its socket, a line each.
func beDaemon() int {
	dir := os.Getenv(dirName)
	if code, err := os.ReadFile(filepath.Join(dir, "exit")); err == nil {
		n, _ := strconv.Atoi(string(code))
		return n
	}
	c, err := Connect(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGHUP)
	go func() {
		<-stop
		_ = os.WriteFile(filepath.Join(dir, "stopped"), nil, 0o600)
		os.Exit(0)
	}()
	socket := filepath.Join(dir, "control")
	_ = os.Remove(socket)
	ln, err := net.Listen("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for {
		nc, err := ln.Accept()
		if err != nil {
			return 1
		}
		go func() {
			defer nc.Close()
			line, _ := bufio.NewReader(nc).ReadString('\n')
			fmt.Fprintln(nc, obey(c, dir, strings.Fields(line)))
		}()
	}
}

func obey(c *Client, dir string, words []string) string {
	ctx := context.Background()
	arg := func(i int) string { return append(words, "", "")[i] }
	var err error
	switch words[0] {
	case "pid":
		return strconv.Itoa(os.Getpid())
	case "ready":
		err = c.Ready(ctx)
	case "deadline":
		d, _ := time.ParseDuration(arg(1))
		err = c.SetDeadline(ctx, boottime.Now()+d)
	case "lower":
		d, _ := time.ParseDuration(arg(1))
		err = c.LimitDeadline(ctx, boottime.Now()+d)
	case "exit":
		code, _ := strconv.Atoi(arg(1))
		os.Exit(code)
	case "start":
		var pid int
		if pid, err = c.Start(ctx, Process{ID: arg(1), Path: "sleep", Args: []string{"3600"}, Dir: dir, LogPath: filepath.Join(dir, arg(1)+".log")}); err == nil {
			return strconv.Itoa(pid)
		}
	case "run": // a program with arguments
		var pid int
		if pid, err = c.Start(ctx, Process{ID: arg(1), Path: words[2], Args: words[3:], Dir: dir, LogPath: filepath.Join(dir, arg(1)+".log")}); err == nil {
			return strconv.Itoa(pid)
		}
	case "keep": // a socket
		var ln net.Listener
		if ln, err = net.Listen("unix", filepath.Join(dir, arg(1))); err == nil {
			var f *os.File
			if f, err = ln.(*net.UnixListener).File(); err == nil {
				err = c.Keep(ctx, arg(1), f)
				_ = f.Close()
			}
			ln.(*net.UnixListener).SetUnlinkOnClose(false)
			_ = ln.Close()
		}
	case "drop":
		err = c.Drop(ctx, arg(1))
	case "serve": // one connection to what is kept
		f := c.Kept(arg(1))
		if f == nil {
			return "error: nothing is kept"
		}
		var ln net.Listener
		if ln, err = net.FileListener(f); err == nil {
			_ = f.Close()
			var nc net.Conn
			if nc, err = ln.Accept(); err == nil {
				fmt.Fprintln(nc, "served by", os.Getpid())
				_ = nc.Close()
			}
			_ = ln.Close()
		}
	case "limit":
		percent, _ := strconv.Atoi(arg(2))
		err = c.Limit(ctx, arg(1), cgroup.Limits{CPUPercent: uint32(percent)})
	case "about":
		var about About
		if about, err = c.About(ctx); err == nil {
			return about.Text
		}
	case "kill":
		err = c.Kill(ctx, arg(1))
	case "done":
		<-c.Done(arg(1))
	case "list":
		guests, lerr := c.List(ctx)
		var s []string
		for _, g := range guests {
			s = append(s, fmt.Sprintf("%s=%d", g.ID, g.PID))
		}
		slices.Sort(s)
		if lerr == nil {
			return strings.Join(s, " ")
		}
		err = lerr
	case "garbage":
		_, err = c.nc.Write([]byte("{\"seq\":\n"))
	case "flood":
		_, err = c.nc.Write([]byte(strings.Repeat("x", 2*maxLine)))
	}
	if err != nil {
		return "error: " + err.Error()
	}
	return "ok"
}

// world is a guard with its processes.
type world struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

func newWorld(t *testing.T, exit string, env ...string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	w.run(exit, env...)
	return w
}

// run starts the guard.
func (w *world) run(exit string, env ...string) {
	t := w.t
	t.Helper()
	if exit != "" {
		if err := os.WriteFile(filepath.Join(w.dir, "exit"), []byte(exit), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.cmd = exec.Command(os.Args[0])
	w.cmd.Env = append(append(os.Environ(), roleName+"=guard", dirName+"="+w.dir), env...)
	w.cmd.Stderr = os.Stderr
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cmd := w.cmd
	t.Cleanup(func() {
		// In order, so that no control groups are left.
		_ = cmd.Process.Signal(unix.SIGCONT)
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
		if tree, err := cgroup.Open(groupsOf(w.dir)); err == nil {
			tree.Close() // what a guard that was killed left
		}
	})
}

// ask has the daemon do something, as soon as there is one.
func (w *world) ask(format string, args ...any) string {
	w.t.Helper()
	var reply string
	w.until("the daemon answers", func() bool {
		nc, err := net.Dial("unix", filepath.Join(w.dir, "control"))
		if err != nil {
			return false
		}
		defer nc.Close()
		_ = nc.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(nc, format+"\n", args...)
		reply, err = bufio.NewReader(nc).ReadString('\n')
		return err == nil
	})
	return strings.TrimSpace(reply)
}

// must has the daemon do something that must work, and returns a pid.
func (w *world) must(format string, args ...any) int {
	w.t.Helper()
	reply := w.ask(format, args...)
	if strings.HasPrefix(reply, "error") {
		w.t.Fatalf(format+": %s", append(args, reply)...)
	}
	pid, _ := strconv.Atoi(reply)
	return pid
}

// startFor starts a guest whose lease ends soon; a machine may be so slow that
// it ends before the start.
func (w *world) startFor(lease time.Duration, id string) (pid int) {
	w.t.Helper()
	w.until("the guest is started within its lease", func() bool {
		w.must("deadline %v", lease)
		var err error
		pid, err = strconv.Atoi(w.ask("start %s", id))
		return err == nil
	})
	return pid
}

func (w *world) until(what string, f func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("not so after %v: %s", patience, what)
		}
	}
}

// gone waits until a process has ended.
func (w *world) gone(pid int) {
	w.t.Helper()
	w.until(fmt.Sprintf("process %d has ended", pid), func() bool { return !alive(pid) })
}

func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	state := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[0]
	return state != "Z" && state != "X"
}

func (w *world) signal(pid int, s unix.Signal) {
	w.t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		w.t.Fatal(err)
	}
}

func TestDaemonIsStartedAgainAndGuestsStay(t *testing.T) {
	w := newWorld(t, "")
	w.must("ready")
	w.must("deadline 1h")
	guest := w.must("start a")
	for range 3 {
		daemon := w.must("pid")
		w.signal(daemon, unix.SIGKILL)
		w.gone(daemon)
		if got := w.ask("list"); got != fmt.Sprintf("a=%d", guest) {
			t.Fatalf("the new daemon finds %q, want a=%d", got, guest)
		}
	}
	// The new daemon learns of the end of what it did not start.
	w.signal(guest, unix.SIGKILL)
	w.must("done a")
	if got := w.ask("list"); got != "" {
		t.Errorf("%q runs", got)
	}
}

func TestDeadlineEndsGuests(t *testing.T) {
	t.Run("of a daemon that lives", func(t *testing.T) {
		w := newWorld(t, "")
		w.gone(w.startFor(time.Second, "a"))
		w.must("done a")
		if got := w.ask("start b"); !strings.Contains(got, ErrDeadline.Error()) {
			t.Errorf("a start without a lease: %q", got)
		}
		w.must("deadline 1h")
		w.must("start b")
	})
	for name, halt := range map[string]unix.Signal{"of one that hangs": unix.SIGSTOP, "of one that is gone": unix.SIGKILL} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "")
			w.must("ready")
			daemon := w.must("pid")
			guest := w.startFor(time.Second, "a")
			w.signal(daemon, halt)
			w.gone(guest)
			if halt == unix.SIGSTOP {
				w.signal(daemon, unix.SIGCONT)
			}
			w.must("done a") // the guard has seen it, too
			if got := w.ask("list"); got != "" {
				t.Errorf("%q runs", got)
			}
		})
	}
}

// A renewal that was overtaken must not shorten the lease.
func TestDeadlineNeverMovesBack(t *testing.T) {
	w := newWorld(t, "")
	w.must("deadline 1h")
	guest := w.must("start a")
	w.must("deadline 1ms")
	w.must("kill none") // the guard has done what came before
	w.must("start b")
	if !alive(guest) {
		t.Error("a guest was killed before its deadline")
	}
}

func TestStartAndKill(t *testing.T) {
	w := newWorld(t, "")
	if got := w.ask("start a"); !strings.Contains(got, ErrDeadline.Error()) {
		t.Errorf("a start before the first lease: %q", got)
	}
	w.must("deadline 1h")
	a, b := w.must("start a"), w.must("start b")
	if got := w.ask("start a"); !strings.Contains(got, ErrExists.Error()) {
		t.Errorf("a second start: %q", got)
	}
	w.must("kill a")
	if alive(a) || !alive(b) {
		t.Errorf("after the kill of a: a lives: %v, b lives: %v", alive(a), alive(b))
	}
	w.must("done a")
	w.must("start a")
}

func TestGuardDies(t *testing.T) {
	w := newWorld(t, "")
	w.must("deadline 1h")
	daemon, guest := w.must("pid"), w.must("start a")
	w.signal(w.cmd.Process.Pid, unix.SIGKILL)
	w.gone(daemon)
	w.gone(guest)
}

func TestGuardStops(t *testing.T) {
	w := newWorld(t, "")
	w.must("ready")
	w.must("deadline 1h")
	daemon, guest := w.must("pid"), w.must("start a")
	w.signal(w.cmd.Process.Pid, unix.SIGTERM)
	if err := w.cmd.Wait(); err != nil {
		t.Errorf("the guard ended with %v", err)
	}
	if alive(daemon) || alive(guest) {
		t.Errorf("daemon lives: %v, guest lives: %v", alive(daemon), alive(guest))
	}
	if _, err := os.Stat(filepath.Join(w.dir, "stopped")); err != nil {
		t.Errorf("the daemon was not asked to stop: %v", err)
	}
}

// A daemon that can't start says why once, not for ever.
func TestDaemonCannotStart(t *testing.T) {
	w := newWorld(t, "2")
	err := w.cmd.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("the guard ended with %v, want code 2", err)
	}
}

// A daemon that would end so again is not followed by another; its guests end.
func TestDaemonEndsForGood(t *testing.T) {
	w := newWorld(t, "")
	w.must("ready")
	w.must("deadline 1h")
	guest := w.must("start a")
	if nc, err := net.Dial("unix", filepath.Join(w.dir, "control")); err != nil {
		t.Fatal(err)
	} else {
		fmt.Fprintln(nc, "exit", finalCode)
		_ = nc.Close()
	}
	err := w.cmd.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != finalCode {
		t.Errorf("the guard ended with %v, want code %d", err, finalCode)
	}
	if alive(guest) {
		t.Error("its guest lives")
	}
}

// Garbage ends the daemon that sent it, and nothing else.
func TestGarbage(t *testing.T) {
	for _, kind := range []string{"garbage", "flood"} {
		t.Run(kind, func(t *testing.T) {
			w := newWorld(t, "")
			w.must("ready")
			w.must("deadline 1h")
			daemon, guest := w.must("pid"), w.must("start a")
			if nc, err := net.Dial("unix", filepath.Join(w.dir, "control")); err == nil {
				fmt.Fprintln(nc, kind)
				_ = nc.Close()
			}
			w.gone(daemon)
			if got := w.ask("list"); got != fmt.Sprintf("a=%d", guest) {
				t.Errorf("%q runs, want a=%d", got, guest)
			}
		})
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"seq":1,"op":"start","process":{"id":"a","path":"/bin/true"}}`))
	f.Add([]byte(`{"seq":1,"op":"deadline","until":12}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := parseRequest(line)
		if err == nil && (r.Seq == 0 || r.Op == opStart && r.Process == nil) {
			t.Errorf("%q was taken for %+v", line, r)
		}
	})
}
