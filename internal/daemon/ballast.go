package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ballast is a file that takes room from everybody else, and gives it to the
// catalog when the file system of the server's directory is full: etcd ends the
// whole process when it can't write.
type ballast struct {
	dir string
	log *slog.Logger
	// size is how large the file is.
	size uint64
	// changed has something when short is another.
	changed chan struct{}

	mu    sync.Mutex
	short bool
}

const (
	// ballastBytes is the usual size; a small file system gives a part of its own.
	ballastBytes = 48 << 20
	ballastPart  = 16
	// The file is given up when less is free than its size divided by shortPart,
	// and made when roomyTimes its size is. Given up, it leaves no more room than
	// volumes keep free (reserveBytes): they don't take it.
	shortPart  = 3
	roomyTimes = 3
	// ballastTick is how often the file system is looked at: it costs a system call.
	ballastTick = 250 * time.Millisecond
)

// openBallast makes the file where there is room, and gives it up where there is
// none. A file that is missing was given up, or never had room: until it has, the
// file system counts as full.
func openBallast(dir string, log *slog.Logger) (*ballast, error) {
	b := &ballast{dir: dir, log: log, changed: make(chan struct{}, 1)}
	_, total, err := roomIn(dir)
	if err != nil {
		return nil, err
	}
	b.size = min(ballastBytes, total/ballastPart)
	_, err = os.Stat(b.path())
	b.short = err != nil
	return b, b.look()
}

func (b *ballast) path() string { return filepath.Join(b.dir, "ballast") }

// roomIn is what is free in a directory's file system, and how large that is.
func roomIn(dir string) (free, total uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("finding out the free space of %s: %w", dir, err)
	}
	block := uint64(st.Bsize)
	return st.Bavail * block, st.Blocks * block, nil
}

// freeForImages is what images may take: not what is kept for the catalog and logs.
func freeForImages(dir string) (free, total uint64, err error) {
	free, total, err = roomIn(dir)
	return free - min(free, reserveBytes), total, err
}

// Short reports whether the file system is full, and the catalog lives on what was
// kept for it.
func (b *ballast) Short() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.short
}

// problem says it in one line; empty: there is room.
func (b *ballast) problem() string {
	if !b.Short() {
		return ""
	}
	return fmt.Sprintf("the file system of %s is full", b.dir)
}

// run looks until ctx ends.
func (b *ballast) run(ctx context.Context) error {
	tick := time.NewTicker(ballastTick)
	defer tick.Stop()
	failed := ""
	for {
		if err := b.look(); err == nil {
			failed = ""
		} else if err.Error() != failed {
			failed = err.Error()
			b.log.Error("room for the catalog is not kept", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// look gives the file up, or makes it, if it is time.
func (b *ballast) look() error {
	free, _, err := roomIn(b.dir)
	if err != nil {
		return err
	}
	switch was := b.Short(); ballastStep(was, free, b.size) {
	case giveUp:
		if err := os.Remove(b.path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("giving up what was kept of the disk: %w", err)
		}
		b.set(true)
		b.log.Error("the disk is full: what was kept for the catalog is given to it; free some space", "dir", b.dir, "bytes", b.size)
	case take:
		if err := b.fill(); err != nil {
			return err
		}
		b.set(false)
		b.log.Info("there is room on the disk", "dir", b.dir, "free", free)
	}
	return nil
}

func (b *ballast) set(short bool) {
	b.mu.Lock()
	b.short = short
	b.mu.Unlock()
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// fill makes the file. A file system that can't keep room keeps none; that it is
// full is told all the same.
func (b *ballast) fill() error {
	f, err := os.OpenFile(b.path(), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("keeping room on the disk: %w", err)
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), 0, 0, int64(b.size))
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return os.Remove(b.path())
	case err != nil:
		return errors.Join(fmt.Errorf("keeping %d bytes of the disk: %w", b.size, err), os.Remove(b.path()))
	}
	return nil
}

type ballastChange uint8

const (
	leaveIt ballastChange = iota
	giveUp
	take
)

// ballastStep decides by what is free.
func ballastStep(short bool, free, size uint64) ballastChange {
	switch {
	case !short && free < size/shortPart:
		return giveUp
	case short && free >= roomyTimes*size:
		return take
	}
	return leaveIt
}
