package layer

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"
)

// A table says for each region of a layer when it was last written, and which
// of its blocks the layer holds. What it says is on disk before it is true: a
// region without a stamp nobody can have written, and of a block that is held
// the layer has the whole content, durably.
//
// Nothing of it is kept in memory but the sequences of its pages; Files keeps
// the sum of all tables.
type table struct {
	file    File
	old     bool // the format of version 1: everything is held
	lazy    bool // for tests: do not sync
	regions int

	commit sync.Mutex // one changes the table at a time
	err    error      // a write or a sync failed: nothing is certain any more

	pages sync.RWMutex // a page is being written; guards seqs, and growth
	seqs  []uint64     // of the pages' newest copies that are certain
}

// mark is a change of a row.
type mark struct {
	region     int
	stamp      uint64 // at least this
	set, clear uint16 // blocks that are held from now on, or not any more
}

func regions(size uint64, regionSize uint32) int {
	return int((size + uint64(regionSize) - 1) / uint64(regionSize))
}

// newTable uses a file of zeros, or one whose pages load will read.
func newTable(file File, regions int, old bool) *table {
	t := &table{file: file, old: old, regions: regions}
	t.seqs = make([]uint64, t.pageCount(regions))
	return t
}

func (t *table) perPage() int {
	if t.old {
		return oldRowsPerPage
	}
	return rowsPerPage
}

func (t *table) pageCount(regions int) int { return (regions + t.perPage() - 1) / t.perPage() }

// fileSize is how long the file is, in bytes.
func (t *table) fileSize() int64 { return int64(t.pageCount(t.regions)) * pairSize }

// load reads the table when it is opened, and calls found for each row of a
// page that was written. How many sectors are damaged is returned.
func (t *table) load(found func(region int, r row)) (damaged int, err error) {
	return t.scan(0, math.MaxUint64, func(page int, seq uint64, rows []row) bool {
		t.seqs[page] = seq
		t.each(page, rows, func(region int, r row) bool { found(region, r); return true })
		return true
	})
}

// rows calls found for each region from first on that the table knows of, until
// that returns false.
func (t *table) rows(first int, found func(region int, r row) bool) error {
	_, err := t.scan(first/t.perPage(), 0, func(page int, _ uint64, rows []row) bool {
		return t.each(page, rows, func(region int, r row) bool { return region < first || found(region, r) })
	})
	return err
}

func (t *table) each(page int, rows []row, found func(region int, r row) bool) bool {
	for i, r := range rows {
		if region := page*t.perPage() + i; region < t.regions && !found(region, r) {
			return false
		}
	}
	return true
}

// scan reads the pages from first on that were ever written. upTo 0: only what
// is certain.
func (t *table) scan(first int, upTo uint64, found func(page int, seq uint64, rows []row) bool) (damaged int, err error) {
	t.pages.RLock()
	defer t.pages.RUnlock()
	for page := first; page < len(t.seqs); page++ {
		at, _, ok, err := t.file.NextData(int64(page) * pairSize)
		if err != nil {
			return 0, fmt.Errorf("look for pages of the table: %w", err)
		}
		if page = int(at / pairSize); !ok || page >= len(t.seqs) {
			break
		}
		rows, seq, bad, err := t.page(page, cmp.Or(upTo, t.seqs[page]))
		if err != nil {
			return 0, err
		}
		damaged += bad
		if !found(page, seq, rows) {
			break
		}
	}
	return damaged, nil
}

// page reads a page.
func (t *table) page(page int, upTo uint64) (rows []row, seq uint64, damaged int, err error) {
	pair := make([]byte, pairSize)
	if _, err := t.file.ReadAt(pair, int64(page)*pairSize); err != nil {
		return nil, 0, 0, fmt.Errorf("read page %d of the table: %w", page, err)
	}
	rows = make([]row, t.perPage())
	if t.old {
		seq, damaged = parseOldPair(pair, page, upTo, rows)
	} else {
		seq, damaged = parsePair(pair, page, upTo, rows)
	}
	return rows, seq, damaged, nil
}

// holdsNothing tells whether no block is held.
func (t *table) holdsNothing() (bool, error) {
	nothing := true
	err := t.rows(0, func(_ int, r row) bool {
		nothing = r.held == 0
		return nothing
	})
	return nothing, err
}

// holds tells whether any block of a region is held.
func (t *table) holds(region int) (bool, error) {
	held := false
	err := t.rows(region, func(r int, row row) bool {
		held = r == region && row.held != 0
		return false
	})
	return held, err
}

// apply puts changes on disk; the marks are sorted by region. If the disk is
// full nothing has changed; after any other failure nothing is certain.
func (t *table) apply(marks []mark) error {
	t.commit.Lock()
	defer t.commit.Unlock()
	if t.err != nil || len(marks) == 0 {
		return t.err
	}
	before := slices.Clone(t.seqs)
	err := t.writePages(marks)
	if err != nil && IsFull(err) {
		if uerr := t.undo(before); uerr != nil {
			t.err = uerr
			return uerr
		}
		return err
	}
	if err == nil && !t.lazy {
		err = syncFile(t.file, "the table")
	}
	t.err = err
	return err
}

func (t *table) writePages(marks []mark) error {
	for len(marks) > 0 {
		page := marks[0].region / t.perPage()
		rows, _, _, err := t.page(page, t.seqs[page])
		if err != nil {
			return err
		}
		for len(marks) > 0 && marks[0].region/t.perPage() == page {
			r := &rows[marks[0].region%t.perPage()]
			r.stamp = max(r.stamp, marks[0].stamp)
			r.held = r.held&^marks[0].clear | marks[0].set
			marks = marks[1:]
		}
		if err := t.writePage(page, rows); err != nil {
			return err
		}
	}
	return nil
}

func (t *table) writePage(page int, rows []row) error {
	t.pages.Lock()
	defer t.pages.Unlock()
	seq := t.seqs[page] + 1
	b := make([]byte, BlockSize)
	if t.old {
		marshalOldPage(b, page, seq, rows)
	} else {
		marshalPage(b, page, seq, rows)
	}
	n, err := t.file.WriteAt(b, int64(page)*pairSize+int64(seq%2)*BlockSize)
	if n > 0 {
		t.seqs[page] = seq
	}
	if err != nil {
		return fmt.Errorf("write page %d of the table: %w", page, err)
	}
	return nil
}

// undo writes over the pages that were written since, in their place, what the
// table said before: they have their room, and may have reached the disk.
func (t *table) undo(before []uint64) error {
	for page, seq := range before {
		if t.seqs[page] == seq {
			continue
		}
		rows, _, _, err := t.page(page, seq)
		if err != nil {
			return err
		}
		t.pages.Lock()
		t.seqs[page] = seq
		t.pages.Unlock()
		if err := t.writePage(page, rows); err != nil {
			return fmt.Errorf("take back: %w", err)
		}
	}
	return syncFile(t.file, "the table")
}

// resize makes room for more regions.
func (t *table) resize(regions int) error {
	t.pages.Lock()
	defer t.pages.Unlock()
	pages := t.pageCount(regions)
	if err := t.file.Truncate(int64(pages) * pairSize); err != nil {
		return fmt.Errorf("make the table longer: %w", err)
	}
	if err := syncFile(t.file, "the table"); err != nil {
		return err
	}
	t.regions = regions
	t.seqs = append(t.seqs, make([]uint64, pages-len(t.seqs))...)
	return nil
}

// syncFile syncs. What failed is lost, if for want of room or not: the error is
// none that says "try again later".
func syncFile(f File, what string) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %v", what, err)
	}
	return nil
}
