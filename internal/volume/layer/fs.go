// Package layer is one replica's files: their format, and the little that is
// done with them.
//
// What lives here: the superblock, layers with their tables, where each block is,
// what is copied and moved between layers and in which order, checksums, and the
// file systems all that lies on: the real one here, a simulated one that loses
// power in simfs/. What must not: the rules who may write, and when a replica may
// be trusted (replica/).
//
// The format is described in docs/volumes.md, "On disk".
package layer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// FS is a file system. Names are slash-separated paths. Safe for concurrent
// use.
type FS interface {
	MkdirAll(dir string) error
	// Open opens a file to read and write; create makes it if it is not there.
	Open(name string, create bool) (File, error)
	Rename(from, to string) error
	RemoveAll(name string) error
	// ReadDir lists the names in a directory, sorted.
	ReadDir(dir string) ([]string, error)
	// SyncDir makes the names in a directory survive a power cut.
	SyncDir(dir string) error
	// Free is how many bytes may still be written below dir.
	Free(dir string) (uint64, error)
}

// File is an open file. Safe for concurrent use.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// ReadCached fills p if that needs no disk, and reports whether it did.
	ReadCached(p []byte, off int64) bool
	Truncate(size int64) error
	// Sync is fdatasync: content and size survive a power cut.
	Sync() error
	// Punch gives the range's space back; it reads as zeros.
	Punch(off, n int64) error
	// NextData finds the first stretch at or after off that has data; what is
	// before it reads as zeros. ok is false if there is none.
	NextData(off int64) (start, end int64, ok bool, err error)
	// Share makes the range what it is in another file of the same file system,
	// by sharing its blocks, and reports whether it could. If not, the range has
	// any content.
	Share(from File, off, n int64) bool
	// Size is in bytes.
	Size() (int64, error)
	// Used is how many bytes the file takes on the disk.
	Used() (int64, error)
}

// IsFull tells whether an error means that the disk has no room, or the file system
// none for so large a file.
func IsFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}

// OS is the real file system.
type OS struct{}

type osFile struct{ *os.File }

// MkdirAll makes a directory and its parents, for this user only.
func (OS) MkdirAll(dir string) error { return os.MkdirAll(dir, 0o700) }

// Open opens a file to read and write.
func (OS) Open(name string, create bool) (File, error) {
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// Rename renames a file or directory.
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// RemoveAll deletes a file, or a directory and all in it.
func (OS) RemoveAll(name string) error { return os.RemoveAll(name) }

// ReadDir lists the names in a directory.
func (OS) ReadDir(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// SyncDir makes the names in a directory survive a power cut.
func (OS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Free is how many bytes an ordinary user may still write below dir.
func (OS) Free(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// ReadCached reads with RWF_NOWAIT; a file system that does not know that, or a
// page that is not there, leaves it to ReadAt.
func (f osFile) ReadCached(p []byte, off int64) bool {
	n, err := unix.Preadv2(int(f.Fd()), [][]byte{p}, off, unix.RWF_NOWAIT)
	return err == nil && n == len(p)
}

// writeStep bounds one write to the kernel, in bytes. A large one makes the page
// cache keep large folios, and ext4 then looks at every block of a folio for
// each small write to it: half of all processor time of random writes was spent
// there (Linux 6.18).
const writeStep = 64 << 10

func (f osFile) WriteAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := f.File.WriteAt(p[done:min(done+writeStep, len(p))], off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (f osFile) Sync() error { return unix.Fdatasync(int(f.Fd())) }

func (f osFile) NextData(off int64) (start, end int64, ok bool, err error) {
	// The file's own position, which lseek moves, is used by nobody.
	start, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, false, nil
	}
	if err == nil {
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	}
	return start, end, err == nil, err
}

func (f osFile) Punch(off, n int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// Share asks for a reflink, which XFS and Btrfs can make.
func (f osFile) Share(from File, off, n int64) bool {
	src, ok := from.(osFile)
	return ok && unix.IoctlFileCloneRange(int(f.Fd()), &unix.FileCloneRange{
		Src_fd: int64(src.Fd()), Src_offset: uint64(off), Src_length: uint64(n), Dest_offset: uint64(off),
	}) == nil
}

func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f osFile) Used() (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}
