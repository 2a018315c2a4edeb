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

// Checker decides, while a history happens, whether a volume could have
// answered like this. It is the promise of docs/volumes.md in code:
//
//   - each sector is linearizable for its holder: every operation seems to
//     happen at one instant between its call and its answer (Herlihy and Wing
//     1990; the search is that of Wing and Gong 1993, kept small by running it
//     along with the history);
//   - an operation that the holder's end left unanswered happened before the
//     next holder served, or never;
//   - what was flushed survives the loss of power of all replicas in sync;
//     everything acknowledged survives everything less.
//
// It knows nothing of replicas, epochs or messages. Not safe for concurrent
// use.
type Checker struct {
	sectors []sector
	ops     map[opID]*clientOp
	nextID  opID
}

type clientOp struct {
	id           opID
	holder       int
	write, flush bool
	fua          bool
	value        value
	first, count int
	// A flush's: what each sector could hold, should it be answered and all
	// power be lost right after.
	durable []map[value]bool
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

// NewChecker checks a volume of so many sectors, all zero.
func NewChecker(sectors int) *Checker {
	c := &Checker{sectors: make([]sector, sectors), ops: map[opID]*clientOp{}}
	for i := range c.sectors {
		c.sectors[i].configs = map[config]struct{}{{}: {}}
		c.sectors[i].durable = map[value]bool{0: true}
	}
	return c
}

// Write notes the call of a write of v to sectors [first, first+count).
func (c *Checker) Write(holder, first, count int, v value, fua bool) opID {
	o := c.call(&clientOp{holder: holder, write: true, value: v, first: first, count: count, fua: fua})
	for i := first; i < first+count; i++ {
		s := &c.sectors[i]
		s.begin(pendingOp{id: o.id, holder: holder, write: true, value: v, since: s.pendingValues(v)})
		s.durable[v] = true
		for _, other := range c.ops {
			if other.flush {
				other.durable[i][v] = true
			}
		}
	}
	return o.id
}

// Read notes the call of a read.
func (c *Checker) Read(holder, first, count int) opID {
	o := c.call(&clientOp{holder: holder, first: first, count: count})
	for i := first; i < first+count; i++ {
		c.sectors[i].begin(pendingOp{id: o.id, holder: holder})
	}
	return o.id
}

// Flush notes the call of a flush.
func (c *Checker) Flush(holder int) opID {
	o := c.call(&clientOp{holder: holder, flush: true})
	o.durable = make([]map[value]bool, len(c.sectors))
	for i := range c.sectors {
		o.durable[i] = c.sectors[i].possible()
	}
	return o.id
}

func (c *Checker) call(o *clientOp) *clientOp {
	c.nextID++
	o.id = c.nextID
	c.ops[o.id] = o
	return o
}

// Answered notes that an operation was answered without an error; got is what
// a read returned, one value for each sector.
func (c *Checker) Answered(id opID, got []value) error {
	o := c.ops[id]
	delete(c.ops, id)
	if o.flush {
		for i := range c.sectors {
			c.sectors[i].durable = o.durable[i]
		}
		return nil
	}
	for i := o.first; i < o.first+o.count; i++ {
		s := &c.sectors[i]
		var v value
		if !o.write {
			v = got[i-o.first]
		}
		since := s.pending[s.slot(id)].since
		if err := s.answer(id, v); err != nil {
			return fmt.Errorf("sector %d: %w", i, err)
		}
		if o.fua {
			s.durable = since
		}
	}
	return nil
}

// Refused notes that an operation was answered with an error, or its holder
// died: whether it happened is open until the next holder serves.
func (c *Checker) Refused(id opID) {
	o := c.ops[id]
	delete(c.ops, id)
	if o.write || o.flush {
		return
	}
	for i := o.first; i < o.first+o.count; i++ {
		s := &c.sectors[i]
		j := s.slot(id)
		s.used &^= 1 << j
		s.pending[j] = pendingOp{}
	}
}

// HolderOver notes that another holder serves: what the former left open
// happened before this, or never will.
func (c *Checker) HolderOver(holder int) {
	for i := range c.sectors {
		c.sectors[i].holderOver(holder)
	}
}

// PowerLost notes that every replica in sync lost power: each sector holds
// what was flushed last, or anything written to it since.
func (c *Checker) PowerLost() {
	for i := range c.sectors {
		s := &c.sectors[i]
		configs := map[config]struct{}{}
		for v := range s.durable {
			for k := range s.configs {
				configs[config{value: v, done: k.done}] = struct{}{}
			}
			// What is still pending may have happened and been lost.
			configs[config{value: v, done: s.used}] = struct{}{}
		}
		s.configs = configs
	}
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

// answer keeps the explanations in which the operation has happened by now
// (and, for a read, found v).
func (s *sector) answer(id opID, v value) error {
	i := s.slot(id)
	p := s.pending[i]
	before := s.describe()
	next := map[config]struct{}{}
	for k := range s.expand() {
		switch {
		case p.write && k.done&(1<<i) != 0:
			next[config{value: k.value, done: k.done &^ (1 << i)}] = struct{}{}
		case !p.write && k.value == v:
			next[k] = struct{}{}
		}
	}
	s.used &^= 1 << i
	s.pending[i] = pendingOp{}
	s.configs = next
	if len(next) > 0 {
		return nil
	}
	if p.write {
		return fmt.Errorf("write %d was answered, though its holder had ended without it; it could hold %s", p.value, before)
	}
	return fmt.Errorf("a read returned %d, it could hold %s", v, before)
}

// expand lets every pending write happen that may, in every order.
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
			if p := s.pending[i]; p.write && !p.over {
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

// Forget makes room: the holder will not answer anything any more. Call it
// after HolderOver.
func (c *Checker) Forget(holder int) {
	for i := range c.sectors {
		c.sectors[i].drop(holder)
	}
}

// Possible is what a sector may hold when nothing is under way.
func (c *Checker) Possible(i int) []value {
	var vs []value
	for v := range c.sectors[i].possible() {
		vs = append(vs, v)
	}
	slices.Sort(vs)
	return vs
}

func (s *sector) describe() string {
	var parts []string
	for v := range s.possible() {
		parts = append(parts, fmt.Sprint(v))
	}
	slices.Sort(parts)
	return strings.Join(parts, " or ")
}
