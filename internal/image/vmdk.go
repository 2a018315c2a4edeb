package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// vmdkHeader is what import decides by of a VMDK extent's header; see VMware's
// "Virtual Disk Format 5.0". All places and sizes are in sectors.
type vmdkHeader struct {
	version, flags       uint32
	capacity, grain      uint64
	descAt, descSize     uint64
	entries              uint32 // of a grain table
	directory, overheads uint64
}

const (
	vmdkSector     = 512
	vmdkCompressed = 1 << 16
	// vmdkAtEnd: the header at the file's end says where the directory is.
	vmdkAtEnd = 1<<64 - 1
	// vmdkMaxDescription bounds what is read of a description, in bytes.
	vmdkMaxDescription = 64 << 10
	// vmdkLooksHere is where QEMU itself reads a description.
	vmdkLooksHere = 20 * vmdkSector
)

func parseVMDK(b []byte) (vmdkHeader, error) {
	var h vmdkHeader
	if len(b) < vmdkSector {
		return h, refuse("the vmdk file is truncated: it ends inside its header")
	}
	le := binary.LittleEndian
	h = vmdkHeader{
		version: le.Uint32(b[4:]), flags: le.Uint32(b[8:]),
		capacity: le.Uint64(b[12:]), grain: le.Uint64(b[20:]),
		descAt: le.Uint64(b[28:]), descSize: le.Uint64(b[36:]),
		entries: le.Uint32(b[44:]), directory: le.Uint64(b[56:]), overheads: le.Uint64(b[64:]),
	}
	switch {
	case string(b[:4]) != "KDMV" || h.version < 1 || h.version > 3:
		return h, refuse("the vmdk file is damaged: its header is not one")
	case h.capacity == 0:
		// QEMU would read the description then, and open the files it names.
		return h, refuse("the vmdk file has no disk of its own: its data is in other files")
	case h.capacity > MaxSize/vmdkSector:
		return h, checkSize(MaxSize + vmdkSector)
	case h.grain < 1 || h.grain > 1<<16 || h.grain&(h.grain-1) != 0, h.entries < 1 || h.entries > 512:
		return h, refuse("the vmdk file is damaged: grains of %d sectors, tables of %d", h.grain, h.entries)
	}
	return h, nil
}

// checkVMDK finds what would make QEMU open other files of this server, and
// what is missing at a file's end, which QEMU would take for zeros.
func checkVMDK(r io.ReaderAt, size int64) (uint64, error) {
	b := make([]byte, vmdkSector)
	if err := readAt(r, b, 0); err != nil {
		return 0, vmdkCut(err)
	}
	h, err := parseVMDK(b)
	if err != nil {
		return 0, err
	}
	if err := checkDescription(r, size, h); err != nil {
		return 0, err
	}
	if h.directory == vmdkAtEnd {
		// Footer: its marker, the header again, the end of the stream.
		if err := readAt(r, b, size-2*vmdkSector); err != nil {
			return 0, vmdkCut(err)
		}
		footer, err := parseVMDK(b)
		if err != nil || footer.capacity != h.capacity || footer.directory == vmdkAtEnd {
			return 0, refuse("the vmdk file is truncated: what belongs at its end is not there")
		}
		h = footer
	}
	return h.capacity * vmdkSector, checkGrains(r, size, h)
}

func vmdkCut(err error) error {
	if errors.Is(err, io.EOF) {
		return refuse("the vmdk file is damaged or truncated: it refers to what is beyond its end")
	}
	return fmt.Errorf("reading the vmdk file: %w", err)
}

// checkDescription reads the description inside the file.
func checkDescription(r io.ReaderAt, size int64, h vmdkHeader) error {
	here := make([]byte, min(vmdkLooksHere, max(0, size-vmdkSector)))
	if err := readAt(r, here, vmdkSector); err != nil {
		return vmdkCut(err)
	}
	if bytes.Contains(here, []byte("parentFileNameHint")) {
		return refuse("the vmdk file needs a backing file: flatten it first with `qemu-img convert -O vmdk`")
	}
	if h.descAt == 0 || h.descSize == 0 || h.descAt > uint64(size)/vmdkSector {
		return refuse("the vmdk file is one part of several: convert it first with `qemu-img convert -O qcow2`")
	}
	text := make([]byte, min(h.descSize*vmdkSector, vmdkMaxDescription, uint64(size)-h.descAt*vmdkSector))
	if err := readAt(r, text, int64(h.descAt*vmdkSector)); err != nil {
		return vmdkCut(err)
	}
	text, _, _ = bytes.Cut(text, []byte{0})
	return readDescription(string(text))
}

// readDescription accepts the description of a disk that is this one file.
func readDescription(text string) error {
	extents := 0
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(strings.TrimSpace(value), `"`)
		switch strings.TrimSpace(key) {
		case "parentFileNameHint":
			return refuse("the vmdk file needs a backing file: flatten it first with `qemu-img convert -O vmdk`")
		case "parentCID":
			if !strings.EqualFold(value, "ffffffff") {
				return refuse("the vmdk file needs a backing file: flatten it first with `qemu-img convert -O vmdk`")
			}
		case "createType":
			if value != "monolithicSparse" && value != "streamOptimized" {
				return refuse("the vmdk file is of the kind %.40q: only monolithicSparse and streamOptimized can be imported", value)
			}
		}
		if fields := strings.Fields(line); len(fields) >= 3 && (fields[0] == "RW" || fields[0] == "RDONLY" || fields[0] == "NOACCESS") {
			if extents++; fields[2] != "SPARSE" || extents > 1 {
				return refuse("the vmdk file keeps its data in other files: convert it first with `qemu-img convert -O qcow2`")
			}
		}
	}
	if extents == 0 {
		return refuse("the vmdk file is damaged: its description names no data")
	}
	return nil
}

// checkGrains follows the tables and finds grains that are not all there. Each
// table and each grain has a place of its own, so there are no more of them than
// the file has room for: a small file that names the same ones again and again
// would keep a processor busy for days.
func checkGrains(r io.ReaderAt, size int64, h vmdkHeader) error {
	tables := (h.capacity + uint64(h.entries)*h.grain - 1) / (uint64(h.entries) * h.grain)
	if h.directory > uint64(size)/vmdkSector || tables*4 > uint64(size) {
		return vmdkCut(io.EOF)
	}
	directory := io.NewSectionReader(r, int64(h.directory*vmdkSector), int64(tables*4))
	some := make([]byte, 64<<10)
	table := make([]byte, 4*h.entries)
	tablesLeft, grainsLeft := size/int64(len(table)), size/vmdkSector
	for left := int(tables) * 4; left > 0; {
		part := some[:min(left, len(some))]
		if _, err := io.ReadFull(directory, part); err != nil {
			return vmdkCut(io.EOF)
		}
		left -= len(part)
		for ; len(part) > 0; part = part[4:] {
			at := binary.LittleEndian.Uint32(part)
			if at == 0 {
				continue
			}
			if tablesLeft--; tablesLeft < 0 {
				return errTooManyGrains()
			}
			if err := readAt(r, table, int64(at)*vmdkSector); err != nil {
				return vmdkCut(err)
			}
			n, err := checkTable(r, size, h, table, grainsLeft)
			if err != nil {
				return err
			}
			grainsLeft -= n
		}
	}
	return nil
}

func errTooManyGrains() error {
	return refuse("the vmdk file is damaged: it names more than it has room for")
}

// checkTable returns how many grains a table has: at most most.
func checkTable(r io.ReaderAt, size int64, h vmdkHeader, table []byte, most int64) (n int64, err error) {
	for ; len(table) > 0; table = table[4:] {
		at := int64(binary.LittleEndian.Uint32(table))
		if at <= 1 {
			continue // not there, or zeros
		}
		if n++; n > most {
			return n, errTooManyGrains()
		}
		end := at*vmdkSector + int64(min(h.grain, h.capacity))*vmdkSector
		if h.flags&vmdkCompressed != 0 {
			var head [12]byte // place on the disk, size
			if err := readAt(r, head[:], at*vmdkSector); err != nil {
				return n, vmdkCut(err)
			}
			end = at*vmdkSector + int64(len(head)) + int64(binary.LittleEndian.Uint32(head[8:]))
		}
		if end > size {
			return n, vmdkCut(io.EOF)
		}
	}
	return n, nil
}

// readAt fills p or fails; io.EOF if the file ends before.
func readAt(r io.ReaderAt, p []byte, off int64) error {
	if off < 0 {
		return io.EOF
	}
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = io.EOF
	}
	return err
}
