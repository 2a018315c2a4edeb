package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// checkVDI finds what is missing at a VDI file's end, which QEMU would take for
// zeros. VDI names no other files; QEMU refuses those that are differences.
func checkVDI(r io.ReaderAt, size int64) (uint64, error) {
	const (
		header   = 512
		dynamic  = 1
		static   = 2
		mostData = 1 << 47
	)
	b := make([]byte, header)
	if err := readAt(r, b, 0); errors.Is(err, io.EOF) {
		return 0, refuse("the vdi file is truncated: it ends inside its header")
	} else if err != nil {
		return 0, fmt.Errorf("reading the vdi file: %w", err)
	}
	le := binary.LittleEndian
	kind, data, disk := le.Uint32(b[0x4c:]), uint64(le.Uint32(b[0x158:])), le.Uint64(b[0x170:])
	block, allocated := uint64(le.Uint32(b[0x178:])), uint64(le.Uint32(b[0x184:]))
	if err := checkSize(disk); err != nil {
		return 0, err
	}
	switch {
	case kind != dynamic && kind != static:
		return 0, refuse("the vdi file is not a disk of its own, but a difference to another file (kind %d)", kind)
	case block == 0 || block > 1<<30 || allocated > mostData/block:
		return 0, refuse("the vdi file is damaged: %d blocks of %d bytes", allocated, block)
	case data+block*allocated > uint64(size):
		return 0, refuse("the vdi file is damaged or truncated: it has %d bytes, its header speaks of %d", size, data+block*allocated)
	}
	return disk, nil
}
