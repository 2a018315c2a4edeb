package stream

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"github.com/argon-cluster/argon/internal/volume"
)

// Record is a part of a stream.
type Record struct {
	Off, Len int64
	// Data is nil for zeros; it is valid until the next record is read.
	Data []byte
}

// Reader reads one stream. Not safe for concurrent use.
type Reader struct {
	r       *bufio.Reader
	sum     hash.Hash
	header  Header
	next    int64
	records int64
	buf     []byte
	err     error
}

// NewReader reads the header. Errors: ErrDamaged, ErrUnknown, or what reading
// returned.
func NewReader(r io.Reader) (*Reader, error) {
	s := &Reader{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	b := make([]byte, 12, headerSize)
	if err := s.fill(b); err != nil {
		return nil, err
	}
	if !Looks(b) {
		return nil, fmt.Errorf("%w: it does not begin as a stream does", ErrDamaged)
	}
	n := binary.LittleEndian.Uint32(b[8:])
	if n < headerSize || n > maxHeader {
		return nil, fmt.Errorf("%w: a header of %d bytes", ErrDamaged, n)
	}
	b = append(b, make([]byte, int(n)-len(b))...)
	if err := s.fill(b[12:]); err != nil {
		return nil, err
	}
	var err error
	s.header, err = parseHeader(b)
	return s, err
}

// Header says what the stream holds.
func (s *Reader) Header() Header { return s.header }

// fill reads what must be there, and sums it up.
func (s *Reader) fill(p []byte) error {
	if _, err := io.ReadFull(s.r, p); err != nil {
		return cut(err)
	}
	s.sum.Write(p)
	return nil
}

// cut tells a stream that ends too early from a failure of who brings it.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it was cut off", ErrDamaged)
	}
	return err
}

// Next returns the next record; io.EOF after the last one, once the end was
// found to be right and nothing follows it. Only then the records are known to
// be what was written.
func (s *Reader) Next() (Record, error) {
	if s.err != nil {
		return Record{}, s.err
	}
	r, err := s.read()
	s.err = err
	return r, err
}

func (s *Reader) read() (Record, error) {
	var b [headSize]byte
	if _, err := io.ReadFull(s.r, b[:]); err != nil {
		return Record{}, cut(err)
	}
	h, err := parseHead(&b)
	if err != nil {
		return Record{}, err
	}
	if err := s.check(h); err != nil {
		return Record{}, err
	}
	if len(s.buf) < int(h.follow) {
		s.buf = make([]byte, h.follow)
	}
	payload := s.buf[:h.follow]
	if _, err := io.ReadFull(s.r, payload); err != nil {
		return Record{}, cut(err)
	}
	if crc32.Update(crc32.Checksum(b[:28], table), table, payload) != binary.LittleEndian.Uint32(b[28:]) {
		return Record{}, fmt.Errorf("%w: the checksum of a record at %d is wrong", ErrDamaged, h.off)
	}
	if h.kind == kindEnd {
		return Record{}, s.end(payload)
	}
	s.sum.Write(b[:])
	s.sum.Write(payload)
	s.next = h.off + h.len
	s.records++
	r := Record{Off: h.off, Len: h.len}
	if h.kind == kindData {
		r.Data = payload
	}
	return r, nil
}

// check refuses a record that can't stand here.
func (s *Reader) check(h head) error {
	ok := false
	switch h.kind {
	case kindData:
		ok = int64(h.follow) == h.len && h.len <= MaxData
	case kindZeros:
		ok = h.follow == 0 && !s.header.Whole()
	case kindEnd:
		if h.follow != sumSize || h.off != s.header.Size || h.len != s.records {
			return fmt.Errorf("%w: its end is of another stream", ErrDamaged)
		}
		return nil
	}
	if !ok || h.len <= 0 || h.off < s.next || h.len > s.header.Size-h.off || (h.off|h.len)%volume.SectorSize != 0 {
		return fmt.Errorf("%w: a record at %d of %d bytes can't be there", ErrDamaged, h.off, h.len)
	}
	return nil
}

// end returns io.EOF when all is right.
func (s *Reader) end(sum []byte) error {
	if string(s.sum.Sum(nil)) != string(sum) {
		return fmt.Errorf("%w: the checksum of the whole is wrong", ErrDamaged)
	}
	switch _, err := s.r.ReadByte(); {
	case errors.Is(err, io.EOF):
		return io.EOF
	case err != nil:
		return err
	}
	return fmt.Errorf("%w: something follows its end", ErrDamaged)
}

// Verify reads a whole stream and tells whether it is as it was written.
func Verify(r io.Reader) (Header, error) {
	s, err := NewReader(r)
	for err == nil {
		_, err = s.Next()
	}
	if errors.Is(err, io.EOF) {
		return s.header, nil
	}
	return Header{}, err
}
