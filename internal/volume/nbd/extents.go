package nbd

import (
	"encoding/binary"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// Extents is implemented by a device that knows where it stores nothing. With
// it, clients that copy a volume skip its holes (NBD_CMD_BLOCK_STATUS).
type Extents interface {
	// Extents appends to dst, until that is full, what is known of the range
	// from its beginning on, and returns it: at least one extent, none of
	// length 0. The last may reach beyond the range, not beyond the device.
	//
	// An extent with Zero must have read as zeros at an instant between call
	// and return; a write that was acknowledged before counts. It is called
	// from many goroutines and must not wait for the network: the connection
	// reads no further requests meanwhile.
	Extents(off, length int64, dst []Extent) ([]Extent, error)
}

// Extent is a stretch of a device. Neither flag is always a right answer.
type Extent struct {
	Len  int64 // a multiple of volume.SectorSize
	Hole bool  // takes no space in the store
	Zero bool  // reads as zeros
}

// allocationID is the context's number on the wire.
const allocationID uint32 = 1

// maxExtents is how many extents one answer has.
const maxExtents = 512

// maxStatusSize is the payload of an answer with maxExtents.
const maxStatusSize = 4 + 8*maxExtents

// maxExtentLen keeps a length within 32 bits and aligned.
const maxExtentLen = 1<<32 - 4096

// appendStatus appends the payload of a block status chunk. With one, there is
// one extent only, and it does not reach beyond length.
func appendStatus(b []byte, extents []Extent, length int64, one bool) []byte {
	b = binary.BigEndian.AppendUint32(b, allocationID)
	for i, e := range extents {
		n := min(e.Len, maxExtentLen)
		if one {
			n = min(n, length)
		}
		var flags uint32
		if e.Hole {
			flags |= proto.StateHole
		}
		if e.Zero {
			flags |= proto.StateZero
		}
		b = binary.BigEndian.AppendUint32(b, uint32(n))
		b = binary.BigEndian.AppendUint32(b, flags)
		// Whoever cuts an extent short ends the answer; all but the last must
		// also stay within the request.
		length -= n
		if one || n < e.Len || length <= 0 || i+1 == maxExtents {
			break
		}
	}
	return b
}

// status fills r's buffer with the answer to a block status request.
func (c *conn) status(r *request, h proto.Request) error {
	one := h.Flags&proto.CmdFlagReqOne != 0
	dst := c.extents[:0:maxExtents]
	if one {
		dst = c.extents[:0:1]
	}
	got, err := c.device.(Extents).Extents(int64(h.Off), int64(h.Len), dst)
	if err != nil {
		return err
	}
	if len(got) == 0 {
		got = append(dst, Extent{Len: int64(h.Len)})
	}
	r.dev.Data = appendStatus((*r.buf)[:0], got, int64(h.Len), one)
	return nil
}
