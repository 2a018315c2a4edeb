// Package stream is the form in which a volume's snapshot travels: whole, or
// what differs from an earlier one, checksummed throughout.
//
// What lives here: the format, and how a snapshot is written into it and read
// out of it. What must not: where a stream goes to or comes from, volumes'
// records (internal/rpc).
//
// A stream is a header, records in the order of their offsets, and an end.
// Numbers are little endian. Whatever is not exactly as described makes a
// reader refuse the whole: a record that was handed out before the end was
// reached may be of a damaged stream, so who applies them must be able to take
// them back, or read the stream twice.
//
//	header   8  magic "ARGONST1"
//	         4  length of the header with its checksum, in bytes
//	         4  flags; 0. Bits 0 and 1 are kept for encryption and compression
//	        32  id of the cluster
//	        32  id of the volume
//	        64  name of the volume
//	         8  size of the volume at the snapshot, in bytes
//	         4  id of the snapshot
//	         4  id of the snapshot that this one differs from; 0: the stream is whole
//	         8  generation of the snapshot
//	         8  generation of the other
//	        64  name of the snapshot
//	        64  name of the other
//	         8  when the snapshot was taken, in seconds since 1970
//	            what a later version adds, before the checksum
//	         4  CRC-32C of all before
//
//	record   1  kind: 1 data, 2 zeros, 3 end
//	         3  flags; 0
//	         4  bytes that follow the record's head
//	         8  offset in the volume
//	         8  bytes of the volume that it is about
//	         4  0
//	         4  CRC-32C of the 28 bytes before and of what follows
//
// Data is followed by as many bytes as it is about, at most 1 MiB. Zeros are
// followed by nothing. What no record is about is as in the other snapshot, or
// zeros in a whole stream. The end has the size of the volume as its offset, the
// number of records before it as its length, and is followed by the SHA-256 of
// everything before the end. After it comes nothing.
package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/argon-cluster/argon/internal/volume"
)

const (
	magic = "ARGONST1"
	// headerSize is what this version writes; a later one may write more.
	headerSize = 8 + 4 + 4 + 32 + 32 + 64 + 8 + 4 + 4 + 8 + 8 + 64 + 64 + 8 + 4
	maxHeader  = 64 << 10
	headSize   = 32
	sumSize    = 32
	// MaxData is how much one record of data is about.
	MaxData = 1 << 20
)

const (
	kindData = iota + 1
	kindZeros
	kindEnd
)

// ErrDamaged: the stream is not what a writer wrote: bytes have changed, or
// are missing, or there are more.
var ErrDamaged = errors.New("the stream is damaged")

// ErrUnknown: a newer argon wrote the stream, with what this one can't read.
var ErrUnknown = errors.New("the stream needs a newer argon")

var table = crc32.MakeTable(crc32.Castagnoli)

// Point is a snapshot that a stream speaks of.
type Point struct {
	ID         uint32
	Generation uint64
	Name       string
}

// Header says what a stream holds.
type Header struct {
	ClusterID  string
	VolumeID   string
	VolumeName string
	// Size of the volume at the snapshot, in bytes.
	Size     int64
	Snapshot Point
	// Base is what the snapshot differs from; its ID is 0 in a whole stream.
	Base Point
	// Taken is when, in seconds since 1970.
	Taken int64
}

// Whole tells whether the stream needs no other.
func (h Header) Whole() bool { return h.Base.ID == 0 }

// check refuses what could not be read back as it is.
func (h Header) check() error {
	for _, t := range []struct {
		text string
		room int
	}{{h.ClusterID, 32}, {h.VolumeID, 32}, {h.VolumeName, 64}, {h.Snapshot.Name, 64}, {h.Base.Name, 64}} {
		if len(t.text) > t.room || !utf8.ValidString(t.text) || strings.ContainsFunc(t.text, unicode.IsControl) {
			return fmt.Errorf("%q is no name", t.text)
		}
	}
	switch {
	case h.Size <= 0 || h.Size > volume.MaxSize || h.Size%volume.SectorSize != 0:
		return fmt.Errorf("a volume of %d bytes can't be", h.Size)
	case h.Snapshot.ID == 0 || h.VolumeID == "":
		return errors.New("no snapshot is named")
	case h.Whole() && h.Base != Point{}, !h.Whole() && h.Base.ID >= h.Snapshot.ID, h.Base.Generation > h.Snapshot.Generation:
		return errors.New("the snapshots are not in their order")
	}
	return nil
}

func (h Header) marshal() []byte {
	b := make([]byte, 0, headerSize)
	text := func(s string, room int) { b = append(b, append([]byte(s), make([]byte, room-len(s))...)...) }
	le := binary.LittleEndian
	b = append(b, magic...)
	b = le.AppendUint32(b, headerSize)
	b = le.AppendUint32(b, 0)
	text(h.ClusterID, 32)
	text(h.VolumeID, 32)
	text(h.VolumeName, 64)
	b = le.AppendUint64(b, uint64(h.Size))
	b = le.AppendUint32(b, h.Snapshot.ID)
	b = le.AppendUint32(b, h.Base.ID)
	b = le.AppendUint64(b, h.Snapshot.Generation)
	b = le.AppendUint64(b, h.Base.Generation)
	text(h.Snapshot.Name, 64)
	text(h.Base.Name, 64)
	b = le.AppendUint64(b, uint64(h.Taken))
	return le.AppendUint32(b, crc32.Checksum(b, table))
}

// parseHeader reads a header whose length was found to make sense.
func parseHeader(b []byte) (Header, error) {
	le := binary.LittleEndian
	if end := len(b) - 4; crc32.Checksum(b[:end], table) != le.Uint32(b[end:]) {
		return Header{}, fmt.Errorf("%w: the header's checksum is wrong", ErrDamaged)
	}
	if flags := le.Uint32(b[12:]); flags != 0 {
		return Header{}, fmt.Errorf("%w: flags %#x", ErrUnknown, flags)
	}
	at := 16
	text := func(room int) string {
		at += room
		return strings.TrimRight(string(b[at-room:at]), "\x00")
	}
	u32 := func() uint32 { at += 4; return le.Uint32(b[at-4:]) }
	u64 := func() uint64 { at += 8; return le.Uint64(b[at-8:]) }
	var h Header
	h.ClusterID, h.VolumeID, h.VolumeName = text(32), text(32), text(64)
	h.Size = int64(u64())
	h.Snapshot.ID, h.Base.ID = u32(), u32()
	h.Snapshot.Generation, h.Base.Generation = u64(), u64()
	h.Snapshot.Name, h.Base.Name = text(64), text(64)
	h.Taken = int64(u64())
	if err := h.check(); err != nil {
		return Header{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return h, nil
}

// Looks tells whether data that begins like this may be a stream.
func Looks(head []byte) bool { return strings.HasPrefix(string(head), magic) }

// head is the fixed part of a record.
type head struct {
	kind     byte
	follow   uint32
	off, len int64
}

func (h head) marshal(b *[headSize]byte, payload []byte) {
	le := binary.LittleEndian
	*b = [headSize]byte{0: h.kind}
	le.PutUint32(b[4:], h.follow)
	le.PutUint64(b[8:], uint64(h.off))
	le.PutUint64(b[16:], uint64(h.len))
	le.PutUint32(b[28:], crc32.Update(crc32.Checksum(b[:28], table), table, payload))
}

func parseHead(b *[headSize]byte) (head, error) {
	le := binary.LittleEndian
	h := head{kind: b[0], follow: le.Uint32(b[4:]), off: int64(le.Uint64(b[8:])), len: int64(le.Uint64(b[16:]))}
	if b[1]|b[2]|b[3] != 0 || le.Uint32(b[24:]) != 0 {
		return h, fmt.Errorf("%w: a record has flags that were never set", ErrDamaged)
	}
	return h, nil
}
