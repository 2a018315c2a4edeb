package layer

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
)

// A table says for each region of a layer when it was last written, and which
// of its blocks the layer holds. What it says is on disk before it is true: a
// region without a stamp nobody can have written, and of a block that is held
// the layer has the whole content, durably.
//
// A page may also be provisional: then it is with the kernel, as the content is
// of the blocks that it says are held, and counts until the kernel is gone. After
// a power cut the page before it counts, and so the blocks are where they were.
//
// Nothing of it is kept in memory but the sequences of its pages; Files keeps
// the sum of all tables.
type table struct {
	file    File
	data    File          // of its layer
	boot    func() uint64 // the number of this boot; 0: nothing can be provisional
	old     bool          // the format of version 1: everything is held
	hooks   Hooks
	regions int

	commit sync.Mutex // one changes the table at a time
	err    error      // a write or a sync failed: nothing is certain any more

	// provisional lists the pages that are; guarded by commit.
	provisional map[int]bool

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
func newTable(file, data File, regions int, old bool, boot func() uint64) *table {
	t := &table{file: file, data: data, boot: boot, old: old, regions: regions, provisional: map[int]bool{}}
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
	t.commit.Lock()
	defer t.commit.Unlock()
	return t.scan(0, math.MaxUint64, func(page int, is pairState, rows []row) bool {
		t.seqs[page] = is.seq
		if is.provisional {
			t.provisional[page] = true
		}
		t.each(page, rows, func(region int, r row) bool { found(region, r); return true })
		return true
	})
}

// rows calls found for each region from first on that the table knows of, until
// that returns false.
func (t *table) rows(first int, found func(region int, r row) bool) error {
	_, err := t.scan(first/t.perPage(), 0, func(page int, _ pairState, rows []row) bool {
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
func (t *table) scan(first int, upTo uint64, found func(page int, is pairState, rows []row) bool) (damaged int, err error) {
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
		rows, is, err := t.page(page, cmp.Or(upTo, t.seqs[page]))
		if err != nil {
			return 0, err
		}
		damaged += is.damaged
		if !found(page, is, rows) {
			break
		}
	}
	return damaged, nil
}

// page reads a page.
func (t *table) page(page int, upTo uint64) (rows []row, is pairState, err error) {
	pair := make([]byte, pairSize)
	if _, err := t.file.ReadAt(pair, int64(page)*pairSize); err != nil {
		return nil, is, fmt.Errorf("read page %d of the table: %w", page, err)
	}
	rows = make([]row, t.perPage())
	if t.old {
		return rows, parseOldPair(pair, page, upTo, rows), nil
	}
	return rows, parsePair(pair, page, upTo, t.boot(), rows), nil
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

// stamps returns what reads the stamps of regions, quickly for those that come one
// after the other. One that was changed meanwhile may be missed.
func (t *table) stamps() func(region int) (uint64, error) {
	at := -1
	var rows []row
	return func(region int) (uint64, error) {
		page := region / t.perPage()
		if page != at {
			t.pages.RLock()
			defer t.pages.RUnlock()
			var err error
			if rows, _, err = t.page(page, t.seqs[page]); err != nil {
				return 0, err
			}
			at = page
		}
		return rows[region%t.perPage()].stamp, nil
	}
}

// apply puts changes on disk; the marks are sorted by region. If the disk is
// full nothing has changed; after any other failure nothing is certain.
func (t *table) apply(marks []mark) error {
	t.commit.Lock()
	defer t.commit.Unlock()
	if t.err != nil || len(marks) == 0 {
		return t.err
	}
	// What is provisional on their pages becomes durable with them.
	for _, m := range marks {
		if t.provisional[m.region/t.perPage()] {
			if t.err = t.syncContent(); t.err != nil {
				return t.err
			}
			break
		}
	}
	if err := t.write(marks, 0); err != nil {
		return err
	}
	if !t.hooks.LazyStamps {
		t.err = syncFile(t.file, "the table")
	}
	return t.err
}

// applyProvisional makes changes that settle puts on disk later; the content of
// the blocks that are held from now on has been written. Failures are as with
// apply.
func (t *table) applyProvisional(marks []mark) error {
	t.commit.Lock()
	defer t.commit.Unlock()
	if t.err != nil {
		return t.err
	}
	return t.write(marks, t.boot())
}

// settle puts on disk what was provisional when it was called.
func (t *table) settle() error {
	t.commit.Lock()
	defer t.commit.Unlock()
	if t.err != nil || len(t.provisional) == 0 || t.hooks.ForgetSettle {
		return t.err
	}
	t.err = final(t.settlePages())
	return t.err
}

func (t *table) settlePages() error {
	if err := t.syncContent(); err != nil {
		return err
	}
	for _, page := range slices.Sorted(maps.Keys(t.provisional)) {
		rows, _, err := t.page(page, t.seqs[page])
		if err != nil {
			return err
		}
		if err := t.writePage(page, rows, t.next(page, 0)); err != nil {
			return err
		}
	}
	return syncFile(t.file, "the table")
}

func (t *table) syncContent() error {
	if t.hooks.HoldBeforeData {
		return nil
	}
	return syncFile(t.data, "what the table says is held")
}

// before is what a page said before it was changed.
type before struct {
	page int
	rows []row
}

// write changes pages, or, if the disk is full, none.
func (t *table) write(marks []mark, boot uint64) error {
	done, err := t.writePages(marks, boot)
	if err != nil && IsFull(err) {
		// In their place, where they have their room: they may have reached the
		// disk.
		for _, b := range done {
			if t.err = final(t.writePage(b.page, b.rows, sequence{t.seqs[b.page] + 2, boot})); t.err != nil {
				return t.err
			}
		}
		if boot == 0 {
			t.err = syncFile(t.file, "the table")
		}
		return cmp.Or(t.err, err)
	}
	t.err = err
	return err
}

// writePages returns the pages that were written, or partly so, as they were.
func (t *table) writePages(marks []mark, boot uint64) (done []before, err error) {
	for len(marks) > 0 {
		page := marks[0].region / t.perPage()
		rows, _, err := t.page(page, t.seqs[page])
		if err != nil {
			return done, err
		}
		was := before{page, slices.Clone(rows)}
		for len(marks) > 0 && marks[0].region/t.perPage() == page {
			r := &rows[marks[0].region%t.perPage()]
			r.stamp = max(r.stamp, marks[0].stamp)
			r.held = r.held&^marks[0].clear | marks[0].set
			marks = marks[1:]
		}
		seq := t.seqs[page]
		err = t.writePage(page, rows, t.next(page, boot))
		if t.seqs[page] != seq {
			done = append(done, was)
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// next is the sequence for the copy of a pair that is not durable.
func (t *table) next(page int, boot uint64) sequence {
	if t.provisional[page] {
		return sequence{t.seqs[page] + 2, boot}
	}
	return sequence{t.seqs[page] + 1, boot}
}

func (t *table) writePage(page int, rows []row, seq sequence) error {
	t.pages.Lock()
	defer t.pages.Unlock()
	b := make([]byte, BlockSize)
	if t.old {
		marshalOldPage(b, page, seq.number, rows)
	} else {
		marshalPage(b, page, seq, rows)
	}
	n, err := t.file.WriteAt(b, int64(page)*pairSize+int64(seq.number%2)*BlockSize)
	if n > 0 {
		t.seqs[page] = seq.number
		if seq.boot != 0 {
			t.provisional[page] = true
		} else {
			delete(t.provisional, page)
		}
	}
	if err != nil {
		return fmt.Errorf("write page %d of the table: %w", page, err)
	}
	return nil
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
	// One that failed for want of room may have been for more.
	t.seqs = append(t.seqs, make([]uint64, max(0, pages-len(t.seqs)))...)
	return nil
}

// syncFile syncs. What failed is lost, if for want of room or not.
func syncFile(f File, what string) error {
	if err := final(f.Sync()); err != nil {
		return fmt.Errorf("sync %s: %w", what, err)
	}
	return nil
}

// final makes of an error one that does not say "try again when there is room".
func final(err error) error {
	if IsFull(err) {
		return fmt.Errorf("%v", err)
	}
	return err
}
