// Package logfile keeps what a server logs in two files that take turns, and reads
// it back.
//
// What lives here: the files, how they are written without ever holding up who logs,
// how they are read and followed. What must not: what is logged (log/slog does that),
// who may read it (internal/rpc).
package logfile

import (
	"io"
	"os"
	"path/filepath"
	"sync"
)

// Names of the files in their directory.
const (
	current  = "argon.log"
	previous = "argon.log.1"
)

// MaxBytes is how large a file may become before the other's turn comes.
const MaxBytes = 8 << 20

// waiting is how many pieces may wait for the disk. What comes then is dropped:
// whoever logs must not wait.
const waiting = 1024

// Writer writes on another writer, and to the files. It is safe for concurrent use.
type Writer struct {
	out    io.Writer
	dir    string
	max    int64
	pieces chan []byte
	done   sync.WaitGroup
	once   sync.Once
}

// New makes a writer on out and on the files in a directory, which is made when
// there is something to write. Close it.
func New(dir string, out io.Writer) *Writer { return newWriter(dir, out, MaxBytes) }

func newWriter(dir string, out io.Writer, size int64) *Writer {
	w := &Writer{out: out, dir: dir, max: size, pieces: make(chan []byte, waiting)}
	w.done.Go(w.keep)
	return w
}

// Write implements io.Writer. Its error is that of out: a disk that is full, or
// hangs, costs lines in the files and nothing else.
func (w *Writer) Write(p []byte) (int, error) {
	select {
	case w.pieces <- append([]byte(nil), p...):
	default:
	}
	return w.out.Write(p)
}

// Close waits until what was written is in the files. Nothing may be written after.
func (w *Writer) Close() {
	w.once.Do(func() { close(w.pieces) })
	w.done.Wait()
}

// keep writes to the files.
func (w *Writer) keep() {
	var f *os.File
	var size int64
	for p := range w.pieces {
		if f == nil {
			f, size = w.open()
		}
		if f == nil {
			continue // tried again with the next piece
		}
		n, err := f.Write(p)
		if size += int64(n); err != nil || size >= w.max {
			_ = f.Close()
			f = nil
		}
	}
	if f != nil {
		_ = f.Close()
	}
}

// open opens the current file; one that is full becomes the previous one.
func (w *Writer) open() (*os.File, int64) {
	if os.MkdirAll(w.dir, 0o700) != nil {
		return nil, 0
	}
	path := filepath.Join(w.dir, current)
	if about, err := os.Stat(path); err == nil && about.Size() >= w.max {
		_ = os.Rename(path, filepath.Join(w.dir, previous))
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, 0
	}
	about, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, 0
	}
	return f, about.Size()
}
