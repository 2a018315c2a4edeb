package nbd

import (
	"encoding/binary"

	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// Extents is implemented by a device that knows where it stores nothing. With
// it, clients that copy a volume skip its holes (NBD_CMD_BLOCK_STATUS).
type Extents interface {
	// Extents tells what is known of a range, from its beginning on: it calls
	// found for one stretch after the other until that returns false or it
	// knows no more. n is the stretch's length, in bytes, a multiple of
	// volume.SectorSize; the last may reach beyond the range, not beyond the
	// device. A hole takes no space in the store; zero reads as zeros.
	// Neither is always a right answer.
	//
	// What is called zero must have read as zeros at an instant between call
	// and return; a write that was acknowledged before counts. It is called
	// from many goroutines and must not wait for the network: the connection
	// reads no further requests meanwhile.
	Extents(off, length int64, found func(n int64, hole, zero bool) (more bool)) error
}

const (
	// allocationID is the context's number on the wire.
	allocationID uint32 = 1
	// maxExtents is how many extents one answer has.
	maxExtents = 500
	// maxExtentLen keeps a length within 32 bits and aligned.
	maxExtentLen = 1<<32 - 4096
)

// statusAnswer collects the payload of a block status chunk.
type statusAnswer struct {
	b    []byte
	left int64 // of what was asked for
	one  bool  // NBD_CMD_FLAG_REQ_ONE
	n    int

	last      int64  // length of the last extent; it is in b already
	lastFlags uint32 // of it
}

func newStatusAnswer(b []byte, length int64, one bool) *statusAnswer {
	return &statusAnswer{b: binary.BigEndian.AppendUint32(b, allocationID), left: length, one: one}
}

// add tells whether one more extent may follow. Only the last may reach beyond
// what was asked for, and with REQ_ONE not even that.
func (a *statusAnswer) add(n int64, hole, zero bool) bool {
	var flags uint32
	if hole {
		flags |= proto.StateHole
	}
	if zero {
		flags |= proto.StateZero
	}
	switch {
	case a.n > 0 && flags == a.lastFlags: // the same goes on
		n += a.last
		a.b = a.b[:len(a.b)-8]
		a.left += a.last
		a.n--
	case a.n > 0 && a.one:
		return false
	}
	cut := min(n, maxExtentLen)
	if a.one {
		cut = min(cut, a.left)
	}
	a.b = binary.BigEndian.AppendUint32(a.b, uint32(cut))
	a.b = binary.BigEndian.AppendUint32(a.b, flags)
	a.last, a.lastFlags = cut, flags
	a.left -= cut
	a.n++
	return cut == n && a.left > 0 && a.n < maxExtents
}

// payload is the whole. Of a device that told nothing, nothing is known.
func (a *statusAnswer) payload() []byte {
	if a.n == 0 {
		a.add(a.left, false, false)
	}
	return a.b
}

// status puts the answer to a block status request into its buffer.
func (c *conn) status(r *request, h proto.Request) error {
	a := newStatusAnswer((*r.buf)[:0], int64(h.Len), h.Flags&proto.CmdFlagReqOne != 0)
	if err := c.device.(Extents).Extents(int64(h.Off), int64(h.Len), a.add); err != nil {
		return err
	}
	r.dev.Data = a.payload()
	return nil
}
