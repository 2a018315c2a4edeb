package soak

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// book is a ledger of one cell with helpers to do what a test says.
type book struct {
	*testing.T
	l *Ledger
}

func newBook(t *testing.T) book { return book{t, NewLedger(7, 4096, 1, 1)} }

// begin begins an operation of that kind on the one cell.
func (b book) begin(kind Kind) *Op {
	b.Helper()
	for {
		o := b.l.Begin()
		if o.Kind == kind {
			return o
		}
		if o.Kind != Read && o.Kind != Flush { // as if it never was
			c := &b.l.cells[0]
			c.later = c.later[:len(c.later)-1]
			for _, p := range b.l.open {
				p.cells[0] = p.cells[0][:len(p.cells[0])-1]
			}
		}
		for i := range o.n {
			b.l.cells[o.first+i].busy = false
		}
	}
}

func (b book) do(kind Kind) *Op {
	b.Helper()
	o := b.begin(kind)
	b.end(o, true)
	return o
}

func (b book) end(o *Op, ok bool) {
	b.Helper()
	if err := b.l.End(o, ok); err != nil {
		b.Fatal(err)
	}
}

// sees reads what an operation wrote, nil: zeros.
func (b book) sees(o *Op) error {
	data := make([]byte, CellSize)
	if o != nil {
		copy(data, o.Data)
	}
	return b.l.Observe(0, data)
}

func (b book) may(o *Op) {
	b.Helper()
	if err := b.sees(o); err != nil {
		b.Error(err)
	}
}

func (b book) mayNot(o *Op) {
	b.Helper()
	if err := b.sees(o); err == nil {
		b.Error("the cell was said to be right")
	}
}

func TestAcknowledgedStays(t *testing.T) {
	b := newBook(t)
	b.may(nil)
	first := b.do(Write)
	b.mayNot(nil)
	b.may(first)
	second := b.do(Write)
	b.mayNot(first)
	b.may(second)
	b.do(Trim)
	b.mayNot(second)
	b.may(nil)
}

func TestUnknownIsEither(t *testing.T) {
	for _, happened := range []bool{false, true} {
		b := newBook(t)
		first := b.do(Write)
		unknown := b.begin(Write)
		b.end(unknown, false)
		if happened {
			b.may(unknown)
			b.mayNot(first)
			b.may(unknown)
			continue
		}
		b.may(first)
		b.mayNot(unknown) // it did not happen, so it never does
	}
}

func TestPowerCutSparesWhatWasFlushed(t *testing.T) {
	for name, tc := range map[string]struct {
		cover Kind
		ok    bool
	}{"flushed": {Flush, true}, "forced": {WriteFUA, true}, "flush not confirmed": {Flush, false}, "only written": {Write, false}} {
		t.Run(name, func(t *testing.T) {
			b := newBook(t)
			old := b.do(Write)
			b.do(Flush)
			kept := old
			switch tc.cover {
			case WriteFUA:
				kept = b.do(WriteFUA)
			case Write:
				b.do(Write)
			default:
				kept = b.do(Write)
				b.end(b.begin(Flush), tc.ok)
			}
			b.do(Write)
			b.l.Loosen()
			b.mayNot(nil)
			if tc.ok {
				b.mayNot(old)
				b.may(kept)
			} else {
				b.may(old)
			}
		})
	}
}

func TestFlushCoversWhatWasAcknowledgedBefore(t *testing.T) {
	b := newBook(t)
	before := b.do(Write)
	flush := b.begin(Flush)
	during := b.do(Write)
	b.end(flush, true)
	b.l.Loosen()
	b.mayNot(nil)
	b.may(before)
	b.mayNot(during)
}

func TestForeignDataIsFound(t *testing.T) {
	b := newBook(t)
	o := b.do(Write)
	torn := bytes.Clone(o.Data)
	torn[CellSize-1] ^= 1
	b.mayNot(&Op{Data: torn})
	other := make([]byte, CellSize)
	NewLedger(8, 0, 1, 1).fill(other, 0, o.number)
	b.mayNot(&Op{Data: other})
}

// TestLedgerAgreesWithADisk: whatever a right disk does, the ledger finds no
// fault; one that loses an acknowledged write is found out.
func TestLedgerAgreesWithADisk(t *testing.T) {
	const cells = 16
	rapid.Check(t, func(t *rapid.T) {
		l := NewLedger(1, 0, cells, rapid.Uint64().Draw(t, "seed"))
		disk, durable := make([]byte, cells*CellSize), make([]byte, cells*CellSize)
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			o := l.Begin()
			// A request whose end is not known happened or did not.
			known := rapid.IntRange(0, 9).Draw(t, "known") > 0
			happens := known || rapid.Bool().Draw(t, "happens")
			if happens {
				place := disk[o.Off : o.Off+o.Len]
				switch o.Kind {
				case Write, WriteFUA:
					copy(place, o.Data)
				case Trim, Zero:
					clear(place)
				case Read:
					copy(o.Data, place)
				case Flush:
					copy(durable, disk)
				}
				if o.Kind == WriteFUA {
					copy(durable[o.Off:], place)
				}
			}
			if err := l.End(o, known); err != nil {
				t.Fatal(err)
			}
			if rapid.IntRange(0, 19).Draw(t, "power") == 0 {
				l.Loosen()
				copy(disk, durable)
			}
		}
		if err := l.Observe(0, disk); err != nil {
			t.Fatal(err)
		}
		o := l.Begin()
		if o.Kind != Write && o.Kind != WriteFUA {
			return
		}
		if err := l.End(o, true); err != nil {
			t.Fatal(err)
		}
		if err := l.Observe(0, disk); err == nil {
			t.Fatal("a lost write was not found")
		}
	})
}

// snap takes a picture while f goes on.
func (b book) snap(f func()) *Picture {
	p := b.l.Expose()
	f()
	p.Close()
	return p
}

func TestPictureHoldsAnInstantOfItsExposure(t *testing.T) {
	b := newBook(t)
	before := b.do(Write)
	b.do(Flush)
	var during *Op
	p := b.snap(func() { during = b.do(Write); b.do(Flush) })
	after := b.do(Write)
	for name, tc := range map[string]struct {
		data []byte
		ok   bool
	}{
		"before": {before.Data, true}, "during": {during.Data, true}, "after": {after.Data, false}, "nothing": {make([]byte, CellSize), false},
	} {
		if err := p.Check(tc.data); err == nil != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What was acknowledged before something else was begun that the picture has,
// the picture has, too.
func TestPictureKeepsTheOrder(t *testing.T) {
	l := NewLedger(1, 0, 2, 1)
	disk := func(marks ...*mark) []byte {
		data := make([]byte, 2*CellSize)
		for i, m := range marks {
			if m != nil {
				l.fill(data[i*CellSize:(i+1)*CellSize], i, m.number)
			}
		}
		return data
	}
	write := func(i int) *mark { // one cell
		l.number++
		m := &mark{number: l.number, since: l.acks}
		l.cells[i].later = append(l.cells[i].later, m)
		for _, p := range l.open {
			p.cells[i] = append(p.cells[i], m)
		}
		l.acks++
		m.ack = l.acks
		return m
	}
	p := l.Expose()
	first, second := write(0), write(1)
	p.Close()
	for _, right := range [][]byte{disk(nil, nil), disk(first, nil), disk(first, second)} {
		if err := p.Check(right); err != nil {
			t.Error(err)
		}
	}
	if p.Check(disk(nil, second)) == nil {
		t.Error("the second without the first was said to be right")
	}
}

// After a rollback the volume is what the picture was; where nobody knows whether
// it was done, either, until that was read.
func TestRestore(t *testing.T) {
	for name, sure := range map[string]bool{"sure": true, "unsure": false} {
		t.Run(name, func(t *testing.T) {
			b := newBook(t)
			before := b.do(Write)
			p := b.snap(func() {})
			after := b.do(Write)
			b.do(Flush)
			p.Restore(sure)
			if sure && b.l.Observe(0, after.Data) == nil {
				t.Error("what was written since the snapshot is still there")
			}
			if err := b.l.Observe(0, before.Data); err != nil {
				t.Error(err)
			}
			if b.l.Observe(0, after.Data) == nil {
				t.Error("what was written since the snapshot came back")
			}
			next := b.do(Write)
			if b.l.Observe(0, before.Data) == nil {
				t.Error("what was written after the rollback is lost")
			}
			if err := b.l.Observe(0, next.Data); err != nil {
				t.Error(err)
			}
		})
	}
}
