package image

import (
	"bufio"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxWindow is how far back compressed data may refer, in bytes: what the
// compressors' own tools accept unless told otherwise. A file could ask for
// gigabytes of memory with it.
const maxWindow = 128 << 20

// packed is a file that is compressed as a whole.
type packed struct {
	name string // the program's
	mark string
	open func(head []byte, r io.Reader) (io.Reader, func(), error)
}

var packers = []packed{
	{"gzip", "\x1f\x8b", openGzip},
	{"xz", "\xfd7zXZ\x00", openXZ},
	{"zstd", "\x28\xb5\x2f\xfd", openZstd},
	{"bzip2", "BZh", openBzip2},
}

// unpacked is what a compressed file holds. Reading it tells damage from what
// the source's own reader returned.
type unpacked struct {
	io.Reader
	name   string
	source *source
	close  func()
}

// unpack opens what is compressed; nil if the file is not.
func unpack(head []byte, from *bufio.Reader, src *source) (*unpacked, error) {
	for _, p := range packers {
		if !(mark{p.name, 0, p.mark}).in(head) {
			continue
		}
		r, closing, err := p.open(head, from)
		u := &unpacked{Reader: r, name: p.name, source: src, close: closing}
		if err != nil {
			return nil, u.explain(err)
		}
		return u, nil
	}
	return nil, nil
}

func (u *unpacked) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = u.explain(err)
	}
	return n, err
}

func (u *unpacked) explain(err error) error {
	if u.source.err != nil {
		return u.source.err
	}
	var ours *notImage
	if errors.As(err, &ours) {
		return err
	}
	return refuse("the file is compressed with %s, and damaged or truncated: %v", u.name, err)
}

func openGzip(_ []byte, r io.Reader) (io.Reader, func(), error) {
	z, err := gzip.NewReader(r)
	return z, func() {}, err
}

func openBzip2(_ []byte, r io.Reader) (io.Reader, func(), error) {
	return bzip2.NewReader(r), func() {}, nil
}

func openZstd(_ []byte, r io.Reader) (io.Reader, func(), error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, nil, err
	}
	return z, z.Close, nil
}

// openXZ watches what each block asks for before the library sees it: that makes
// room for whatever window there is.
func openXZ(_ []byte, r io.Reader) (io.Reader, func(), error) {
	w := newXZWatch(r)
	z, err := xz.NewReader(w)
	return &watchedXZ{z, w}, func() {}, errors.Join(err, w.err)
}

// source is the file as it is given: it counts, and keeps the reader's own
// error.
type source struct {
	r    io.Reader
	read func(done int64)
	n    int64
	err  error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n += int64(n)
	if n > 0 {
		s.read(s.n)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// rest reads what follows the compressed data: nothing, or the file is more
// than it seems.
func (u *unpacked) rest(from io.Reader) error {
	n, err := io.Copy(io.Discard, from)
	if err != nil {
		return err
	}
	if n > 0 {
		return refuse("the file is compressed with %s, and %d bytes follow that belong to nothing", u.name, n)
	}
	return nil
}
