package layer

import (
	"errors"
	"fmt"
	"sync"
)

// ErrBase: what a replica begins with cannot be read. Nothing of its own is
// lost.
var ErrBase = errors.New("the base cannot be read")

// Base is what a replica begins with. It never changes. Safe for concurrent use.
type Base interface {
	// ReadAt fills p; there are zeros beyond the base's end.
	ReadAt(p []byte, off int64) error
	// ReadCached does so if that needs no disk, and reports whether it did.
	ReadCached(p []byte, off int64) bool
	// Extents calls found for each stretch of the range, hole or data, until
	// that returns false. Holes read as zeros.
	Extents(off, n int64, found func(n int64, hole bool) bool) error
	Close() error
}

// OpenImage opens a file as a base.
func OpenImage(fs FS, name string) (Base, error) {
	f, err := fs.Open(name, false)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return image{f, size}, nil
}

type image struct {
	file File
	size int64
}

func (i image) ReadAt(p []byte, off int64) error {
	n := max(0, min(int64(len(p)), i.size-off))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	_, err := i.file.ReadAt(p[:n], off)
	return err
}

func (i image) ReadCached(p []byte, off int64) bool {
	return off+int64(len(p)) <= i.size && i.file.ReadCached(p, off)
}

func (i image) Extents(off, n int64, found func(n int64, hole bool) bool) error {
	return fileExtents(i.file, off, n, found)
}

func (i image) Close() error { return i.file.Close() }

// fileExtents calls found for each stretch of the range.
func fileExtents(file File, off, n int64, found func(n int64, hole bool) bool) error {
	for at := off; at < off+n; {
		start, end, ok, err := file.NextData(at)
		if err != nil {
			return fmt.Errorf("look for data: %w", err)
		}
		if !ok {
			start, end = off+n, off+n
		}
		start, end = min(start, off+n), min(end, off+n)
		if start > at && !found(start-at, true) || end > start && !found(end-start, false) {
			return nil
		}
		at = end
	}
	return nil
}

// lowest is what is below all layers: the base up to its size, and zeros. The
// base is opened when it is first read: it may be of a replica that is opened
// later.
type lowest struct {
	ref  BaseRef
	size int64 // 0 if there is no base

	mu   sync.Mutex
	open func(BaseRef) (Base, error)
	base Base
}

func (l *lowest) get() (Base, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.base != nil {
		return l.base, nil
	}
	if l.open == nil {
		return nil, fmt.Errorf("%+v: %w", l.ref, ErrBase)
	}
	base, err := l.open(l.ref)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBase, err)
	}
	l.base = base
	return base, nil
}

func (l *lowest) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	base := l.base
	l.base, l.open = nil, nil
	if base == nil {
		return nil
	}
	return base.Close()
}

// inside is how much of a range the base may have something for.
func (l *lowest) inside(off, n int64) int64 {
	return max(0, min(n, l.size-off))
}

func (l *lowest) readAt(p []byte, off int64) error {
	n := l.inside(off, int64(len(p)))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	base, err := l.get()
	if err != nil {
		return err
	}
	if err := base.ReadAt(p[:n], off); err != nil {
		return fmt.Errorf("%w: %w", ErrBase, err)
	}
	return nil
}

func (l *lowest) readCached(p []byte, off int64) bool {
	n := l.inside(off, int64(len(p)))
	if n > 0 {
		base, err := l.get()
		if err != nil || !base.ReadCached(p[:n], off) {
			return false
		}
	}
	clear(p[n:])
	return true
}

func (l *lowest) extents(off, n int64, found func(n int64, hole bool) bool) error {
	inside := l.inside(off, n)
	more := true
	if inside > 0 {
		base, err := l.get()
		if err != nil {
			return err
		}
		err = base.Extents(off, inside, func(n int64, hole bool) bool {
			more = found(n, hole)
			return more
		})
		if err != nil {
			return fmt.Errorf("%w: %w", ErrBase, err)
		}
	}
	if more && n > inside {
		found(n-inside, true)
	}
	return nil
}

// BaseReadable tells whether there is no base, or one that can be opened.
func (f *Files) BaseReadable() bool {
	c := f.chain.Load()
	if !c.based() {
		return true
	}
	_, err := c.lowest.get()
	return err == nil
}
