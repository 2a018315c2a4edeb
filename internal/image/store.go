package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	suffix     = ".raw"
	tempPrefix = ".part-"
)

// ErrNoSpace: the disk that keeps the images is full, or would be.
var ErrNoSpace = errors.New("no space left for the image")

// ErrChecksum: the bytes are not those that were announced.
var ErrChecksum = errors.New("wrong checksum")

// Options are what a Store is made with.
type Options struct {
	// Dir is made if it is not there.
	Dir string
	Log *slog.Logger
	// Tool is the qemu-img program; empty: "qemu-img" from PATH.
	Tool string
	// HTTP downloads URLs; nil: a client with sane time limits.
	HTTP *http.Client
	// Free says how many bytes of Dir's file system are free, and how many it
	// has; nil: ask the kernel.
	Free func(dir string) (free, total uint64, err error)
}

// Store keeps images as DIR/<id>.raw: sparse, complete, and durable once there
// is a file of that name. Safe for concurrent use.
type Store struct {
	dir  string
	log  *slog.Logger
	tool string
	http *http.Client
	free func(dir string) (free, total uint64, err error)

	mu sync.Mutex
	// Stored, but perhaps not recorded yet: see Staged.
	fresh map[string]bool
}

// NewStore opens the images of a directory and deletes what an interrupted
// import left in it.
func NewStore(o Options) (*Store, error) {
	s := &Store{dir: o.Dir, log: o.Log, tool: o.Tool, http: o.HTTP, free: o.Free, fresh: map[string]bool{}}
	if s.tool == "" {
		s.tool = "qemu-img"
	}
	if s.http == nil {
		s.http = httpClient()
	}
	if s.free == nil {
		s.free = diskFree
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory for images: %w", err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading the directory for images: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
				return nil, fmt.Errorf("removing what an interrupted import left: %w", err)
			}
		}
	}
	return s, nil
}

func httpClient() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = 30 * time.Second
	return &http.Client{Transport: t}
}

func diskFree(dir string) (free, total uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("asking for the free space of %s: %w", dir, err)
	}
	return st.Bavail * uint64(st.Bsize), st.Blocks * uint64(st.Bsize), nil
}

// path refuses what could name another directory's file.
func (s *Store) path(id string) (string, error) {
	if id == "" || strings.ContainsAny(id, "/\x00") || strings.HasPrefix(id, ".") {
		return "", fmt.Errorf("image id %q: %w", id, fs.ErrInvalid)
	}
	return filepath.Join(s.dir, id+suffix), nil
}

// Path is the file of an image, for those who copy it by its name. It may not
// be there.
func (s *Store) Path(id string) string { return filepath.Join(s.dir, id+suffix) }

// List returns the ids of the stored images, sorted, without those that are
// just being imported and may not be in the catalog yet.
func (s *Store) List() ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading the directory for images: %w", err)
	}
	var ids []string
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), suffix)
		if ok && !strings.HasPrefix(id, ".") && !s.fresh[id] {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// Has tells whether an image is here, whole, even one that is just being
// imported.
func (s *Store) Has(id string) (bool, error) {
	path, err := s.path(id)
	if err != nil {
		return false, err
	}
	switch _, err := os.Stat(path); {
	case err == nil:
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	default:
		return false, fmt.Errorf("looking for image %s: %w", id, err)
	}
}

// Open opens an image for reading. fs.ErrNotExist when it is not here. An open
// image stays readable while it is removed.
func (s *Store) Open(id string) (*os.File, error) {
	path, err := s.path(id)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening image %s: %w", id, err)
	}
	return f, nil
}

// Remove deletes an image's file. One that is not here is no error.
func (s *Store) Remove(id string) error {
	path, err := s.path(id)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing image %s: %w", id, err)
	}
	return nil
}

// Send hands out an image's bytes in order, in pieces of at most 1 MiB, without
// those that are zero. data is valid during the call only.
func (s *Store) Send(ctx context.Context, id string, send func(off int64, data []byte) error) error {
	f, err := s.Open(id)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("image %s: %w", id, err)
	}
	return sendFile(ctx, f, st.Size(), send)
}

// Piece is a part of an image on its way between servers.
type Piece struct {
	Offset int64
	Data   []byte
}

// Fetch stores an image of the given size from the pieces that next returns
// until io.EOF. What no piece covers is zero. The image is there only once its
// SHA-256 (hex) was found right. progress is called from this goroutine, with the
// phases "receiving" and "checking".
func (s *Store) Fetch(ctx context.Context, id string, size int64, sum string, next func() (Piece, error), progress func(Progress)) error {
	path, err := s.path(id)
	if err != nil {
		return err
	}
	if size <= 0 || size > MaxSize {
		return fmt.Errorf("fetching image %s: a size of %d bytes cannot be", id, size)
	}
	f, err := s.temp()
	if err != nil {
		return err
	}
	defer discard(f)
	if err := s.receive(ctx, f, size, next, func(done int64) { progress(Progress{"receiving", done, size}) }); err != nil {
		return fmt.Errorf("fetching image %s: %w", id, s.explain(err))
	}
	got, err := sumFile(ctx, f, size, func(done int64) { progress(Progress{"checking", done, size}) })
	if err != nil {
		return fmt.Errorf("fetching image %s: %w", id, err)
	}
	if got != sum {
		return fmt.Errorf("fetching image %s: %w: got %s, its record says %s", id, ErrChecksum, got, sum)
	}
	return s.keep(f, path)
}

func (s *Store) receive(ctx context.Context, f *os.File, size int64, next func() (Piece, error), progress func(done int64)) error {
	room := s.roomCheck()
	for {
		p, err := next()
		if errors.Is(err, io.EOF) {
			return f.Truncate(size)
		}
		if err != nil {
			return err
		}
		if p.Offset < 0 || p.Offset > size || int64(len(p.Data)) > size-p.Offset {
			return fmt.Errorf("the sender speaks of bytes beyond the image's end")
		}
		if err := room(len(p.Data)); err != nil {
			return err
		}
		if _, err := f.WriteAt(p.Data, p.Offset); err != nil {
			return err
		}
		progress(p.Offset + int64(len(p.Data)))
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

func (s *Store) temp() (*os.File, error) {
	f, err := os.CreateTemp(s.dir, tempPrefix)
	if err != nil {
		return nil, fmt.Errorf("making a file for the image: %w", s.explain(err))
	}
	return f, nil
}

// discard ends the use of a temporary file that may have been kept.
func discard(f *os.File) {
	_ = f.Close()
	_ = os.Remove(f.Name())
}

// keep makes a temporary file durable under its final name.
func (s *Store) keep(f *os.File, path string) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing the image to the disk: %w", s.explain(err))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("naming the image's file: %w", err)
	}
	d, err := os.Open(s.dir)
	if err != nil {
		return fmt.Errorf("writing the directory for images: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("writing the directory for images: %w", err)
	}
	return nil
}

// explain turns a full disk into words.
func (s *Store) explain(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return s.noSpace()
	}
	return err
}
