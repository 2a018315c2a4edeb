package checkpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	version     = 1
	headerSize  = 64
	headSize    = 20
	trailerSize = 60
	idSize      = 32

	headerMagic  = "ARGONMEM"
	frameMagic   = "FRAM"
	trailerMagic = "ENDM"

	// frameSize is how much a writer puts into a frame; maxFrameSize is what a
	// reader takes, whatever the header says.
	frameSize    = 1 << 20
	maxFrameSize = 16 << 20
)

// Errors that callers decide by.
var (
	// ErrDamaged: what was read is not what was written.
	ErrDamaged = errors.New("damaged")
	// ErrVersion: the stream was written by a newer argon.
	ErrVersion = errors.New("of a version that this argon does not know")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Overhead is how much more than n bytes of memory a volume must have for them,
// at most: memory that does not get smaller, the devices, and the frames.
func Overhead(n uint64) uint64 { return n/64 + 64<<20 }

func marshalHeader(id string) ([]byte, error) {
	if len(id) > idSize {
		return nil, fmt.Errorf("checkpoint id %q is longer than %d bytes", id, idSize)
	}
	b := make([]byte, headerSize)
	copy(b, headerMagic)
	binary.LittleEndian.PutUint32(b[8:], version)
	binary.LittleEndian.PutUint32(b[12:], frameSize)
	copy(b[16:], id)
	seal(b)
	return b, nil
}

// parseHeader returns the most bytes in a frame.
func parseHeader(b []byte, id string) (int, error) {
	switch {
	case string(b[:8]) != headerMagic:
		return 0, fmt.Errorf("the memory's header is %w: it does not begin as it should", ErrDamaged)
	case !sealed(b):
		return 0, fmt.Errorf("the memory's header is %w: its checksum is wrong", ErrDamaged)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != version {
		return 0, fmt.Errorf("the memory is in version %d: %w", v, ErrVersion)
	}
	var want [idSize]byte
	copy(want[:], id)
	if [idSize]byte(b[16:]) != want {
		return 0, fmt.Errorf("the memory's header is %w: it is of checkpoint %q", ErrDamaged, b[16:16+idSize])
	}
	size := binary.LittleEndian.Uint32(b[12:])
	if size == 0 || size > maxFrameSize {
		return 0, fmt.Errorf("the memory's header is %w: frames of %d bytes", ErrDamaged, size)
	}
	return int(size), nil
}

// head is what is before a frame's content.
type head struct {
	number, raw, stored uint32
	sum                 uint32
}

// marshalHead makes the head of a content.
func marshalHead(number uint32, raw int, content []byte) []byte {
	b := make([]byte, headSize)
	copy(b, frameMagic)
	binary.LittleEndian.PutUint32(b[4:], number)
	binary.LittleEndian.PutUint32(b[8:], uint32(raw))
	binary.LittleEndian.PutUint32(b[12:], uint32(len(content)))
	binary.LittleEndian.PutUint32(b[16:], headSum(b, content))
	return b
}

func headSum(b, content []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:16], castagnoli), castagnoli, content)
}

// parseHead looks at a head alone: its checksum is also that of the content.
func parseHead(b []byte, number uint32, most int) (head, error) {
	h := head{
		number: binary.LittleEndian.Uint32(b[4:]), raw: binary.LittleEndian.Uint32(b[8:]),
		stored: binary.LittleEndian.Uint32(b[12:]), sum: binary.LittleEndian.Uint32(b[16:]),
	}
	switch {
	case string(b[:4]) != frameMagic:
		return h, damaged(number, "it does not begin as it should")
	case h.number != number:
		return h, damaged(number, "it says that it is frame %d", h.number)
	case h.raw == 0 || int64(h.raw) > int64(most) || h.stored == 0 || h.stored > h.raw:
		return h, damaged(number, "it says that it has %d bytes, and %d here", h.raw, h.stored)
	}
	return h, nil
}

func damaged(number uint32, format string, args ...any) error {
	return fmt.Errorf("frame %d of the memory is %w: %s", number, ErrDamaged, fmt.Sprintf(format, args...))
}

// Totals are what a trailer says of a whole stream.
type Totals struct {
	Frames uint32
	// Raw is the length before compression, Stored that of all contents.
	Raw, Stored uint64
}

func marshalTrailer(t Totals, sum [32]byte) []byte {
	b := make([]byte, trailerSize)
	copy(b, trailerMagic)
	binary.LittleEndian.PutUint32(b[4:], t.Frames)
	binary.LittleEndian.PutUint64(b[8:], t.Raw)
	binary.LittleEndian.PutUint64(b[16:], t.Stored)
	copy(b[24:], sum[:])
	seal(b)
	return b
}

// checkTrailer compares with what was read before it.
func checkTrailer(b []byte, t Totals, sum [32]byte) error {
	if !sealed(b) {
		return fmt.Errorf("the memory's trailer, after frame %d, is %w: its checksum is wrong", int64(t.Frames)-1, ErrDamaged)
	}
	if string(b) != string(marshalTrailer(t, sum)) {
		return fmt.Errorf("the memory is %w: its trailer, after frame %d, is of other frames", ErrDamaged, int64(t.Frames)-1)
	}
	return nil
}

// seal puts the checksum of what is before into the last four bytes.
func seal(b []byte) {
	end := len(b) - 4
	binary.LittleEndian.PutUint32(b[end:], crc32.Checksum(b[:end], castagnoli))
}

func sealed(b []byte) bool {
	end := len(b) - 4
	return binary.LittleEndian.Uint32(b[end:]) == crc32.Checksum(b[:end], castagnoli)
}
