package checkpoint

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Reader reads a stream. At io.EOF the trailer was seen, and everything was as
// it had been written; no byte of a damaged frame is returned. Not safe for
// concurrent use.
type Reader struct {
	r       io.Reader
	decoder *zstd.Decoder
	most    int
	content []byte // room for a frame as it lies there
	raw     []byte // room for a frame
	left    []byte // of raw, not read yet
	err     error
	totals  Totals
	heads   hash.Hash
}

// NewReader begins to read the stream of a checkpoint. Close it.
func NewReader(r io.Reader, id string) (*Reader, error) {
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("reading the memory's header: %w", ended(err))
	}
	most, err := parseHeader(b, id)
	if err != nil {
		return nil, err
	}
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxFrameSize))
	if err != nil {
		return nil, fmt.Errorf("decompressing memory: %w", err)
	}
	return &Reader{r: r, decoder: decoder, most: most, heads: sha256.New()}, nil
}

// Close gives back what it has.
func (s *Reader) Close() { s.decoder.Close() }

// Totals are those of the whole stream, once Read has come to its end.
func (s *Reader) Totals() Totals { return s.totals }

// Read implements io.Reader.
func (s *Reader) Read(p []byte) (int, error) {
	for len(s.left) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		s.err = s.next()
	}
	n := copy(p, s.left)
	s.left = s.left[n:]
	return n, nil
}

// next reads a frame, or the trailer: then it returns io.EOF.
func (s *Reader) next() error {
	number := s.totals.Frames
	b := make([]byte, trailerSize)
	if err := s.fill(b[:headSize], number); err != nil {
		return err
	}
	if string(b[:4]) == trailerMagic {
		if err := s.fill(b[headSize:], number); err != nil {
			return err
		}
		if err := checkTrailer(b, s.totals, [32]byte(s.heads.Sum(nil))); err != nil {
			return err
		}
		return io.EOF
	}
	h, err := parseHead(b[:headSize], number, s.most)
	if err != nil {
		return err
	}
	if cap(s.content) < int(h.stored) {
		s.content = make([]byte, h.stored, s.most)
	}
	content := s.content[:h.stored]
	if err := s.fill(content, number); err != nil {
		return err
	}
	if headSum(b, content) != h.sum {
		return damaged(number, "its checksum is wrong")
	}
	if s.left, err = s.unpack(h, content); err != nil {
		return err
	}
	s.heads.Write(b[:headSize])
	s.totals.Frames++
	s.totals.Raw += uint64(h.raw)
	s.totals.Stored += uint64(h.stored)
	return nil
}

// unpack makes a frame of its content.
func (s *Reader) unpack(h head, content []byte) ([]byte, error) {
	if h.stored == h.raw {
		return content, nil
	}
	raw, err := s.decoder.DecodeAll(content, s.raw[:0])
	if err != nil {
		return nil, damaged(h.number, "it can't be decompressed: %v", err)
	}
	if s.raw = raw; len(raw) != int(h.raw) {
		return nil, damaged(h.number, "%d bytes were to be in it, %d are", h.raw, len(raw))
	}
	return raw, nil
}

func (s *Reader) fill(b []byte, number uint32) error {
	if _, err := io.ReadFull(s.r, b); err != nil {
		return fmt.Errorf("reading frame %d of the memory: %w", number, ended(err))
	}
	return nil
}

// ended says what it means that a stream ends within itself.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends there", ErrDamaged)
	}
	return err
}
