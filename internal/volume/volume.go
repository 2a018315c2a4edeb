// Package volume is the interface to a store: what a block device is to the
// NBD server in front of it and to the attachment behind it.
//
// What lives here: the request, the device, the errors both sides agree on.
// What must not: any store (mirror/, ceph/), any protocol (nbd/, wire/).
package volume

import "errors"

// SectorSize is the unit of linearizability, in bytes. Requests are aligned
// to it.
const SectorSize = 512

// MaxRequest is the largest read or write, in bytes. Zero and Trim may cover
// more, as they carry no data.
const MaxRequest = 32 << 20

// MaxSize is the largest volume, in bytes: what the on-disk format and NBD clients
// handle well.
const MaxSize = 64 << 40

// Op says what a request asks for.
type Op uint8

// The operations of a block device.
const (
	OpRead Op = iota + 1
	OpWrite
	// OpZero makes the range read as zeros; the store may free its space.
	OpZero
	// OpTrim says that the content is not needed any more. It reads as zeros
	// afterwards, so that all replicas stay equal.
	OpTrim
	// OpFlush makes every request that was completed before it was submitted
	// survive a power cut.
	OpFlush
)

func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpZero:
		return "zero"
	case OpTrim:
		return "trim"
	case OpFlush:
		return "flush"
	}
	return "unknown"
}

// Changes tells whether the operation changes what is stored.
func (o Op) Changes() bool { return o == OpWrite || o == OpZero || o == OpTrim }

// Request is one operation on a device. The caller owns it until Submit and
// again once Done was called; in between neither it nor Data may be touched.
type Request struct {
	Op Op
	// Off and Len are in bytes, multiples of SectorSize, inside the device.
	// Both are 0 for OpFlush.
	Off, Len int64
	// Data has Len bytes: what OpWrite writes, where OpRead puts what it
	// read. Nil for the others.
	Data []byte
	// FUA: this request's own effect survives a power cut once Done is
	// called. For OpWrite, OpZero and OpTrim.
	FUA bool
	// Done is called exactly once, from any goroutine; it must not block and
	// must not call back into the device's Submit on the same stack.
	Done func(error)
}

// Device is a block device that several callers use at once.
type Device interface {
	// Size is in bytes. It may grow.
	Size() int64
	// Submit starts a request and returns without waiting for it, unless the
	// device has no room for more (back-pressure).
	Submit(*Request)
}

// Errors that callers decide by.
var (
	// ErrNoSpace: a disk is full. Nothing acknowledged is lost.
	ErrNoSpace = errors.New("no space left")
	// ErrClosed: the device was closed; the request may or may not have
	// happened.
	ErrClosed = errors.New("device closed")
	// ErrRange: the request does not lie inside the device or is not aligned.
	ErrRange = errors.New("request outside the device or not aligned")
	// ErrNoSnapshot: there is no such snapshot.
	ErrNoSnapshot = errors.New("no such snapshot")
	// ErrTooManySnapshots: no more can be kept before others were deleted.
	ErrTooManySnapshots = errors.New("too many snapshots")
	// ErrDamaged: what the disk holds is not what was written to it.
	ErrDamaged = errors.New("the content does not match its checksum")
)
