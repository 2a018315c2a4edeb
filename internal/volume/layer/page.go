package layer

import (
	"encoding/binary"
	"hash/crc32"
	"math"
	"slices"
)

// The format of a table's pages. A page is written over the older copy of its
// pair, with the next sequence, so that what it said before is there until what
// it says now is. Each of its sectors has the sequence and a checksum: a disk
// writes a sector whole or not at all, so one that is neither blank nor valid
// was damaged, and not cut short by a power cut.
const (
	tableMagic     = "ARGONTB2"
	sectorSize     = 512
	sectorsPerPage = BlockSize / sectorSize
	pairSize       = 2 * BlockSize
	rowsPerSector  = 50
	rowsPerPage    = sectorsPerPage * rowsPerSector
	// Offsets in a sector, after the stamps.
	offHeld, offSeq, offSectorSum = rowsPerSector * 8, rowsPerSector * 10, sectorSize - 4

	// Of version 1.
	oldTableMagic                       = "ARGONTB1"
	offOldPage, offOldSeq, offOldStamps = 8, 16, 32
	oldRowsPerPage                      = (offSum - offOldStamps) / 8

	// The sequence of a provisional copy has the highest bit set, and the
	// number of the boot that it counts in between that and the sequence proper.
	provisionalBit = 1 << 63
	bootShift      = 40
	maxSequence    = 1<<bootShift - 1
	maxBoot        = provisionalBit>>bootShift - 1

	// allHeld is a mask of all blocks of a region.
	allHeld = math.MaxUint16
)

// Unknown is the stamp of a region whose page was damaged: it may have been
// written at any time.
const Unknown = math.MaxUint64

// row is what a table says of a region: the generation of the newest write to
// it, and which of its blocks the layer holds.
type row struct {
	stamp uint64
	held  uint16
}

// sequence is what the sector of a page says of itself: how new it is, and in
// which boot it counts; 0: in any.
type sequence struct {
	number uint64
	boot   uint64
}

func (s sequence) marshal() uint64 {
	if s.boot == 0 {
		return s.number
	}
	return provisionalBit | s.boot<<bootShift | s.number
}

func parseSequence(n uint64) sequence {
	if n&provisionalBit == 0 {
		return sequence{number: n}
	}
	return sequence{n & maxSequence, n &^ provisionalBit >> bootShift}
}

// pairState is what a pair of pages was found to be.
type pairState struct {
	seq         uint64
	provisional bool // some of it counts in this boot only
	damaged     int  // sectors
}

// parsePair reads what a pair of pages says, of copies with a sequence up to
// upTo that count in the boot; 0: that count in any. Rows that are damaged are
// Unknown.
func parsePair(pair []byte, page int, upTo, boot uint64, rows []row) (is pairState) {
	for s := range sectorsPerPage {
		into := rows[s*rowsPerSector : (s+1)*rowsPerSector]
		clear(into)
		var newest sequence
		bad := false
		for copyOf := range 2 {
			b := pair[copyOf*BlockSize+s*sectorSize:][:sectorSize]
			n := parseSequence(binary.LittleEndian.Uint64(b[offSeq:]))
			switch {
			case blank(b):
			case binary.LittleEndian.Uint32(b[offSectorSum:]) != sectorSum(b, page, s):
				bad = true
			case n.boot != 0 && n.boot != boot: // what it said is not certain any more
			case n.number > newest.number && n.number <= upTo:
				newest = n
				parseRows(b, into)
			}
		}
		if bad {
			is.damaged++
			for i := range into {
				into[i] = row{stamp: Unknown, held: allHeld}
			}
		}
		is.seq = max(is.seq, newest.number)
		is.provisional = is.provisional || newest.boot != 0
	}
	return is
}

func blank(b []byte) bool { return !slices.ContainsFunc(b, func(x byte) bool { return x != 0 }) }

func parseRows(b []byte, rows []row) {
	for i := range rows {
		rows[i].stamp = binary.LittleEndian.Uint64(b[8*i:])
		rows[i].held = binary.LittleEndian.Uint16(b[offHeld+2*i:])
	}
}

func sectorSum(b []byte, page, sector int) uint32 {
	place := binary.LittleEndian.AppendUint64([]byte(tableMagic), uint64(page*sectorsPerPage+sector))
	return crc32.Update(crc32.Checksum(place, castagnoli), castagnoli, b[:offSectorSum])
}

func marshalPage(b []byte, page int, seq sequence, rows []row) {
	for s := range sectorsPerPage {
		sector := b[s*sectorSize : (s+1)*sectorSize]
		for i, r := range rows[s*rowsPerSector : (s+1)*rowsPerSector] {
			binary.LittleEndian.PutUint64(sector[8*i:], r.stamp)
			binary.LittleEndian.PutUint16(sector[offHeld+2*i:], r.held)
		}
		binary.LittleEndian.PutUint64(sector[offSeq:], seq.marshal())
		binary.LittleEndian.PutUint32(sector[offSectorSum:], sectorSum(sector, page, s))
	}
}

// parseOldPair does what parsePair does for a table of version 1, which has
// stamps only, and one checksum for each page. A page of which neither copy is
// whole counts as one sector.
func parseOldPair(pair []byte, page int, upTo uint64, rows []row) (is pairState) {
	clear(rows)
	for i := range rows {
		rows[i].held = allHeld
	}
	for copyOf := range 2 {
		b := pair[copyOf*BlockSize : (copyOf+1)*BlockSize]
		n := binary.LittleEndian.Uint64(b[offOldSeq:])
		if string(b[:len(oldTableMagic)]) != oldTableMagic || n <= is.seq || n > upTo ||
			binary.LittleEndian.Uint64(b[offOldPage:]) != uint64(page) ||
			binary.LittleEndian.Uint32(b[offSum:]) != crc32.Checksum(b[:offSum], castagnoli) {
			continue
		}
		is.seq = n
		for i := range rows {
			rows[i].stamp = binary.LittleEndian.Uint64(b[offOldStamps+8*i:])
		}
	}
	if is.seq == 0 && !blank(pair) {
		is.damaged = 1
		for i := range rows {
			rows[i].stamp = Unknown
		}
	}
	return is
}

func marshalOldPage(b []byte, page int, seq uint64, rows []row) {
	clear(b)
	copy(b, oldTableMagic)
	binary.LittleEndian.PutUint64(b[offOldPage:], uint64(page))
	binary.LittleEndian.PutUint64(b[offOldSeq:], seq)
	for i, r := range rows {
		binary.LittleEndian.PutUint64(b[offOldStamps+8*i:], r.stamp)
	}
	binary.LittleEndian.PutUint32(b[offSum:], crc32.Checksum(b[:offSum], castagnoli))
}
