// Package simfs is a file system for simulations: in memory, deterministic,
// and as forgetful as a real one. A crash loses what was not synced, whole,
// in parts or torn; a failed fsync loses it for good while reads still show
// it.
//
// What lives here: layer.FS and its faults. What must not: anything about what
// is stored.
package simfs

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/argon-cluster/argon/internal/volume/layer"
)

const (
	page   = 4096
	sector = 512
)

// FS is a simulated file system. Not safe for concurrent use.
type FS struct {
	rng  *rand.Rand
	root *inode

	// Full: nothing more can be written to where nothing was.
	Full bool
	// FailWrite and FailSync make the next such call fail with EIO.
	FailWrite, FailSync bool
	// Reflinks: files can share blocks.
	Reflinks bool
	// Crashes counts them.
	Crashes int
}

// inode is a file or a directory.
type inode struct {
	// A directory's names, as they are and as a crash would leave them.
	names, synced map[string]*inode

	// A file's content, the same.
	now, disk []byte
	dirty     map[int]bool // pages that differ; true: never written by a sync
	backed    map[int]bool // pages that have room on the disk
}

// New makes an empty file system. rng decides what a crash leaves.
func New(rng *rand.Rand) *FS { return &FS{rng: rng, root: newDir()} }

func newDir() *inode { return &inode{names: map[string]*inode{}, synced: map[string]*inode{}} }

func (n *inode) isDir() bool { return n.names != nil }

func (f *FS) find(name string) (*inode, error) {
	n := f.root
	for part := range strings.SplitSeq(strings.Trim(path.Clean(name), "/"), "/") {
		if part == "" || part == "." {
			continue
		}
		if !n.isDir() || n.names[part] == nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		n = n.names[part]
	}
	return n, nil
}

// MkdirAll makes a directory and its parents.
func (f *FS) MkdirAll(dir string) error {
	n := f.root
	for part := range strings.SplitSeq(strings.Trim(path.Clean(dir), "/"), "/") {
		if n.names[part] == nil {
			n.names[part] = newDir()
		}
		n = n.names[part]
	}
	return nil
}

// Open opens a file.
func (f *FS) Open(name string, create bool) (layer.File, error) {
	dir, err := f.find(path.Dir(name))
	if err != nil {
		return nil, err
	}
	n := dir.names[path.Base(name)]
	if n == nil {
		if !create {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		n = &inode{dirty: map[int]bool{}, backed: map[int]bool{}}
		dir.names[path.Base(name)] = n
	}
	return &file{fs: f, n: n}, nil
}

// Rename renames a file or directory. It takes the place of a file, or of an empty
// directory.
func (f *FS) Rename(from, to string) error {
	src, err := f.find(path.Dir(from))
	if err != nil {
		return err
	}
	dst, err := f.find(path.Dir(to))
	if err != nil {
		return err
	}
	n := src.names[path.Base(from)]
	if n == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	if old := dst.names[path.Base(to)]; old != nil && old.isDir() && len(old.names) > 0 {
		return &fs.PathError{Op: "rename", Path: to, Err: syscall.ENOTEMPTY}
	}
	delete(src.names, path.Base(from))
	dst.names[path.Base(to)] = n
	return nil
}

// RemoveAll deletes a name and all below it.
func (f *FS) RemoveAll(name string) error {
	if dir, err := f.find(path.Dir(name)); err == nil {
		delete(dir.names, path.Base(name))
	}
	return nil
}

// ReadDir lists names, sorted.
func (f *FS) ReadDir(dir string) ([]string, error) {
	n, err := f.find(dir)
	if err != nil {
		return nil, err
	}
	return sorted(n.names), nil
}

func sorted[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// SyncDir makes the names in a directory survive a crash.
func (f *FS) SyncDir(dir string) error {
	n, err := f.find(dir)
	if err != nil {
		return err
	}
	n.synced = copyNames(n.names)
	return nil
}

func copyNames(m map[string]*inode) map[string]*inode {
	c := make(map[string]*inode, len(m))
	for k, v := range m {
		c[k] = v
	}
	return c
}

// Free is how much may be written.
func (f *FS) Free(string) (uint64, error) {
	if f.Full {
		return 0, nil
	}
	return 1 << 40, nil
}

// Rot changes a byte of a file behind everybody's back, as a disk may.
func (f *FS) Rot(name string, off int64) error {
	n, err := f.find(name)
	if err != nil {
		return err
	}
	n.now[off] ^= 0xff
	n.disk[off] = n.now[off]
	return nil
}

// Crash loses power: of each thing that was not synced, chance decides what
// is there afterwards.
func (f *FS) Crash() {
	f.Crashes++
	f.crash(f.root)
	f.FailWrite, f.FailSync = false, false
}

func (f *FS) crash(n *inode) {
	if !n.isDir() {
		f.crashFile(n)
		return
	}
	if f.rng.IntN(2) == 0 {
		n.names = copyNames(n.synced)
	}
	n.synced = copyNames(n.names)
	for _, name := range sorted(n.names) {
		f.crash(n.names[name])
	}
}

func (f *FS) crashFile(n *inode) {
	if len(n.now) != len(n.disk) && f.rng.IntN(2) == 0 {
		n.now = resized(n.now, len(n.disk))
	}
	n.disk = resized(n.disk, len(n.now))
	pages := make([]int, 0, len(n.dirty))
	for p := range n.dirty {
		pages = append(pages, p)
	}
	slices.Sort(pages)
	for _, p := range pages {
		lost := n.dirty[p]
		keep := f.rng.IntN(3) // nothing, all, or some sectors
		for off := p * page; off < min((p+1)*page, len(n.now)); off += sector {
			end := min(off+sector, len(n.now))
			if !lost && (keep == 1 || keep == 2 && f.rng.IntN(2) == 0) {
				copy(n.disk[off:end], n.now[off:end])
			}
		}
		// A hole that was not made yet has its room still.
		if slices.ContainsFunc(n.disk[min(p*page, len(n.disk)):min((p+1)*page, len(n.disk))], func(b byte) bool { return b != 0 }) {
			n.backed[p] = true
		}
	}
	n.now = slices.Clone(n.disk)
	clear(n.dirty)
}

func resized(b []byte, n int) []byte {
	if n <= len(b) {
		return slices.Clone(b[:n])
	}
	return append(slices.Clone(b), make([]byte, n-len(b))...)
}

type file struct {
	fs *FS
	n  *inode
}

func (h *file) Close() error { return nil }

func (h *file) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > int64(len(h.n.now)) {
		return 0, fmt.Errorf("read past the end: %w", fs.ErrInvalid)
	}
	return copy(p, h.n.now[off:]), nil
}

func (h *file) ReadCached([]byte, int64) bool { return false }

func (h *file) WriteAt(p []byte, off int64) (int, error) {
	if h.fs.FailWrite {
		h.fs.FailWrite = false
		return 0, syscall.EIO
	}
	for i := 0; h.fs.Full && i < len(p); i += sector {
		if !h.n.backed[(int(off)+i)/page] {
			// What came before is there.
			h.put(p[:i], off)
			return i, syscall.ENOSPC
		}
	}
	h.put(p, off)
	return len(p), nil
}

func (h *file) put(p []byte, off int64) {
	if end := int(off) + len(p); end > len(h.n.now) {
		h.n.now = resized(h.n.now, end)
	}
	copy(h.n.now[off:], p)
	h.touch(off, int64(len(p)))
}

// touch marks pages as not yet on disk. Written anew, a page that a failed
// sync lost gets its chance again.
func (h *file) touch(off, n int64) {
	for p := int(off / page); int64(p)*page < off+n; p++ {
		h.n.dirty[p], h.n.backed[p] = false, true
	}
}

func (h *file) Truncate(size int64) error {
	h.n.now = resized(h.n.now, int(size))
	return nil
}

func (h *file) Punch(off, n int64) error {
	clear(h.n.now[off : off+n])
	h.touch(off, n)
	for p := int((off + page - 1) / page); int64(p+1)*page <= off+n; p++ {
		delete(h.n.backed, p)
	}
	return nil
}

func (h *file) NextData(off int64) (start, end int64, ok bool, err error) {
	size := int64(len(h.n.now))
	for start = off; start < size && !h.n.backed[int(start/page)]; {
		start = (start/page + 1) * page
	}
	if start >= size {
		return 0, 0, false, nil
	}
	for end = start; end < size && h.n.backed[int(end/page)]; {
		end = (end/page + 1) * page
	}
	return start, min(end, size), true, nil
}

// Share copies: nobody can tell, but for the room it takes.
func (h *file) Share(from layer.File, off, n int64) bool {
	src, ok := from.(*file)
	if !ok || !h.fs.Reflinks || off+n > int64(len(src.n.now)) {
		return false
	}
	_, err := h.WriteAt(src.n.now[off:off+n], off)
	return err == nil
}

func (h *file) Size() (int64, error) { return int64(len(h.n.now)), nil }

func (h *file) Used() (int64, error) { return int64(len(h.n.backed)) * page, nil }

// Sync writes everything to disk; a failure loses what was to be written, and
// the next sync succeeds as if it were there. That is how Linux does it.
func (h *file) Sync() error {
	if h.fs.FailSync {
		h.fs.FailSync = false
		for p := range h.n.dirty {
			h.n.dirty[p] = true
		}
		return syscall.EIO
	}
	h.n.disk = resized(h.n.disk, len(h.n.now))
	for p, lost := range h.n.dirty {
		if !lost {
			copy(h.n.disk[p*page:], h.n.now[p*page:min((p+1)*page, len(h.n.now))])
			delete(h.n.dirty, p)
		}
	}
	return nil
}
