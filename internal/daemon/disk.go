package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// disk is a directory that replicas lie in, and whether it can be used: it is tried
// with a small file every few seconds, and its device is watched meanwhile.
type disk struct {
	path string
	// mark is a file that says that the path is a file system of its own, so that
	// the directory below is not taken for it; parent is where that lies.
	parent, mark string
	// stat is where the kernel counts what the device does; empty: nowhere.
	stat string
	log  *slog.Logger
	// suspend and resume end and begin the use of what lies there.
	suspend, resume func()

	mu      sync.Mutex
	problem string
	missing bool // stays until the daemon has started again
}

const (
	// diskTick is how often the device's counters are looked at, tryDiskEvery how
	// often the disk is tried.
	diskTick     = 250 * time.Millisecond
	tryDiskEvery = 5 * time.Second
	// A disk hangs if it has done nothing for standsStill though it was asked to,
	// and a try of it, begun then, takes longer than tryTakes. Where the kernel does
	// not count, it does if a try takes longer than tryTakesAlone: a disk that is
	// very busy must not be taken for one that hangs.
	standsStill   = time.Second
	tryTakes      = 2 * time.Second
	tryTakesAlone = 30 * time.Second
)

// openDisk finds out what lies at a path, which is below the server's directory. A
// disk that was there and is not mounted has a problem; that is no error.
func openDisk(p paths, log *slog.Logger) (*disk, error) {
	d := &disk{
		path: p.volumes(), parent: p.dir, mark: filepath.Join(p.dir, "volumes.mounted"), log: log,
		suspend: func() {}, resume: func() {},
	}
	device, own, err := d.find()
	if err != nil {
		return nil, err
	}
	_, err = os.Stat(d.mark)
	switch {
	case errors.Is(err, fs.ErrNotExist) && own:
		err = os.WriteFile(d.mark, []byte("volumes is a file system of its own: while it is not mounted nothing is put there\n"), 0o600)
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err == nil && !own:
		d.miss()
	}
	if err != nil {
		return nil, fmt.Errorf("noting what is mounted at %s: %w", d.path, err)
	}
	d.stat = fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(device), unix.Minor(device))
	if _, err := os.Stat(d.stat); err != nil {
		d.stat = ""
	}
	return d, nil
}

// find is the path's device, and whether it is not its parent's.
func (d *disk) find() (device uint64, own bool, err error) {
	var at, above unix.Stat_t
	if err := errors.Join(unix.Stat(d.path, &at), unix.Stat(d.parent, &above)); err != nil {
		return 0, false, fmt.Errorf("finding out which file system %s is of: %w", d.path, err)
	}
	return at.Dev, at.Dev != above.Dev, nil
}

func (d *disk) miss() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.missing = true
	d.problem = fmt.Sprintf("nothing is mounted there, and a disk was: mount it and start the server again, or, if it is not to come back, delete %s before", d.mark)
}

// State is what is known of it now.
func (d *disk) State() *argonv1.Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &argonv1.Disk{Path: d.path, Problem: d.problem}
}

// set notes what a try has found; empty: it is well.
func (d *disk) set(problem string) {
	d.mu.Lock()
	was := d.problem
	if !d.missing {
		d.problem = problem
	}
	d.mu.Unlock()
	switch {
	case was == problem || d.isMissing():
	case problem == "":
		d.log.Info("the disk works again", "path", d.path)
	default:
		d.log.Error("the disk does not work", "path", d.path, "problem", problem)
	}
}

func (d *disk) isMissing() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.missing
}

// run watches the disk until ctx ends. A try that hangs then is not waited for: it
// may never end, and touches nothing but its own file.
func (d *disk) run(ctx context.Context) error {
	tick := time.NewTicker(diskTick)
	defer tick.Stop()
	var (
		w     diskWatch
		tried chan error // of the try under way; nil: none is
	)
	for {
		now := time.Now()
		w.see(now, d.counters())
		if tried == nil && w.due(now) {
			w.begin(now)
			tried = make(chan error, 1)
			go func() { tried <- d.try() }()
		}
		if tried != nil && w.hangs(now) {
			d.suspend()
			d.set("it does not answer")
		}
		select {
		case err := <-tried:
			tried = nil
			w.end(time.Now())
			d.found(err)
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// found notes how a try went.
func (d *disk) found(err error) {
	d.resume()
	if err != nil {
		d.set(err.Error())
		return
	}
	d.set("")
}

// try uses the disk a little: a file is written, put on the disk, and read from it.
func (d *disk) try() error {
	if _, err := os.Stat(d.mark); err == nil {
		if _, own, err := d.find(); err == nil && !own {
			d.miss()
			return nil
		}
	}
	// Its name is one that is deleted when replicas are looked for.
	dir := filepath.Join(d.path, ".try")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return cannot("written", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, ".try"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return cannot("written", err)
	}
	defer f.Close()
	want := bytes.Repeat([]byte(time.Now().Format(time.RFC3339Nano)+"\n"), 64)
	_, err = f.WriteAt(want, 0)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return nil // which is another trouble, with its own events
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return cannot("written", err)
	}
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	is := make([]byte, len(want))
	if _, err := f.ReadAt(is, 0); err != nil {
		return cannot("read", err)
	}
	if !bytes.Equal(is, want) {
		return errors.New("it does not give back what was written")
	}
	return nil
}

// cannot says what is wrong without the name of the file that was tried.
func cannot(what string, err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		err = at.Err
	}
	return fmt.Errorf("it cannot be %s: %w", what, err)
}

// counters are what the kernel has counted of a device.
type counters struct {
	known     bool
	completed uint64
	underWay  uint64
}

func (d *disk) counters() counters {
	if d.stat == "" {
		return counters{}
	}
	b, err := os.ReadFile(d.stat)
	if err != nil {
		return counters{}
	}
	return parseCounters(string(b))
}

// parseCounters reads a device's stat file (Linux, Documentation/block/stat.rst):
// reads, writes, discards and flushes that were completed, and what is under way.
func parseCounters(s string) counters {
	var n []uint64
	for _, f := range strings.Fields(s) {
		x, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return counters{}
		}
		n = append(n, x)
	}
	if len(n) < 11 {
		return counters{}
	}
	c := counters{known: true, completed: n[0] + n[4], underWay: n[8]}
	for _, i := range []int{11, 15} {
		if i < len(n) {
			c.completed += n[i]
		}
	}
	return c
}

// diskWatch decides when to try a disk, and when it hangs.
type diskWatch struct {
	last  counters
	still time.Time // since when the device has done nothing; zero: it does
	begun time.Time // of the try under way; zero: none is
	next  time.Time
}

// see notes what the kernel counts.
func (w *diskWatch) see(now time.Time, c counters) {
	switch {
	case !c.known || c.underWay == 0 || !w.last.known || c.completed != w.last.completed:
		w.still = time.Time{}
	case w.still.IsZero():
		w.still = now
	}
	w.last = c
}

func (w *diskWatch) stands(now time.Time, long time.Duration) bool {
	return !w.still.IsZero() && now.Sub(w.still) >= long
}

// due tells whether it is time to try.
func (w *diskWatch) due(now time.Time) bool {
	return !now.Before(w.next) || w.stands(now, standsStill)
}

func (w *diskWatch) begin(now time.Time) { w.begun = now }

func (w *diskWatch) end(now time.Time) {
	w.begun, w.next, w.still = time.Time{}, now.Add(tryDiskEvery), time.Time{}
}

// hangs tells whether the try under way takes too long.
func (w *diskWatch) hangs(now time.Time) bool {
	took := now.Sub(w.begun)
	return took >= tryTakesAlone || took >= tryTakes && w.stands(now, standsStill+tryTakes)
}
