package sim

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
)

// value is what a sector holds: the number of the write that put it there.
// 0 is zeros.
type value uint32

// opID names a client's operation in the whole history.
type opID int

// Checker decides whether a volume could have answered as a history says. It
// is the promise of docs/volumes.md in code:
//
//   - each sector is linearizable for its holder: every operation seems to
//     happen at one instant between its call and its answer (Herlihy and Wing
//     1990; the search is that of Wing and Gong 1993);
//   - an operation that the holder's end left unanswered happened before the
//     next holder served, or never;
//   - what was flushed survives the loss of power of all replicas in sync;
//     everything acknowledged survives everything less.
//
// It knows nothing of replicas, epochs or messages. Its methods note what a
// client does and sees; Check judges it all. Not safe for concurrent use.
type Checker struct {
	sectors int
	log     []entry
	ops     []*clientOp // by opID
}

// entry is one line of the history.
type entry struct {
	kind   entryKind
	op     *clientOp
	holder int
}

type entryKind uint8

const (
	called entryKind = iota + 1
	answered
	holderOver
	forgotten
	powerLost
)

type clientOp struct {
	id           opID
	holder       int
	write, flush bool
	fua          bool
	value        value
	first, count int
	// A read's, once it was answered.
	got []value
	// Nothing is known of a read that was not answered.
	ignore bool
	// A flush's: what each sector could hold, should it be answered and all
	// power be lost right after.
	durable []map[value]bool
}

// NewChecker checks a volume of so many sectors, all zero.
func NewChecker(sectors int) *Checker { return &Checker{sectors: sectors} }

// Write notes the call of a write of v to sectors [first, first+count).
func (c *Checker) Write(holder, first, count int, v value, fua bool) opID {
	return c.call(&clientOp{holder: holder, write: true, value: v, first: first, count: count, fua: fua})
}

// Read notes the call of a read.
func (c *Checker) Read(holder, first, count int) opID {
	return c.call(&clientOp{holder: holder, first: first, count: count, ignore: true})
}

// Flush notes the call of a flush.
func (c *Checker) Flush(holder int) opID {
	return c.call(&clientOp{holder: holder, flush: true})
}

func (c *Checker) call(o *clientOp) opID {
	o.id = opID(len(c.ops))
	c.ops = append(c.ops, o)
	c.log = append(c.log, entry{kind: called, op: o})
	return o.id
}

// Answered notes that an operation was answered without an error; got is what
// a read returned, one value for each sector.
func (c *Checker) Answered(id opID, got []value) {
	o := c.ops[id]
	o.got, o.ignore = got, false
	c.log = append(c.log, entry{kind: answered, op: o})
}

// HolderOver notes that another holder serves: what the former left open
// happened before this, or never will. An operation that is never answered
// needs no note of its own.
func (c *Checker) HolderOver(holder int) {
	c.log = append(c.log, entry{kind: holderOver, holder: holder})
}

// Forget notes that the holder, which is over, will not answer anything any
// more.
func (c *Checker) Forget(holder int) {
	c.log = append(c.log, entry{kind: forgotten, holder: holder})
}

// PowerLost notes that every replica in sync lost power: each sector holds
// what was flushed last, or anything written to it since.
func (c *Checker) PowerLost() { c.log = append(c.log, entry{kind: powerLost}) }

// Check looks for an explanation of the whole history. It returns what each
// sector may hold at its end, and an error that says where no explanation was
// left.
func (c *Checker) Check() ([][]value, error) {
	s := newSearch(c.sectors)
	for n, e := range c.log {
		if err := s.step(e); err != nil {
			return nil, fmt.Errorf("line %d of the history, operation %d of holder %d: %w", n, e.op.id, e.op.holder, err)
		}
	}
	end := make([][]value, c.sectors)
	for i := range s.sectors {
		for v := range s.sectors[i].possible() {
			end[i] = append(end[i], v)
		}
		slices.Sort(end[i])
	}
	return end, nil
}

// search goes along a history and keeps every explanation of it.
type search struct {
	sectors []sector
	flushes map[opID]*clientOp
}

func newSearch(sectors int) *search {
	s := &search{sectors: make([]sector, sectors), flushes: map[opID]*clientOp{}}
	for i := range s.sectors {
		s.sectors[i].configs = map[config]struct{}{{}: {}}
		s.sectors[i].durable = map[value]bool{0: true}
	}
	return s
}

func (c *search) step(e entry) error {
	switch e.kind {
	case called:
		c.called(e.op)
	case answered:
		return c.answered(e.op)
	case holderOver:
		for i := range c.sectors {
			c.sectors[i].holderOver(e.holder)
		}
	case forgotten:
		for i := range c.sectors {
			c.sectors[i].drop(e.holder)
		}
	case powerLost:
		c.powerLost()
	}
	return nil
}

// powerLost: each sector holds what was flushed last, or anything since. A flush
// that is not answered yet may happen after that, to what is left by then.
func (c *search) powerLost() {
	for i := range c.sectors {
		c.sectors[i].powerLost()
		for v := range c.sectors[i].possible() {
			for _, f := range c.flushes {
				f.durable[i][v] = true
			}
		}
	}
}

func (c *search) called(o *clientOp) {
	switch {
	case o.flush:
		o.durable = make([]map[value]bool, len(c.sectors))
		for i := range c.sectors {
			o.durable[i] = c.sectors[i].possible()
		}
		c.flushes[o.id] = o
	case o.write:
		for i := o.first; i < o.first+o.count; i++ {
			s := &c.sectors[i]
			s.begin(pendingOp{id: o.id, holder: o.holder, write: true, value: o.value, since: s.pendingValues(o.value)})
			s.durable[o.value] = true
			for _, f := range c.flushes {
				f.durable[i][o.value] = true
			}
		}
	case !o.ignore:
		for i := o.first; i < o.first+o.count; i++ {
			c.sectors[i].begin(pendingOp{id: o.id, holder: o.holder, value: o.got[i-o.first]})
		}
	}
}

func (c *search) answered(o *clientOp) error {
	if o.flush {
		for i := range c.sectors {
			c.sectors[i].durable = o.durable[i]
		}
		delete(c.flushes, o.id)
		return nil
	}
	for i := o.first; i < o.first+o.count; i++ {
		s := &c.sectors[i]
		since := s.pending[s.slot(o.id)].since
		if err := s.answer(o.id); err != nil {
			return fmt.Errorf("sector %d: %w", i, err)
		}
		if o.fua {
			s.durable = since
		}
	}
	return nil
}

// config is one way the history of a sector can be explained so far.
type config struct {
	value value
	done  uint64 // bits of pending operations that have happened in it
}

// sector is one sector's explanations.
type sector struct {
	configs map[config]struct{}
	pending [64]pendingOp
	used    uint64
	// durable is what it may hold after all power is lost: the value at the
	// last answered flush, or any written since.
	durable map[value]bool
}

type pendingOp struct {
	id     opID
	holder int
	write  bool
	value  value
	// since collects what was written from its call on, for FUA.
	since map[value]bool
	// over: its holder ended; it happened already or never will.
	over bool
}

// powerLost: the sector holds what was flushed last, or anything since.
func (s *sector) powerLost() {
	configs := map[config]struct{}{}
	for v := range s.durable {
		for k := range s.expand() {
			configs[config{value: v, done: k.done}] = struct{}{}
		}
	}
	s.configs = configs
}

// begin lets an operation happen from now on.
func (s *sector) begin(p pendingOp) {
	if p.write {
		for i := range s.pending {
			if s.used&(1<<i) != 0 && s.pending[i].since != nil {
				s.pending[i].since[p.value] = true
			}
		}
	}
	i := bits.TrailingZeros64(^s.used)
	if i == 64 {
		panic("the checker follows at most 64 operations at once on one sector")
	}
	s.used |= 1 << i
	s.pending[i] = p
}

func (s *sector) slot(id opID) int {
	for i := range s.pending {
		if s.used&(1<<i) != 0 && s.pending[i].id == id {
			return i
		}
	}
	panic(fmt.Sprintf("the checker was not told of operation %d", id))
}

// answer keeps the explanations in which the operation has happened by now.
func (s *sector) answer(id opID) error {
	i := s.slot(id)
	p := s.pending[i]
	before := s.describe()
	next := map[config]struct{}{}
	for k := range s.expand() {
		if k.done&(1<<i) != 0 {
			next[config{value: k.value, done: k.done &^ (1 << i)}] = struct{}{}
		}
	}
	s.used &^= 1 << i
	s.pending[i] = pendingOp{}
	s.configs = next
	if len(next) > 0 {
		return nil
	}
	if p.write {
		return fmt.Errorf("write %d was answered, though its holder had ended without it; the sector could hold %s", p.value, before)
	}
	return fmt.Errorf("a read returned %d, the sector could hold %s", p.value, before)
}

// expand lets every pending operation happen that may, in every order.
func (s *sector) expand() map[config]struct{} {
	all := map[config]struct{}{}
	var visit func(config)
	visit = func(k config) {
		if _, ok := all[k]; ok {
			return
		}
		all[k] = struct{}{}
		for m := s.used &^ k.done; m != 0; m &= m - 1 {
			i := bits.TrailingZeros64(m)
			p := s.pending[i]
			if !p.over && (p.write || p.value == k.value) {
				visit(config{value: p.value, done: k.done | 1<<i})
			}
		}
	}
	for k := range s.configs {
		visit(k)
	}
	return all
}

func (s *sector) holderOver(holder int) {
	s.configs = s.expand()
	for i := range s.pending {
		if s.used&(1<<i) != 0 && s.pending[i].holder == holder {
			s.pending[i].over = true
		}
	}
}

// possible is every value the sector may hold now or get from what is pending.
func (s *sector) possible() map[value]bool {
	vs := map[value]bool{}
	for k := range s.expand() {
		vs[k.value] = true
	}
	return vs
}

// pendingValues is v and what other pending writes may put after it.
func (s *sector) pendingValues(v value) map[value]bool {
	vs := map[value]bool{v: true}
	for i := range s.pending {
		if s.used&(1<<i) != 0 && s.pending[i].write && !s.pending[i].over {
			vs[s.pending[i].value] = true
		}
	}
	return vs
}

// drop forgets operations that will never be answered, to make room.
func (s *sector) drop(holder int) {
	for i := range s.pending {
		if s.used&(1<<i) == 0 || s.pending[i].holder != holder || !s.pending[i].over {
			continue
		}
		next := map[config]struct{}{}
		for k := range s.configs {
			next[config{value: k.value, done: k.done &^ (1 << i)}] = struct{}{}
		}
		s.configs = next
		s.used &^= 1 << i
		s.pending[i] = pendingOp{}
	}
}

func (s *sector) describe() string {
	var parts []string
	for v := range s.possible() {
		parts = append(parts, fmt.Sprint(v))
	}
	slices.Sort(parts)
	return strings.Join(parts, " or ")
}
