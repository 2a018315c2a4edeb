package guard

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/boottime"
	"github.com/argon-cluster/argon/internal/cgroup"
)

// waitForEver makes a child that neither ends nor runs a program: until then
// this process waits for it in the kernel, in the state D of /proc/PID/stat.
func waitForEver() {
	_, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_VFORK|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		os.Exit(1)
	}
	for { // only the child gets here
		_, _, _ = unix.RawSyscall(unix.SYS_PAUSE, 0, 0, 0)
	}
}

// noGroups makes a guard see no control groups, and oldGroups only those of
// version 1.
const noGroups = mountsName + "=nothing"

func oldGroups(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var kept strings.Builder
	for line := range strings.Lines(string(mounts)) {
		if !strings.Contains(line, " - cgroup2 ") {
			kept.WriteString(line)
		}
	}
	return mountsName + "=" + kept.String()
}

// eachWay runs a test with every means of ending guests that there is.
func eachWay(t *testing.T, test func(t *testing.T, w *world, groups bool)) {
	for name, env := range map[string][]string{
		"control groups": nil, "control groups, version 1": {oldGroups(t)}, "process groups": {noGroups},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "", env...)
			groups := strings.HasPrefix(w.ask("about"), "control groups")
			if want := !strings.HasPrefix(name, "process"); groups != want {
				t.Skip("not to be had here: ", w.ask("about"))
			}
			test(t, w, groups)
		})
	}
}

// child waits until a process has a child, and returns its number.
func (w *world) child(of int) (pid int) {
	w.t.Helper()
	w.until(fmt.Sprintf("process %d has a child", of), func() bool {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", of))
		for _, path := range tasks {
			data, _ := os.ReadFile(path)
			if fields := strings.Fields(string(data)); len(fields) > 0 {
				pid, _ = strconv.Atoi(fields[0])
				return true
			}
		}
		return false
	})
	return pid
}

// Whatever state a guest is in when the lease ends, it goes: all of it.
func TestDeadlineEndsWhatIsHardToEnd(t *testing.T) {
	t.Run("stopped", func(t *testing.T) {
		eachWay(t, func(_ *testing.T, w *world, _ bool) {
			guest := w.startFor(2*time.Second, "a")
			w.signal(guest, unix.SIGSTOP)
			w.gone(guest)
		})
	})
	t.Run("forked", func(t *testing.T) {
		eachWay(t, func(t *testing.T, w *world, groups bool) {
			if !groups {
				t.Skip("a session of its own is in no process group of ours")
			}
			w.must("deadline 1h")
			guest := w.must("run a setsid --fork --wait sh -c read<" + w.fifo("never"))
			forked := w.child(guest)
			w.must("kill a")
			w.gone(guest)
			if alive(forked) {
				t.Error("the guest is gone, what it has forked is not")
			}
		})
	})
	t.Run("waits in the kernel", func(t *testing.T) {
		eachWay(t, func(_ *testing.T, w *world, _ bool) {
			w.must("deadline 1h")
			guest := w.must("run a env %s=waits %s", roleName, os.Args[0])
			w.until("it waits", func() bool {
				stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", guest))
				for _, path := range stats {
					stat, _ := os.ReadFile(path)
					if bytes.Contains(stat, []byte(") D ")) {
						return true
					}
				}
				return false
			})
			w.must("kill a")
			w.gone(guest)
		})
	})
}

// fifo makes a named pipe that nobody writes to.
func (w *world) fifo(name string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// The guard stands still while the lease ends: the daemon ends the guests.
func TestGuardHangs(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, groups bool) {
		if !groups {
			t.Skip("nobody but the parent ends process groups")
		}
		w.must("ready")
		guest := w.startFor(2*time.Second, "a")
		w.signal(w.cmd.Process.Pid, unix.SIGSTOP)
		w.gone(guest)
		w.signal(w.cmd.Process.Pid, unix.SIGCONT)
		w.must("done a")
	})
}

// The guard is killed while a guest has forked: the next guard ends what the
// kernel left.
func TestNextGuardEndsWhatIsLeft(t *testing.T) {
	w := newWorld(t, "")
	if !strings.HasPrefix(w.ask("about"), "control groups") {
		t.Skip(w.ask("about"))
	}
	w.must("deadline 1h")
	guest := w.must("run a setsid --fork --wait sh -c read<" + w.fifo("never"))
	forked := w.child(guest)
	w.signal(w.cmd.Process.Pid, unix.SIGKILL)
	w.gone(guest)
	_ = w.cmd.Wait()
	w.run("")
	w.gone(forked)
	if got := w.ask("list"); got != "" {
		t.Errorf("%q runs", got)
	}
}

// An operator asks for a new daemon: the old one ends in order, guests run on.
func TestRestart(t *testing.T) {
	w := newWorld(t, "")
	w.must("ready")
	w.must("deadline 1h")
	daemon, guest := w.must("pid"), w.must("start a")
	w.signal(w.cmd.Process.Pid, unix.SIGHUP)
	w.gone(daemon)
	if got := w.ask("list"); got != fmt.Sprintf("a=%d", guest) {
		t.Errorf("the new daemon finds %q, want a=%d", got, guest)
	}
	if _, err := os.Stat(filepath.Join(w.dir, "stopped")); err != nil {
		t.Errorf("the daemon was not asked to stop: %v", err)
	}
}

// The daemon that follows a restart has a shorter lease than the one that held it
// over the restart.
func TestDeadlineIsLowered(t *testing.T) {
	w := newWorld(t, "")
	w.must("deadline 1h")
	guest := w.must("start a")
	w.must("lower 2h")
	w.must("start b")
	w.must("lower 100ms")
	w.gone(guest)
	w.must("done b")
}

func TestCannotLimit(t *testing.T) {
	w := newWorld(t, "", noGroups)
	w.must("deadline 1h")
	w.must("start a")
	w.must("limit a 0") // asks for nothing
	if got := w.ask("limit a 30"); !strings.Contains(got, ErrCannotLimit.Error()) {
		t.Errorf("got %q", got)
	}
}

func TestLimit(t *testing.T) {
	w := newWorld(t, "")
	if about := w.ask("about"); !strings.Contains(about, "processors") {
		t.Skip(about)
	}
	w.must("deadline 1h")
	guest := w.must("start a")
	w.must("limit a 30")
	if got := w.ask("limit b 30"); !strings.Contains(got, "does not run") {
		t.Errorf("a guest that is not there: %q", got)
	}
	self, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", guest))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(self), "/a\n") {
		t.Errorf("the guest is in\n%s", self)
	}
}

// chime is an alarm that a test rings.
type chime struct{}

func (chime) set(time.Duration) error { return nil }

// The clock that counts goes on while the host sleeps; after that, the alarm
// rings at once. What the wall clock says in between is nobody's business: it is
// not asked.
func TestHostSleeps(t *testing.T) {
	none, err := cgroup.Open(cgroup.Options{Mounts: "nothing"})
	if err != nil {
		t.Fatal(err)
	}
	th := newThread()
	defer th.close()
	var mu sync.Mutex
	clock := time.Hour
	g := &guests{
		now: func() time.Duration {
			mu.Lock()
			defer mu.Unlock()
			return clock
		},
		thread: th, groups: none, alarm: chime{}, log: slog.New(slog.DiscardHandler), byID: map[string]*guest{}, told: func(string) {},
	}
	defer g.close()
	if err := g.extend(time.Hour + 3*time.Second); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	place, err := g.reserve("a")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := g.start(Process{ID: "a", Path: "sleep", Args: []string{"3600"}, Dir: dir, LogPath: filepath.Join(dir, "log")}, place)
	if err != nil {
		t.Fatal(err)
	}
	g.enforce()
	if !alive(pid) || !g.fenced() {
		t.Fatal("the guest was ended within its lease")
	}
	mu.Lock()
	clock += 8 * time.Hour // a night
	mu.Unlock()
	if g.fenced() {
		t.Error("a watchdog would be fed while a guest runs without a lease")
	}
	g.enforce()
	(&world{t: t}).gone(pid)
	if _, err := g.reserve("b"); !errors.Is(err, ErrDeadline) {
		t.Errorf("a start after the night: %v", err)
	}
}

// The watchdog is fed while all is well, and told of an end in order.
func TestWatchdog(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "watchdog")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, "", watchdogName+"="+path)
	w.must("ready")
	w.must("deadline 1h")
	w.must("start a")
	w.until("it is fed", func() bool {
		data, err := os.ReadFile(path)
		return err == nil && len(data) > 1
	})
	w.signal(w.cmd.Process.Pid, unix.SIGTERM)
	if err := w.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(data, []byte("V")) || bytes.Count(data, []byte("V")) != 1 {
		t.Errorf("it was fed %q", data)
	}
}

// When the guard is killed, nobody tells the watchdog that all is well.
func TestWatchdogOfADeadGuard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "watchdog")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, "", watchdogName+"="+path)
	w.must("ready")
	w.signal(w.cmd.Process.Pid, unix.SIGKILL)
	_ = w.cmd.Wait()
	if data, err := os.ReadFile(path); err != nil || bytes.Contains(data, []byte("V")) {
		t.Errorf("it was fed %q: %v", data, err)
	}
}

func TestNoWatchdog(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleName+"=guard", dirName+"="+t.TempDir(), watchdogName+"=/dev/no-such-watchdog")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "/dev/no-such-watchdog") {
		t.Errorf("a guard without its watchdog: %v\n%s", err, out)
	}
}

// A guard that cannot keep a guest from running does not feed the watchdog.
func TestWatchdogStarves(t *testing.T) {
	path := filepath.Join(t.TempDir(), "watchdog")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dog, err := openWatchdog(path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	close(ended)
	dog.run(ended, func() bool { return false }, slog.New(slog.DiscardHandler))
	if data, err := os.ReadFile(path); err != nil || len(data) != 0 {
		t.Errorf("it was fed %q: %v", data, err)
	}
}

// A start whose answer nobody waits for any more is followed by a kill: whatever is
// carried out first, nothing runs in the end.
func TestKillFindsAStart(t *testing.T) {
	none, err := cgroup.Open(cgroup.Options{Mounts: "nothing"})
	if err != nil {
		t.Fatal(err)
	}
	th := newThread()
	defer th.close()
	g := &guests{
		now: boottime.Now, thread: th, groups: none, alarm: chime{}, log: slog.New(slog.DiscardHandler), byID: map[string]*guest{}, told: func(string) {},
	}
	defer g.close()
	if err := g.extend(boottime.Now() + time.Hour); err != nil {
		t.Fatal(err)
	}
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close()
	c, dir := &conn{nc: ours, guests: g}, t.TempDir()
	start := c.begin(t.Context(), request{Seq: 1, Op: opStart, Process: &Process{
		ID: "a", Path: "sleep", Args: []string{"3600"}, Dir: dir, LogPath: filepath.Join(dir, "log"),
	}})
	kill := c.begin(t.Context(), request{Seq: 2, Op: opKill, ID: "a"})
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		kill()
	}()
	for doomed := false; !doomed; { // the kill is first, and waits
		g.mu.Lock()
		one := g.byID["a"]
		doomed = one != nil && one.doomed
		g.mu.Unlock()
		if one == nil {
			t.Fatal("a kill does not find the start before it")
		}
		runtime.Gosched()
	}
	start()
	<-killed
	if list := g.list(); len(list) != 0 {
		t.Errorf("%v run", list)
	}
}

// A deadline that is moved back holds for the daemon's own watch, too.
func TestFenceMovesBack(t *testing.T) {
	kills := 0
	ring, err := newAlarm()
	if err != nil {
		t.Fatal(err)
	}
	defer ring.close()
	f := &fence{now: func() time.Duration { return 10 * time.Second }, alarm: ring, kill: func() error { kills++; return nil }}
	if err := errors.Join(f.extend(time.Minute), f.lower(5*time.Second), f.lower(time.Hour)); err != nil {
		t.Fatal(err)
	}
	f.enforce()
	if kills != 1 {
		t.Errorf("the guests were killed %d times", kills)
	}
}
