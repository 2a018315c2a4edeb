package checkpoint

import (
	"context"
	"fmt"
	"io"

	"github.com/argon-cluster/argon/internal/volume"
)

const (
	// piece is the size of a request, in bytes, and pieces how many are under
	// way at once.
	piece  = 1 << 20
	pieces = 8
)

// Sink writes to a device from its beginning on; see io.Writer. Not safe for
// concurrent use.
type Sink struct {
	ctx     context.Context
	dev     volume.Device
	off     int64
	buf     []byte
	flying  int
	results chan error
	err     error
}

// NewSink makes one. A device may wait for ever: ctx ends that.
func NewSink(ctx context.Context, dev volume.Device) *Sink {
	return &Sink{ctx: ctx, dev: dev, buf: make([]byte, 0, piece), results: make(chan error, pieces)}
}

// Write implements io.Writer.
func (s *Sink) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		part := min(len(p), piece-len(s.buf))
		s.buf, p = append(s.buf, p[:part]...), p[part:]
		if len(s.buf) == piece {
			if err := s.submit(); err != nil {
				return n - len(p), err
			}
		}
	}
	return n, nil
}

// Flush writes what is left, filled up with zeros to a whole sector, and makes
// all of it survive a power cut.
func (s *Sink) Flush() error {
	if rest := len(s.buf) % volume.SectorSize; rest != 0 {
		s.buf = append(s.buf, make([]byte, volume.SectorSize-rest)...)
	}
	if err := s.submit(); err != nil {
		return err
	}
	for s.flying > 0 {
		s.wait()
	}
	if s.err == nil {
		s.start(&volume.Request{Op: volume.OpFlush})
		s.wait()
	}
	return s.err
}

// submit starts to write the buffer, which is the device's from then on.
func (s *Sink) submit() error {
	if s.flying == pieces {
		s.wait()
	}
	n := int64(len(s.buf))
	if s.err != nil || n == 0 {
		return s.err
	}
	if s.off+n > s.dev.Size() {
		s.err = fmt.Errorf("the volume of %d bytes is too small: %w", s.dev.Size(), volume.ErrNoSpace)
		return s.err
	}
	s.start(&volume.Request{Op: volume.OpWrite, Off: s.off, Len: n, Data: s.buf})
	s.off += n
	s.buf = make([]byte, 0, piece)
	return nil
}

func (s *Sink) start(r *volume.Request) {
	r.Done = func(err error) { s.results <- err }
	s.flying++
	s.dev.Submit(r)
}

// wait takes the outcome of one request.
func (s *Sink) wait() {
	var err error
	select {
	case err = <-s.results:
		s.flying--
	case <-s.ctx.Done():
		// What is under way is the device's, and nobody's after that.
		s.flying, err = 0, s.ctx.Err()
	}
	if s.err == nil {
		s.err = err
	}
}

// Source reads a device from its beginning to its end, ahead of what is asked
// for; see io.Reader. Not safe for concurrent use.
type Source struct {
	ctx   context.Context
	dev   volume.Device
	off   int64
	ahead []*reading
	left  []byte
}

type reading struct {
	data []byte
	done chan error
}

// NewSource makes one. A device may wait for ever: ctx ends that.
func NewSource(ctx context.Context, dev volume.Device) *Source {
	return &Source{ctx: ctx, dev: dev}
}

// Read implements io.Reader.
func (s *Source) Read(p []byte) (int, error) {
	for len(s.left) == 0 {
		s.readAhead()
		if len(s.ahead) == 0 {
			return 0, io.EOF
		}
		first := s.ahead[0]
		select {
		case err := <-first.done:
			if err != nil {
				return 0, err
			}
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
		s.left, s.ahead = first.data, s.ahead[1:]
	}
	n := copy(p, s.left)
	s.left = s.left[n:]
	return n, nil
}

func (s *Source) readAhead() {
	for size := s.dev.Size(); len(s.ahead) < pieces && s.off < size; {
		n := min(piece, size-s.off)
		r := &reading{data: make([]byte, n), done: make(chan error, 1)}
		s.dev.Submit(&volume.Request{Op: volume.OpRead, Off: s.off, Len: n, Data: r.data, Done: func(err error) { r.done <- err }})
		s.ahead = append(s.ahead, r)
		s.off += n
	}
}
