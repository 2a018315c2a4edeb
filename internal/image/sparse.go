package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// blockSize is the unit in which zeros become holes, in bytes.
const blockSize = 4096

// pieceSize is the most that one read, write or message carries, in bytes.
const pieceSize = 1 << 20

var zeros [pieceSize]byte

// sparseWriter writes one byte after the other into an empty file and leaves
// holes where whole blocks are zero.
type sparseWriter struct {
	f   *os.File
	off int64
}

func (w *sparseWriter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := min(len(p)-done, blockSize-int(w.off%blockSize))
		part := p[done : done+n]
		if !bytes.Equal(part, zeros[:n]) {
			if _, err := w.f.WriteAt(part, w.off); err != nil {
				return done, err
			}
		}
		w.off += int64(n)
		done += n
	}
	return done, nil
}

// finish gives the file its length, which a hole at its end does not.
func (w *sparseWriter) finish() error { return w.f.Truncate(w.off) }

// eachExtent calls do for the parts of the file that are not holes, in order.
func eachExtent(f *os.File, size int64, do func(off, n int64) error) error {
	for off := int64(0); off < size; {
		data, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, syscall.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return fmt.Errorf("looking for data in %s: %w", f.Name(), err)
		}
		hole, err := f.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("looking for holes in %s: %w", f.Name(), err)
		}
		hole = min(hole, size)
		if data < hole {
			if err := do(data, hole-data); err != nil {
				return err
			}
		}
		off = hole
	}
	return nil
}

// sumFile returns the SHA-256 of the whole file, hex. Holes are not read.
func sumFile(ctx context.Context, f *os.File, size int64, progress func(done int64)) (string, error) {
	h := sha256.New()
	buf := make([]byte, pieceSize)
	at := int64(0)
	skip := func(to int64) error {
		for at < to && ctx.Err() == nil {
			n := min(to-at, pieceSize)
			h.Write(zeros[:n])
			at += n
			progress(at)
		}
		return ctx.Err()
	}
	err := eachExtent(f, size, func(off, n int64) error {
		if err := skip(off); err != nil {
			return err
		}
		for at < off+n {
			part := buf[:min(off+n-at, pieceSize)]
			if _, err := f.ReadAt(part, at); err != nil {
				return fmt.Errorf("reading %s: %w", f.Name(), err)
			}
			h.Write(part)
			at += int64(len(part))
			progress(at)
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = skip(size)
	}
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// sendFile hands out the parts of the file that are not zero, at most
// pieceSize bytes at once. data is valid during the call only.
func sendFile(ctx context.Context, f *os.File, size int64, send func(off int64, data []byte) error) error {
	buf := make([]byte, pieceSize)
	return eachExtent(f, size, func(off, n int64) error {
		for end := off + n; off < end; {
			part := buf[:min(end-off, pieceSize)]
			if _, err := f.ReadAt(part, off); err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("reading %s: %w", f.Name(), err)
			}
			if !bytes.Equal(part, zeros[:len(part)]) {
				if err := send(off, part); err != nil {
					return err
				}
			}
			off += int64(len(part))
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		return nil
	})
}
