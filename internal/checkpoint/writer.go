package checkpoint

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

const (
	// queued bounds the frames that wait to be written: while a guest runs on,
	// what it is about to overwrite must be taken from it at once.
	queued = 64
	// compressors is how many frames are compressed at once.
	compressors = 2
)

// Writer writes a stream. Write does not wait for the destination as long as
// there is room in its queue. Not safe for concurrent use.
type Writer struct {
	w       io.Writer
	encoder *zstd.Encoder
	raw     []byte
	queue   chan *frame
	slots   chan struct{}
	wg      sync.WaitGroup
	closing sync.Once

	mu     sync.Mutex
	err    error
	totals Totals
	heads  hash.Hash
}

// frame is one on its way.
type frame struct {
	raw, content []byte
	done         chan struct{}
}

var errClosed = errors.New("the memory's writer is closed")

// NewWriter begins a stream of the checkpoint.
func NewWriter(w io.Writer, id string) (*Writer, error) {
	header, err := marshalHeader(id)
	if err != nil {
		return nil, err
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(compressors), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("compressing memory: %w", err)
	}
	if _, err := w.Write(header); err != nil {
		return nil, fmt.Errorf("writing the memory's header: %w", err)
	}
	s := &Writer{
		w: w, encoder: encoder, raw: make([]byte, 0, frameSize), heads: sha256.New(),
		queue: make(chan *frame, queued), slots: make(chan struct{}, compressors),
	}
	s.wg.Go(s.drain)
	return s, nil
}

// Write implements io.Writer.
func (s *Writer) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		part := min(len(p), frameSize-len(s.raw))
		s.raw, p = append(s.raw, p[:part]...), p[part:]
		if len(s.raw) == frameSize {
			if err := s.send(); err != nil {
				return n - len(p), err
			}
		}
	}
	return n, nil
}

// send hands a frame over.
func (s *Writer) send() error {
	if err := s.failure(); err != nil || len(s.raw) == 0 {
		return err
	}
	f := &frame{raw: s.raw, done: make(chan struct{})}
	s.raw = make([]byte, 0, frameSize)
	s.slots <- struct{}{}
	s.wg.Go(func() {
		defer close(f.done)
		defer func() { <-s.slots }()
		f.content = s.encoder.EncodeAll(f.raw, make([]byte, 0, len(f.raw)/2))
		if len(f.content) >= len(f.raw) {
			f.content = f.raw
		}
	})
	s.queue <- f
	return nil
}

// drain writes frames in their order.
func (s *Writer) drain() {
	for f := range s.queue {
		<-f.done
		if s.failure() != nil {
			continue
		}
		head := marshalHead(s.totals.Frames, len(f.raw), f.content)
		_, err := s.w.Write(head)
		if err == nil {
			_, err = s.w.Write(f.content)
		}
		s.mu.Lock()
		if err != nil {
			s.err = fmt.Errorf("writing frame %d of the memory: %w", s.totals.Frames, err)
		}
		s.heads.Write(head)
		s.totals.Frames++
		s.totals.Raw += uint64(len(f.raw))
		s.totals.Stored += uint64(len(f.content))
		s.mu.Unlock()
	}
}

func (s *Writer) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Finish writes what is left, and the trailer.
func (s *Writer) Finish() (Totals, error) {
	err := s.send()
	s.end()
	if err = errors.Join(err, s.failure()); err != nil {
		return Totals{}, err
	}
	s.err = errClosed
	if _, err := s.w.Write(marshalTrailer(s.totals, [32]byte(s.heads.Sum(nil)))); err != nil {
		return Totals{}, fmt.Errorf("writing the memory's trailer: %w", err)
	}
	return s.totals, nil
}

// Close gives the stream up, unless it is finished.
func (s *Writer) Close() {
	s.mu.Lock()
	if s.err == nil {
		s.err = errClosed
	}
	s.mu.Unlock()
	s.end()
}

// end waits for all that runs.
func (s *Writer) end() {
	s.closing.Do(func() {
		close(s.queue)
		s.wg.Wait()
		_ = s.encoder.Close()
	})
}
