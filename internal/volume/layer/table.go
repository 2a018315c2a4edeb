package layer

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// A table holds one stamp for each region of a layer: the generation of the
// newest write to it. A stamp is on disk before the data that it is about: of
// a region without one nobody can have written anything.
//
// The file is pairs of pages. A page is written over the older copy of its
// pair, with the next sequence, so that one copy is whole at every instant; a
// page of zeros was never written. Memory: 8 bytes for each region, that is
// 8 MiB for each TiB.
const (
	tableMagic = "ARGONTB1"
	// Offsets in a page: the magic, the page's number, its sequence, its stamps,
	// a CRC-32C of all that.
	offPage, offPageSeq, offStamps = 8, 16, 32
	stampsPerPage                  = (offSum - offStamps) / 8
)

// Unknown is the stamp of a region whose page was damaged: it may have been
// written at any time.
const Unknown = math.MaxUint64

type table struct {
	file   File
	stamps []atomic.Uint64
	lazy   bool // for tests: do not sync stamps

	mu     sync.Mutex
	wanted map[int]uint64 // regions that wait for the next commit, and their stamps

	// One commits at a time, for all who wait.
	commit sync.Mutex
	seqs   []uint64 // of the pages' newest copies
	err    error    // a write or a sync failed: nothing is certain any more
}

func regions(size uint64, regionSize uint32) int {
	return int((size + uint64(regionSize) - 1) / uint64(regionSize))
}

func tablePages(regions int) int { return (regions + stampsPerPage - 1) / stampsPerPage }

func tableSize(regions int) int64 { return int64(tablePages(regions)) * 2 * BlockSize }

// newTable uses a file of zeros, or one that was a table before.
func newTable(file File, regions int) *table {
	return &table{
		file: file, stamps: make([]atomic.Uint64, regions), wanted: map[int]uint64{},
		seqs: make([]uint64, tablePages(regions)),
	}
}

// loadTable reads a table. Pages that are damaged make their regions Unknown;
// how many is returned.
func loadTable(file File, regions int) (t *table, damaged int, err error) {
	t = newTable(file, regions)
	b := make([]byte, 2*BlockSize)
	for page := range t.seqs {
		if _, err := file.ReadAt(b, int64(page)*2*BlockSize); err != nil {
			return nil, 0, fmt.Errorf("read page %d of the table: %w", page, err)
		}
		stamps, seq, whole := newerPage(b, page)
		if !whole {
			damaged++
		}
		t.seqs[page] = seq
		for i := range stampsPerPage {
			if region := page*stampsPerPage + i; region < regions {
				t.stamps[region].Store(stamps[i])
			}
		}
	}
	return t, damaged, nil
}

// newerPage is what a pair of pages says. whole is false if neither copy is
// whole and something was written.
func newerPage(pair []byte, page int) (stamps [stampsPerPage]uint64, seq uint64, whole bool) {
	blank := true
	for copyOf := range 2 {
		b := pair[copyOf*BlockSize : (copyOf+1)*BlockSize]
		if s, n, ok := parsePage(b, page); ok && n > seq {
			stamps, seq, whole = s, n, true
		}
		blank = blank && !slices.ContainsFunc(b, func(x byte) bool { return x != 0 })
	}
	if !whole && !blank {
		for i := range stamps {
			stamps[i] = Unknown
		}
	}
	return stamps, seq, whole || blank
}

func parsePage(b []byte, page int) (stamps [stampsPerPage]uint64, seq uint64, ok bool) {
	if string(b[:len(tableMagic)]) != tableMagic ||
		binary.LittleEndian.Uint64(b[offPage:]) != uint64(page) ||
		binary.LittleEndian.Uint32(b[offSum:]) != crc32.Checksum(b[:offSum], castagnoli) {
		return stamps, 0, false
	}
	for i := range stamps {
		stamps[i] = binary.LittleEndian.Uint64(b[offStamps+8*i:])
	}
	return stamps, binary.LittleEndian.Uint64(b[offPageSeq:]), true
}

func marshalPage(b []byte, page int, seq uint64, stamps []uint64) {
	clear(b)
	copy(b, tableMagic)
	binary.LittleEndian.PutUint64(b[offPage:], uint64(page))
	binary.LittleEndian.PutUint64(b[offPageSeq:], seq)
	for i, s := range stamps {
		binary.LittleEndian.PutUint64(b[offStamps+8*i:], s)
	}
	binary.LittleEndian.PutUint32(b[offSum:], crc32.Checksum(b[:offSum], castagnoli))
}

// has tells whether the regions have the stamp, or a later one.
func (t *table) has(first, last int, stamp uint64) bool {
	for r := first; r <= last; r++ {
		if t.stamps[r].Load() < stamp {
			return false
		}
	}
	return true
}

// stamp gives the regions first to last at least this stamp, durably. Those
// who come while another's stamps are being written are written together.
func (t *table) stamp(first, last int, stamp uint64) error {
	if t.has(first, last, stamp) {
		return nil
	}
	t.mu.Lock()
	for r := first; r <= last; r++ {
		if t.stamps[r].Load() < stamp {
			t.wanted[r] = max(t.wanted[r], stamp)
		}
	}
	t.mu.Unlock()

	t.commit.Lock()
	defer t.commit.Unlock()
	if t.err != nil || t.has(first, last, stamp) {
		return t.err
	}
	t.mu.Lock()
	batch := t.wanted
	t.wanted = map[int]uint64{}
	t.mu.Unlock()
	if err := t.write(batch); err != nil {
		if !IsFull(err) {
			t.err = err
		}
		t.mu.Lock()
		for r, s := range batch { // those who wait find theirs again
			t.wanted[r] = max(t.wanted[r], s)
		}
		t.mu.Unlock()
		return err
	}
	return nil
}

// write puts a batch on disk and then takes it for true. If that fails, the
// pages it has written so far may be lost, so the next try must write over the
// same copies: the others are the only ones that are certain.
func (t *table) write(batch map[int]uint64) error {
	before := slices.Clone(t.seqs)
	err := t.writePages(batch)
	if err == nil && !t.lazy {
		if err = t.file.Sync(); err != nil {
			err = fmt.Errorf("sync the table: %w", err)
		}
	}
	if err != nil {
		t.seqs = before
		return err
	}
	for r, s := range batch {
		t.stamps[r].Store(max(t.stamps[r].Load(), s))
	}
	return nil
}

func (t *table) writePages(batch map[int]uint64) error {
	todo := slices.Sorted(maps.Keys(batch))
	b := make([]byte, BlockSize)
	var stamps [stampsPerPage]uint64
	for len(todo) > 0 {
		page := todo[0] / stampsPerPage
		for i := range stamps {
			stamps[i] = 0
			if r := page*stampsPerPage + i; r < len(t.stamps) {
				stamps[i] = t.stamps[r].Load()
			}
		}
		for len(todo) > 0 && todo[0]/stampsPerPage == page {
			i := todo[0] % stampsPerPage
			stamps[i] = max(stamps[i], batch[todo[0]])
			todo = todo[1:]
		}
		t.seqs[page]++
		marshalPage(b, page, t.seqs[page], stamps[:])
		off := int64(page)*2*BlockSize + int64(t.seqs[page]%2)*BlockSize
		if _, err := t.file.WriteAt(b, off); err != nil {
			return fmt.Errorf("write page %d of the table: %w", page, err)
		}
	}
	return nil
}
