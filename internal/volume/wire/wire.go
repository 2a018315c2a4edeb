// Package wire is the frames of the replica protocol, between a holder and a
// replica on another server (port 7441).
//
// What lives here: encoding and decoding, nothing else. What must not: any
// rule of the protocol (mirror/, replica/), connections and their keys.
//
// A connection begins with one Hello; its answer tells whether the replica is
// sealed. After that requests are pipelined, and answered in any order. All
// numbers are little endian. A frame is a header of HeaderSize bytes and a
// payload:
//
//	 0  magic      u32
//	 4  type       u8
//	 5  flags      u8   bit 0: FUA
//	 6  status     u16  0 in requests
//	 8  id         u64  the answer has the request's
//	16  offset     u64  BeginSync: the generation before which nothing differs
//	24  length     u64  of the range, in bytes; BeginSync, Resize: the volume's size
//	32  generation u64  of a change; Changed, ChangedSnapshot: since which
//	40  payload    u32  how many bytes follow
//	44  crc32c     u32  of the 44 bytes before
//
// The payload has no checksum of its own: TLS has authenticated it.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/argon-cluster/argon/internal/volume"
)

// Protocol is the ALPN name. A holder offers ProtocolV1, too: a server that
// takes that one does not know the types from SnapshotSums on.
const (
	Protocol   = "argon-replica/2"
	ProtocolV1 = "argon-replica/1"
)

// HeaderSize is in bytes.
const HeaderSize = 48

// MaxHello bounds a Hello's payload, in bytes; every other payload is at most
// volume.MaxRequest.
const MaxHello = 4096

const magic = 0x31525241 // "ARR1"

// Type is what a frame asks, or answers.
type Type uint8

// The types of frames. An answer has its request's type.
const (
	Hello Type = iota + 1
	Read
	Write
	Zero
	Trim
	Flush
	BeginSync
	EndSync
	// Ping is answered at once, whatever the disk does.
	Ping
	// Close ends the session clean: everything was flushed.
	Close
	// Changed asks which parts of a range were written since a generation, or,
	// since 0, may hold anything but zeros. The answer has a bit for each
	// ChangedGrain bytes, the lowest bit first.
	Changed
	// Prepare makes the files that the next Snapshot needs.
	Prepare
	// Snapshot keeps the content as it is under an id, which is the payload.
	Snapshot
	// ReadSnapshot is Read of a snapshot, whose id is the payload.
	ReadSnapshot
	// ChangedSnapshot is Changed of a snapshot, whose id is the payload.
	ChangedSnapshot
	// Revert makes a range what it is in a snapshot, whose id is the payload.
	Revert
	// Resize makes the volume larger.
	Resize
	// Sums asks for the checksum of each ChangedGrain bytes of a range; the
	// answer has a Sum for each. Those of an earlier generation are recorded.
	Sums
	// ReadVerified is Read, of what equals its recorded checksum only.
	ReadVerified
	// SnapshotSums is Sums of a snapshot, whose id is the payload.
	SnapshotSums
	// ReadSnapshotVerified is ReadVerified of a snapshot, whose id is the
	// payload.
	ReadSnapshotVerified
	// Mend makes a range of a snapshot what it once was. The payload is the
	// snapshot's id, and that content.
	Mend

	lastType = Mend
)

// HasID tells whether the payload of such a request is a snapshot's id.
func (t Type) HasID() bool {
	switch t {
	case Snapshot, ReadSnapshot, ChangedSnapshot, Revert, SnapshotSums, ReadSnapshotVerified:
		return true
	}
	return false
}

// ChangedGrain is what a bit of the answer to Changed stands for, in bytes.
const ChangedGrain = 1 << 20

// ChangedBytes is how long the answer to Changed is for a range of n bytes.
func ChangedBytes(n int64) int64 { return BitBytes(n, ChangedGrain) }

// BitBytes is how many bytes hold a bit for each grain of n bytes.
func BitBytes(n, grain int64) int64 {
	bits := n / grain // not rounded up by adding: n may be the largest there is
	if n%grain != 0 {
		bits++
	}
	return (bits + 7) / 8
}

// Status is how a request ended.
type Status uint16

// The statuses.
const (
	OK Status = iota
	// NoSpace: there is no room; nothing else is wrong.
	NoSpace
	// Broken: the disk failed. The payload says how.
	Broken
	// Fenced: the session is over.
	Fenced
	// Sealed: a higher epoch was seen; it is in the offset.
	Sealed
	// NotFound: there is no such replica here.
	NotFound
	// Refused: the request makes no sense. The payload says why.
	Refused
	// NoSnapshot: there is no such snapshot here.
	NoSnapshot
	// Damaged: what was read is not what was written. The payload says where.
	Damaged

	lastStatus = Damaged
)

// Header is a frame without its payload.
type Header struct {
	Type       Type
	FUA        bool
	Status     Status
	ID         uint64
	Off        int64
	Len        int64
	Generation uint64
	Payload    uint32
}

// ErrFrame: what arrived is no frame; the connection is of no use any more.
var ErrFrame = errors.New("not a frame of the replica protocol")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Put writes the header to b, which has at least HeaderSize bytes.
func (h Header) Put(b []byte) {
	binary.LittleEndian.PutUint32(b, magic)
	b[4], b[5] = byte(h.Type), 0
	if h.FUA {
		b[5] = 1
	}
	binary.LittleEndian.PutUint16(b[6:], uint16(h.Status))
	binary.LittleEndian.PutUint64(b[8:], h.ID)
	binary.LittleEndian.PutUint64(b[16:], uint64(h.Off))
	binary.LittleEndian.PutUint64(b[24:], uint64(h.Len))
	binary.LittleEndian.PutUint64(b[32:], h.Generation)
	binary.LittleEndian.PutUint32(b[40:], h.Payload)
	binary.LittleEndian.PutUint32(b[44:], crc32.Checksum(b[:44], castagnoli))
}

// ParseHeader reads a header. ErrFrame if it is none, or asks for more than
// may be.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize || binary.LittleEndian.Uint32(b) != magic ||
		crc32.Checksum(b[:44], castagnoli) != binary.LittleEndian.Uint32(b[44:]) {
		return Header{}, ErrFrame
	}
	h := Header{
		Type:       Type(b[4]),
		FUA:        b[5]&1 != 0,
		Status:     Status(binary.LittleEndian.Uint16(b[6:])),
		ID:         binary.LittleEndian.Uint64(b[8:]),
		Off:        int64(binary.LittleEndian.Uint64(b[16:])),
		Len:        int64(binary.LittleEndian.Uint64(b[24:])),
		Generation: binary.LittleEndian.Uint64(b[32:]),
		Payload:    binary.LittleEndian.Uint32(b[40:]),
	}
	limit := uint32(volume.MaxRequest)
	if h.Type == Hello {
		limit = MaxHello
	}
	if h.Type < Hello || h.Type > lastType || h.Status > lastStatus || b[5]&^1 != 0 || h.Payload > limit || h.Off < 0 || h.Len < 0 {
		return Header{}, fmt.Errorf("type %d, status %d, %d bytes at %d, payload of %d: %w", b[4], h.Status, h.Len, h.Off, h.Payload, ErrFrame)
	}
	return h, nil
}

// ReadHeader reads a header from a stream. buf has HeaderSize bytes.
func ReadHeader(r io.Reader, buf []byte) (Header, error) {
	if _, err := io.ReadFull(r, buf[:HeaderSize]); err != nil {
		return Header{}, err
	}
	return ParseHeader(buf)
}

// Greeting is a Hello's payload.
type Greeting struct {
	ClusterID, VolumeID string
	ReplicaID           uint32
	Epoch               uint64
}

// Marshal makes the payload. Ids longer than 255 bytes are cut.
func (g Greeting) Marshal() []byte {
	b := appendText(nil, g.ClusterID)
	b = appendText(b, g.VolumeID)
	b = binary.LittleEndian.AppendUint32(b, g.ReplicaID)
	return binary.LittleEndian.AppendUint64(b, g.Epoch)
}

func appendText(b []byte, s string) []byte {
	s = s[:min(len(s), 255)]
	return append(append(b, byte(len(s))), s...)
}

// ParseGreeting reads the payload of a Hello.
func ParseGreeting(b []byte) (g Greeting, err error) {
	if g.ClusterID, b, err = cutText(b); err != nil {
		return g, err
	}
	if g.VolumeID, b, err = cutText(b); err != nil {
		return g, err
	}
	if len(b) != 12 {
		return g, fmt.Errorf("hello: %w", ErrFrame)
	}
	g.ReplicaID = binary.LittleEndian.Uint32(b)
	g.Epoch = binary.LittleEndian.Uint64(b[4:])
	return g, nil
}

func cutText(b []byte) (string, []byte, error) {
	if len(b) == 0 || len(b) < 1+int(b[0]) {
		return "", nil, fmt.Errorf("hello: %w", ErrFrame)
	}
	end := 1 + int(b[0])
	return string(b[1:end]), b[end:], nil
}

// Info is the payload of the answers to Hello and BeginSync.
type Info struct {
	Incarnation uint64
	Health      uint8
	// Emptied: nothing was kept, see BeginSync.
	Emptied bool
}

// infoSize is in bytes.
const infoSize = 10

// Marshal makes the payload.
func (i Info) Marshal() []byte {
	b := append(binary.LittleEndian.AppendUint64(nil, i.Incarnation), i.Health, 0)
	if i.Emptied {
		b[9] = 1
	}
	return b
}

// ParseInfo reads the payload.
func ParseInfo(b []byte) (Info, error) {
	if len(b) != infoSize || b[9] > 1 {
		return Info{}, fmt.Errorf("info: %w", ErrFrame)
	}
	return Info{Incarnation: binary.LittleEndian.Uint64(b), Health: b[8], Emptied: b[9] == 1}, nil
}
