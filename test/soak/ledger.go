// Package soak lets a cluster of real servers work for a long time while they
// fail, and finds out whether anything was lost.
//
// What lives here: the book of what a volume must hold (Ledger), the plan of
// faults (Schedule), and the test that runs both. What must not: how a fault is
// made (internal/devcluster), what one fault alone must lead to (test/e2e).
package soak

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
)

// CellSize is what the book is kept of, in bytes: a sector.
const CellSize = 512

// maxCells is the longest request, in cells.
const maxCells = 128

// Ledger writes numbered records to the cells of a volume and keeps book of
// what it was told about each. From that follows what a cell may hold:
//
//   - the newest record that was acknowledged, or that was read,
//   - any that was begun after it and whose end is not known;
//   - after a power cut of all replicas (see Loosen) what the newest flush
//     covers, and all that was begun later.
//
// What is read once stays: a write that did not happen never happens. Safe for
// concurrent use.
type Ledger struct {
	tag uint64 // tells this volume's records from others'
	off int64  // where its cells begin

	mu     sync.Mutex
	rng    *rand.Rand
	cells  []cell
	number uint64 // of the newest record
	acks   uint64 // how many were acknowledged
	open   []*Picture
	stats  Stats
}

// Stats are what a ledger did.
type Stats struct{ Writes, Reads, Flushes, Unknown, Cells uint64 }

// cell is the book of one cell.
type cell struct {
	busy    bool
	flushed *mark   // what a flush covers, the newest
	later   []*mark // what was begun since, oldest first
}

// mark is a record in the book. Records of zeros are trims.
type mark struct {
	number uint64
	zeros  bool
	since  uint64 // how many were acknowledged when it was begun
	ack    uint64 // when it was acknowledged or read, 0: not known to be there
}

// NewLedger keeps book of n cells from off on, that hold zeros.
func NewLedger(tag uint64, off int64, n int, seed uint64) *Ledger {
	l := &Ledger{tag: tag, off: off, rng: rand.New(rand.NewPCG(seed, tag)), cells: make([]cell, n)}
	for i := range l.cells {
		l.cells[i].flushed = &mark{zeros: true}
	}
	return l
}

// Kind is what an operation does.
type Kind int

// The kinds of operations.
const (
	Write Kind = iota
	WriteFUA
	Trim
	Zero
	Read
	Flush
)

// Op is an operation under way; no two touch the same cell.
type Op struct {
	Kind     Kind
	Off, Len int64
	Data     []byte // to be written; for a read, where it goes

	first, n int
	number   uint64
	covers   uint64 // of a flush
}

// Begin chooses what to do next.
func (l *Ledger) Begin() *Op {
	l.mu.Lock()
	defer l.mu.Unlock()
	o := &Op{Kind: l.kind()}
	if o.Kind == Flush {
		o.covers = l.acks
		return o
	}
	o.first, o.n = l.free()
	o.Off, o.Len = l.off+int64(o.first)*CellSize, int64(o.n)*CellSize
	if o.Kind == Read || o.Kind == Write || o.Kind == WriteFUA {
		o.Data = make([]byte, o.Len)
	}
	if o.Kind == Read {
		return o
	}
	l.number++
	o.number = l.number
	for i := range o.n {
		c := &l.cells[o.first+i]
		m := &mark{number: o.number, zeros: o.Data == nil, since: l.acks}
		c.later = append(c.later, m)
		for _, p := range l.open {
			p.cells[o.first+i] = append(p.cells[o.first+i], m)
		}
		if o.Data != nil {
			l.fill(o.Data[i*CellSize:(i+1)*CellSize], o.first+i, o.number)
		}
	}
	return o
}

func (l *Ledger) kind() Kind {
	switch n := l.rng.IntN(100); {
	case n < 55:
		return Write
	case n < 60:
		return WriteFUA
	case n < 70:
		return Trim
	case n < 75:
		return Zero
	case n < 95:
		return Read
	}
	return Flush
}

// free finds cells that nobody uses and makes them busy: often one or a few,
// seldom many.
func (l *Ledger) free() (first, n int) {
	for {
		n := 1 + l.rng.IntN(1<<l.rng.IntN(8))
		n = min(n, maxCells, len(l.cells))
		first := l.rng.IntN(len(l.cells) - n + 1)
		if l.claim(first, n) {
			return first, n
		}
	}
}

func (l *Ledger) claim(first, n int) bool {
	for i := range n {
		if l.cells[first+i].busy {
			return false
		}
	}
	for i := range n {
		l.cells[first+i].busy = true
	}
	return true
}

// End notes how an operation ended. An error says that what was read may not
// be there.
func (l *Ledger) End(o *Op, ok bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range o.n {
		l.cells[o.first+i].busy = false
	}
	switch {
	case !ok:
		l.stats.Unknown++
		return nil
	case o.Kind == Flush:
		l.stats.Flushes++
		l.settle(o.covers)
		return nil
	case o.Kind == Read:
		l.stats.Reads++
		return l.observe(o.first, o.Data)
	}
	l.stats.Writes++
	l.acks++
	for i := range o.n {
		c := &l.cells[o.first+i]
		c.later[len(c.later)-1].ack = l.acks
		if o.Kind == WriteFUA {
			c.settle(l.acks)
		}
	}
	return nil
}

// settle notes that all up to an acknowledgement is durable.
func (l *Ledger) settle(covers uint64) {
	for i := range l.cells {
		l.cells[i].settle(covers)
	}
}

func (c *cell) settle(covers uint64) {
	for i := len(c.later) - 1; i >= 0; i-- {
		if ack := c.later[i].ack; ack > 0 && ack <= covers {
			c.flushed, c.later = c.later[i], slices.Clone(c.later[i+1:])
			return
		}
	}
}

// Loosen notes that power may have failed at all replicas since what is
// acknowledged by now was: only what was flushed is sure to be there.
func (l *Ledger) Loosen() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.cells {
		for k := range l.cells[i].later {
			l.cells[i].later[k].ack = 0
		}
	}
}

// Observe checks what was read from the cells on, and notes it.
func (l *Ledger) Observe(first int, data []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.observe(first, data)
}

// Cells is how many there are, Off where a cell begins.
func (l *Ledger) Cells() int { return len(l.cells) }

// Off is where a cell begins.
func (l *Ledger) Off(cell int) int64 { return l.off + int64(cell)*CellSize }

// Stats are what was done so far.
func (l *Ledger) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	for i := range l.cells {
		if c := &l.cells[i]; c.flushed.number > 0 || len(c.later) > 0 {
			s.Cells++
		}
	}
	return s
}

func (l *Ledger) observe(first int, data []byte) error {
	l.acks++
	for i := 0; i < len(data)/CellSize; i++ {
		if err := l.observeCell(first+i, data[i*CellSize:(i+1)*CellSize]); err != nil {
			return err
		}
	}
	return nil
}

func (l *Ledger) observeCell(index int, data []byte) error {
	c := &l.cells[index]
	// The newest that fits: zeros may be of several.
	from := c.oldest()
	for i := len(c.later) - 1; i >= max(from, 0); i-- {
		if l.holds(data, index, c.later[i]) {
			c.later = c.later[:i+1] // what came later did not happen
			if c.later[i].ack == 0 {
				c.later[i].ack = l.acks
			}
			return nil
		}
	}
	if from < 0 && l.holds(data, index, c.flushed) {
		c.later = nil
		return nil
	}
	return fmt.Errorf("cell %d at %d holds %s; it may hold %s", index, l.Off(index), l.describe(data), c.describe(from))
}

// oldest is the first of later that the cell may hold, -1 for what was flushed.
func (c *cell) oldest() int {
	for i := len(c.later) - 1; i >= 0; i-- {
		if c.later[i].ack > 0 {
			return i
		}
	}
	return -1
}

// Records begin with magic, tag, cell and number; all that follows depends on
// these.
const recordMagic = 0x4147524e4c454447

func (l *Ledger) fill(b []byte, index int, number uint64) {
	binary.LittleEndian.PutUint64(b, recordMagic)
	binary.LittleEndian.PutUint64(b[8:], l.tag)
	binary.LittleEndian.PutUint64(b[16:], uint64(index))
	binary.LittleEndian.PutUint64(b[24:], number)
	x := l.tag ^ uint64(index)<<32 ^ number
	for i := 32; i < CellSize; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], x)
	}
}

func (l *Ledger) holds(data []byte, index int, m *mark) bool {
	want := make([]byte, CellSize)
	if !m.zeros {
		l.fill(want, index, m.number)
	}
	return string(data) == string(want)
}

func (l *Ledger) describe(data []byte) string {
	index, number := binary.LittleEndian.Uint64(data[16:]), binary.LittleEndian.Uint64(data[24:])
	switch {
	case string(data) == string(make([]byte, CellSize)):
		return "zeros"
	case binary.LittleEndian.Uint64(data) != recordMagic:
		return fmt.Sprintf("no record: %x...", data[:32])
	}
	return fmt.Sprintf("record %d of cell %d of volume %x", number, index, binary.LittleEndian.Uint64(data[8:]))
}

func (c *cell) describe(from int) string {
	text := ""
	if from < 0 {
		text = fmt.Sprintf("%v (flushed)", c.flushed)
	}
	for _, m := range c.later[max(from, 0):] {
		text += fmt.Sprintf(" %v", m)
	}
	return text
}

func (m *mark) String() string {
	text := fmt.Sprint(m.number)
	if m.zeros {
		text = "zeros " + text
	}
	if m.ack == 0 && m.number > 0 {
		text += "?"
	}
	return text
}
