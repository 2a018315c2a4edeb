package wire

import (
	"encoding/binary"
	"fmt"
)

// What a Sum was found to be.
const (
	// SumNew: there was no record of it that counts.
	SumNew = iota + 1
	// SumSame: it equals the record.
	SumSame
	// SumDiffers: it does not; the disk has changed what was written.
	SumDiffers
)

// SumSize is how long a Sum is in an answer, in bytes.
const SumSize = 17

// Sum is the checksum of one grain's content: the first 16 bytes of its
// SHA-256.
type Sum struct {
	State uint8
	Sum   [16]byte
}

// SumBytes is how long the answer to Sums is for a range of n bytes.
func SumBytes(n int64) int64 {
	sums := n / ChangedGrain
	if n%ChangedGrain != 0 {
		sums++
	}
	return sums * SumSize
}

// AppendSums makes an answer's payload.
func AppendSums(b []byte, sums []Sum) []byte {
	for _, s := range sums {
		b = append(append(b, s.State), s.Sum[:]...)
	}
	return b
}

// ParseSums reads an answer's payload.
func ParseSums(b []byte) ([]Sum, error) {
	if len(b)%SumSize != 0 {
		return nil, fmt.Errorf("sums of %d bytes: %w", len(b), ErrFrame)
	}
	sums := make([]Sum, len(b)/SumSize)
	for i := range sums {
		one := b[i*SumSize:]
		if one[0] < SumNew || one[0] > SumDiffers {
			return nil, fmt.Errorf("sum of state %d: %w", one[0], ErrFrame)
		}
		sums[i].State = one[0]
		copy(sums[i].Sum[:], one[1:SumSize])
	}
	return sums, nil
}

// IDSize is how long the payload is that names a snapshot, in bytes.
const IDSize = 4

// MarshalID makes the payload that names a snapshot.
func MarshalID(id uint32) []byte { return binary.LittleEndian.AppendUint32(nil, id) }

// ParseID reads the payload that names a snapshot.
func ParseID(b []byte) (uint32, error) {
	if len(b) != IDSize {
		return 0, fmt.Errorf("a snapshot's id of %d bytes: %w", len(b), ErrFrame)
	}
	return binary.LittleEndian.Uint32(b), nil
}
