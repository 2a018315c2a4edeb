package image

import (
	"errors"
	"io"

	"github.com/ulikunitz/xz"
)

// Sizes of the xz file format, version 1.0.4.
const (
	xzStreamHeader = 12
	xzStreamFooter = 12
	xzIndexSum     = 4
)

var errXZ = errors.New("its blocks are not as they should be")

// watchedXZ is what an xz file holds, or what its watch says against it.
type watchedXZ struct {
	*xz.Reader
	watch *xzWatch
}

func (w *watchedXZ) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	if w.watch.err != nil {
		err = w.watch.err
	}
	return n, err
}

// xzWatch passes an xz file on, and follows its structure so far that it sees
// each block's header before it hands it on. What asks for more than maxWindow
// goes no further.
type xzWatch struct {
	r   io.Reader
	err error

	// skip bytes are of no interest; then need are, all at once, to then.
	skip, need int
	then       func(part []byte) error
	part       []byte

	sum    int // bytes behind each block, of the stream that this is
	packed int // bytes of a block or an index so far, for its padding
}

func newXZWatch(r io.Reader) *xzWatch {
	w := &xzWatch{r: r}
	w.want(xzStreamHeader, w.streamHeader)
	return w
}

// Read implements io.Reader.
func (w *xzWatch) Read(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.r.Read(p)
	if w.err = w.see(p[:n]); w.err != nil {
		return 0, w.err
	}
	return n, err
}

func (w *xzWatch) want(n int, then func([]byte) error) { w.need, w.then = n, then }

func (w *xzWatch) see(p []byte) error {
	for len(p) > 0 {
		if n := min(w.skip, len(p)); n > 0 {
			w.skip, p = w.skip-n, p[n:]
			continue
		}
		n := min(w.need-len(w.part), len(p))
		w.part, p = append(w.part, p[:n]...), p[n:]
		if len(w.part) < w.need {
			return nil
		}
		part := w.part
		w.part = w.part[:0]
		if err := w.then(part); err != nil {
			return err
		}
	}
	return nil
}

func (w *xzWatch) streamHeader(b []byte) error {
	w.sum = 0
	if kind := int(b[7] & 0xf); kind > 0 {
		w.sum = 4 << ((kind - 1) / 3) // three kinds of 4 bytes, three of 8 ...
	}
	w.want(1, w.blockBegins)
	return nil
}

func (w *xzWatch) blockBegins(b []byte) error {
	if b[0] == 0 {
		w.packed = 1
		w.index()
		return nil
	}
	w.want((int(b[0])+1)*4-1, w.blockHeader)
	return nil
}

func (w *xzWatch) blockHeader(b []byte) error {
	window, err := xzWindow(b[:len(b)-4]) // without its sum
	if err != nil {
		return err
	}
	if window > maxWindow {
		return refuse("the file is compressed with xz and asks for a window of %d MiB: at most %d", window>>20, maxWindow>>20)
	}
	w.packed = 0
	w.want(1, w.chunk)
	return nil
}

// chunk is the first byte of one of LZMA2's.
func (w *xzWatch) chunk(b []byte) error {
	w.packed++
	switch kind := b[0]; {
	case kind == 0: // none follows
		w.skip = -w.packed&3 + w.sum
		w.want(1, w.blockBegins)
	case kind < 3:
		w.want(2, w.plainSize)
	case kind >= 0xc0:
		w.want(5, w.packedSize)
	case kind >= 0x80:
		w.want(4, w.packedSize)
	default:
		return errXZ
	}
	return nil
}

func (w *xzWatch) plainSize(b []byte) error {
	w.data(len(b), int(b[0])<<8+int(b[1])+1)
	return nil
}

// packedSize: the first two bytes are the size of what comes out.
func (w *xzWatch) packedSize(b []byte) error {
	w.data(len(b), int(b[2])<<8+int(b[3])+1)
	return nil
}

func (w *xzWatch) data(header, size int) {
	w.skip = size
	w.packed += header + size
	w.want(1, w.chunk)
}

// index is a number of pairs of numbers, each with seven bits in a byte.
func (w *xzWatch) index() {
	w.number(w.records)
}

func (w *xzWatch) records(n uint64) {
	if n == 0 {
		w.skip = -w.packed&3 + xzIndexSum + xzStreamFooter
		w.want(1, w.afterStream)
		return
	}
	w.number(func(uint64) {
		w.number(func(uint64) { w.records(n - 1) })
	})
}

func (w *xzWatch) number(then func(uint64)) {
	var n uint64
	var shift uint
	w.want(1, func(b []byte) error {
		w.packed++
		n |= uint64(b[0]&0x7f) << shift
		if shift += 7; b[0]&0x80 == 0 {
			then(n)
			return nil
		}
		if shift > 56 {
			return errXZ
		}
		return nil
	})
}

// afterStream: zeros, or another stream.
func (w *xzWatch) afterStream(b []byte) error {
	if first := b[0]; first != 0 {
		w.want(xzStreamHeader-1, func(rest []byte) error { return w.streamHeader(append([]byte{first}, rest...)) })
	}
	return nil
}

// xzWindow is the dictionary size of a block's LZMA2 filter, by the block's
// header without its own size and its sum; see the xz file format, 3.1 and 5.3.1.
func xzWindow(header []byte) (int64, error) {
	bad := errors.New("a block's header is not as it should be")
	if len(header) == 0 {
		return 0, bad
	}
	flags, at := header[0], 1
	for _, present := range []bool{flags&0x40 != 0, flags&0x80 != 0} {
		for more := present; more; at++ {
			if at >= len(header) {
				return 0, bad
			}
			more = header[at]&0x80 != 0
		}
	}
	// Other filters would stand before it; the library knows none.
	if at+2 >= len(header) || header[at] != 0x21 || header[at+1] != 1 {
		return 0, bad
	}
	bits := header[at+2]
	switch {
	case bits > 40:
		return 0, bad
	case bits == 40:
		return 1<<32 - 1, nil
	}
	return int64(2|bits&1) << (bits/2 + 11), nil
}
