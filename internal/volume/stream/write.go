package stream

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/argon-cluster/argon/internal/volume"
)

// Writer writes one stream. Not safe for concurrent use.
type Writer struct {
	w       io.Writer
	sum     hash.Hash
	size    int64
	whole   bool
	next    int64 // where the next record may begin
	records int64
	err     error
}

// NewWriter writes the header.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("stream: %w", err)
	}
	s := &Writer{w: w, sum: sha256.New(), size: h.Size, whole: h.Whole()}
	s.write(h.marshal())
	return s, s.err
}

func (s *Writer) write(b []byte) {
	if s.err != nil {
		return
	}
	s.sum.Write(b)
	if _, err := s.w.Write(b); err != nil {
		s.err = fmt.Errorf("stream: %w", err)
	}
}

// Data says what the volume has at an offset. Records come in the order of
// their offsets.
func (s *Writer) Data(off int64, p []byte) error {
	for len(p) > 0 && s.err == nil {
		n := min(len(p), MaxData)
		s.record(head{kindData, uint32(n), off, int64(n)}, p[:n])
		off, p = off+int64(n), p[n:]
	}
	return s.err
}

// Zeros says that the volume has zeros there. A whole stream leaves them out.
func (s *Writer) Zeros(off, n int64) error {
	if !s.whole && n > 0 {
		s.record(head{kindZeros, 0, off, n}, nil)
	}
	return s.err
}

func (s *Writer) record(h head, payload []byte) {
	if s.err == nil && (h.off < s.next || h.len <= 0 || h.len > s.size-h.off || (h.off|h.len)%volume.SectorSize != 0) {
		s.err = fmt.Errorf("stream: a record at %d of %d bytes is out of order, or outside the volume", h.off, h.len)
	}
	var b [headSize]byte
	h.marshal(&b, payload)
	s.write(b[:])
	s.write(payload)
	s.next = h.off + h.len
	s.records++
}

// Close writes the end; the underlying writer stays open.
func (s *Writer) Close() error {
	if s.err != nil {
		return s.err
	}
	sum := s.sum.Sum(nil)
	var b [headSize]byte
	head{kindEnd, sumSize, s.size, s.records}.marshal(&b, sum)
	s.write(b[:])
	s.write(sum)
	err := s.err
	s.err = errors.New("stream: written to after its end")
	return err
}

// Snapshot is what a stream is made of; see replica.View.
type Snapshot interface {
	ReadAt(p []byte, off int64) error
	// Changed sets a bit for each grain that may have been written in the
	// generation since or later; if since is 0, for each that may hold
	// anything but zeros.
	Changed(since uint64, off, n, grain int64, bits []byte) error
}

const (
	// window is how much is asked about at once; its bits fill 128 bytes.
	window = 1 << 30
	// block is the unit in which zeros are told from data.
	block = 64 << 10
)

// Sink is told what a snapshot has, in the order of offsets. *Writer is one.
type Sink interface {
	Data(off int64, p []byte) error
	Zeros(off, n int64) error
}

// Walk tells a sink what a snapshot of that size has where it was written since
// a generation; since 0: where it has anything. progress is told how far it is.
func Walk(ctx context.Context, s Snapshot, size int64, since uint64, to Sink, progress func(done int64)) error {
	buf := make([]byte, MaxData)
	for at := int64(0); at < size; at += window {
		n := min(window, size-at)
		bits := make([]byte, window/MaxData/8)
		if err := s.Changed(since, at, n, MaxData, bits); err != nil {
			return fmt.Errorf("listing what was written: %w", err)
		}
		for off := at; off < at+n; off += MaxData {
			if err := ctx.Err(); err != nil {
				return err
			}
			if i := (off - at) / MaxData; bits[i/8]&(1<<(i%8)) == 0 {
				continue
			}
			if err := walkRegion(s, buf[:min(MaxData, size-off)], off, to); err != nil {
				return err
			}
			progress(off + min(MaxData, size-off))
		}
		progress(at + n)
	}
	return nil
}

// walkRegion joins neighbouring blocks that are alike.
func walkRegion(s Snapshot, p []byte, off int64, to Sink) error {
	if err := s.ReadAt(p, off); err != nil {
		return fmt.Errorf("reading at %d: %w", off, err)
	}
	for len(p) > 0 {
		zeros, n := isZero(p[:min(block, len(p))]), min(block, len(p))
		for n < len(p) && isZero(p[n:min(n+block, len(p))]) == zeros {
			n = min(n+block, len(p))
		}
		var err error
		if zeros {
			err = to.Zeros(off, int64(n))
		} else {
			err = to.Data(off, p[:n])
		}
		if err != nil {
			return err
		}
		off, p = off+int64(n), p[n:]
	}
	return nil
}

var noBytes [block]byte

func isZero(p []byte) bool { return string(p) == string(noBytes[:len(p)]) }
