package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// mounted are the paths of a server whose volumes lie on a file system of their
// own, of 64 MiB.
func mounted(t *testing.T) paths {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	run, err := os.MkdirTemp("", "d") // sockets want short names
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	p := paths{dir: t.TempDir(), runDir: run}
	if err := p.make(); err != nil {
		t.Fatal(err)
	}
	mount(t, p)
	t.Cleanup(func() { _ = unix.Unmount(p.volumes(), unix.MNT_DETACH) })
	return p
}

func mount(t *testing.T, p paths) {
	t.Helper()
	if err := unix.Mount("none", p.volumes(), "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, p paths) *disk {
	t.Helper()
	d, err := openDisk(p, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	d.found(d.try())
	return d
}

// What a server has is what lies where its volumes do.
func TestVolumesOnADiskOfTheirOwn(t *testing.T) {
	p := mounted(t)
	has, err := findResources(p.volumes())
	if err != nil {
		t.Fatal(err)
	}
	capacity, _, err := has.measure()
	if err != nil || capacity.GetDiskBytes() != 64<<20 {
		t.Errorf("the capacity is %v, %v", capacity, err)
	}
	store, err := replica.Open(replica.Options{FS: layer.OS{}, Dir: p.volumes(), ClusterID: "c", BootID: "b", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, p)
	u, err := space{d, store, p.dir}.Measure()
	if err != nil || u.GetTotalBytes() != 64<<20 || d.State().GetProblem() != "" {
		t.Errorf("%v is measured of %v, %v", u, d.State(), err)
	}
}

// A disk that is not mounted is not taken for an empty one.
func TestDiskThatIsNotMounted(t *testing.T) {
	p := mounted(t)
	d := open(t, p)
	if err := unix.Unmount(p.volumes(), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	missing := func(d *disk) {
		t.Helper()
		if s := d.State().GetProblem(); !strings.Contains(s, "nothing is mounted there") {
			t.Errorf("the problem is %q", s)
		}
	}
	d.found(d.try())
	missing(d)
	missing(open(t, p))
	mount(t, p)
	d.found(d.try())
	missing(d) // what lies there is not known before the next start
	if s := open(t, p).State().GetProblem(); s != "" {
		t.Errorf("mounted again: %s", s)
	}
	if err := errors.Join(unix.Unmount(p.volumes(), unix.MNT_DETACH), os.Remove(filepath.Join(p.dir, "volumes.mounted"))); err != nil {
		t.Fatal(err)
	}
	if s := open(t, p).State().GetProblem(); s != "" {
		t.Errorf("without the mark: %s", s)
	}
}

func TestDiskThatCannotBeWritten(t *testing.T) {
	p := mounted(t)
	d := open(t, p)
	remount := func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("none", p.volumes(), "tmpfs", unix.MS_REMOUNT|flags, "size=64m"); err != nil {
			t.Fatal(err)
		}
		d.found(d.try())
	}
	remount(unix.MS_RDONLY)
	if s := d.State().GetProblem(); s != "it cannot be written: read-only file system" {
		t.Errorf("the problem is %q", s)
	}
	remount(0)
	if s := d.State().GetProblem(); s != "" {
		t.Errorf("the problem is %q", s)
	}
	// One without room works.
	if err := os.WriteFile(filepath.Join(p.volumes(), "large"), make([]byte, 64<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	_ = os.RemoveAll(filepath.Join(p.volumes(), ".try"))
	d.found(d.try())
	if s := d.State().GetProblem(); s != "" {
		t.Errorf("a full disk has the problem %q", s)
	}
}

// A disk that is busy is not taken for one that hangs.
func TestDiskThatHangs(t *testing.T) {
	idle := func(time.Duration) counters { return counters{known: true} }
	busy := func(at time.Duration) counters {
		return counters{known: true, completed: uint64(at / time.Second), underWay: 5}
	}
	for name, c := range map[string]struct {
		counts func(time.Duration) counters
		hangs  time.Duration // 0: never
	}{
		"it does nothing at all":        {func(time.Duration) counters { return counters{known: true, underWay: 5} }, 3 * time.Second},
		"it is slow":                    {busy, tryTakesAlone},
		"the try is not even under way": {idle, tryTakesAlone},
		"nothing is counted":            {func(time.Duration) counters { return counters{} }, tryTakesAlone},
	} {
		t.Run(name, func(t *testing.T) {
			var w diskWatch
			start := time.Now()
			w.end(start) // it worked a moment ago
			tried := time.Duration(-1)
			for at := time.Duration(0); ; at += diskTick {
				now := start.Add(at)
				w.see(now, c.counts(at))
				if tried < 0 && w.due(now) {
					w.begin(now)
					tried = at
				}
				if tried < 0 || !w.hangs(now) {
					continue
				}
				if limit := c.hangs; limit == tryTakesAlone && at-tried < limit || limit != tryTakesAlone && (at < limit || at > limit+2*diskTick) {
					t.Errorf("after %s it hangs; it was tried after %s", at, tried)
				}
				return
			}
		})
	}
}

func FuzzCounters(f *testing.F) {
	f.Add("1 0 8 0 2 0 8 0 3 0 0 4 0 0 0 5 0")
	f.Fuzz(func(_ *testing.T, s string) { parseCounters(s) })
}

func TestCounters(t *testing.T) {
	for text, want := range map[string]counters{
		"    1 0 8 0 2 0 8 0 3 0 0 4 0 0 0 5 0\n": {true, 12, 3},
		"1 0 8 0 2 0 8 0 3 0 0":                   {true, 3, 3},
		"1 2 3 4":                                 {},
		"1 0 8 0 2 x 8 0 3 0 0":                   {},
	} {
		if got := parseCounters(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
