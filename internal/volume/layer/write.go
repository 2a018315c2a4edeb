package layer

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
)

// zeroStep bounds how much of a range is zeroed at once when there are layers,
// in bytes.
const zeroStep = 8 << 30

// moving is blocks that Tidy moves: whoever writes them waits until it is done.
type moving struct {
	blocks map[int64]bool
	done   chan struct{}
}

// Write stamps the range with a generation, 0: with none, and then writes p. The
// disk being full fails it before or after a part was written.
func (f *Files) Write(p []byte, off int64, generation uint64) error {
	return f.carryOut(&request{off: off, n: int64(len(p)), stamp: generation, p: p})
}

// WriteThin is Write, and makes holes of the pages of p that are zeros, whatever
// was there.
func (f *Files) WriteThin(p []byte, off int64, generation uint64) error {
	return f.carryOut(&request{off: off, n: int64(len(p)), stamp: generation, p: p, thin: true})
}

func (f *Files) carryOut(r *request) error {
	if r.n > 0 && f.noted(r.off, r.n, r.stamp) {
		return f.inPlace(r.span(), r.p, r.thin)
	}
	return f.change(r)
}

// Zero does the same with zeros, and gives the range's space back.
func (f *Files) Zero(off, n int64, generation uint64) error {
	step := n
	if f.chain.Load().where != nil {
		step = zeroStep
	}
	for at := off; at < off+n; at += step {
		if err := f.change(&request{off: at, n: min(step, off+n-at), stamp: generation}); err != nil {
			return err
		}
	}
	return nil
}

func (f *Files) change(r *request) error {
	if r.n == 0 {
		return nil
	}
	if err := f.prepare(r); err != nil {
		return fmt.Errorf("replica %s: prepare for %d bytes at %d: %w", f.dir, r.n, r.off, err)
	}
	for _, s := range r.rest {
		var p []byte
		if r.p != nil {
			p = r.p[s.from-r.off : s.to-r.off]
		}
		if err := f.inPlace(s, p, r.thin); err != nil {
			return err
		}
	}
	return nil
}

// inPlace writes to the layers that hold the blocks; p nil: zeros.
func (f *Files) inPlace(s span, p []byte, thin bool) error {
	c := f.chain.Load()
	if c.where == nil {
		return put(c.top().data, s, p, thin)
	}
	g := f.geometry()
	f.maps.RLock()
	defer f.maps.RUnlock()
	for m := f.moving.Load(); m != nil && m.touches(g, s); m = f.moving.Load() {
		f.maps.RUnlock()
		<-m.done
		f.maps.RLock()
	}
	c = f.chain.Load()
	return c.runs(g, s.from, s.len(), c.slot, func(run span, slot uint8) (bool, error) {
		if p == nil {
			return true, put(c.bySlot[slot].data, run, nil, thin)
		}
		return true, put(c.bySlot[slot].data, run, p[run.from-s.from:run.to-s.from], thin)
	})
}

func (m *moving) touches(g geometry, s span) bool {
	for b := s.from / g.block; b*g.block < s.to; b++ {
		if m.blocks[b] {
			return true
		}
	}
	return false
}

// put writes to a file; p nil: zeros.
func put(file File, s span, p []byte, thin bool) error {
	switch {
	case p == nil:
		return file.Punch(s.from, s.len())
	case thin:
		return putThin(file, s.from, p)
	}
	_, err := file.WriteAt(p, s.from)
	return err
}

// thinPage is the unit in which a thin write makes holes, in bytes: that in which
// file systems give space.
const thinPage = 4096

// putThin writes to a file, and punches what is zeros.
func putThin(file File, off int64, p []byte) error {
	return pages(off, p, func(at, n int64, zero bool) error {
		if zero {
			return file.Punch(off+at, n)
		}
		_, err := file.WriteAt(p[at:at+n], off+at)
		return err
	})
}

// DataBytes is how much of p, which belongs at off, a thin write writes.
func DataBytes(p []byte, off int64) (sum int64) {
	_ = pages(off, p, func(_, n int64, zero bool) error {
		if !zero {
			sum += n
		}
		return nil
	})
	return sum
}

// pages calls found for each stretch of p, which belongs at off, of pages that are
// zeros, or are not.
func pages(off int64, p []byte, found func(at, n int64, zero bool) error) error {
	size := int64(len(p))
	for at := int64(0); at < size; {
		begin, zero := at, false
		for first := true; at < size; first = false {
			next := min(size, at+thinPage-(off+at)%thinPage)
			is := zeros(p[at:next])
			if first {
				zero = is
			}
			if is != zero {
				break
			}
			at = next
		}
		if err := found(begin, at-begin, zero); err != nil {
			return err
		}
	}
	return nil
}

// noughts is a page of zeros.
var noughts [thinPage]byte

// zeros tells whether a part of a page is zeros.
func zeros(p []byte) bool { return bytes.Equal(p, noughts[:len(p)]) }

// Ready tells whether a write would only have to write: nothing has to be put on
// disk before. The range is not empty.
func (f *Files) Ready(off, n int64, generation uint64) bool {
	m := f.moving.Load()
	return f.noted(off, n, generation) && (m == nil || !m.touches(f.geometry(), span{off, off + n}))
}

// noted tells whether the range has its stamps, and the newest group its blocks.
func (f *Files) noted(off, n int64, generation uint64) bool {
	c, g := f.chain.Load(), f.geometry()
	return f.stamped(c, g, off, n, generation) && (c.where == nil || c.held(g, off, n))
}

func (f *Files) stamped(c *chain, g geometry, off, n int64, generation uint64) bool {
	return generation <= f.sb.Load().Generation || c.stamped(int(off/g.region), int((off+n-1)/g.region), generation)
}

// held tells whether the newest group holds all blocks of a range.
func (c *chain) held(g geometry, off, n int64) bool {
	for b := off / g.block; b*g.block < off+n; b++ {
		if !c.writable[c.slot(b)] {
			return false
		}
	}
	return true
}

// CopyUp is how many bytes have to be copied before the range can be written.
func (f *Files) CopyUp(off, n int64) int64 {
	c, g := f.chain.Load(), f.geometry()
	if c.where == nil || c.held(g, off, n) {
		return 0
	}
	var sum int64
	for b := off / g.block; b*g.block < off+n; b++ {
		if s := g.span(b); !c.writable[c.slot(b)] && (s.from < off || s.to > off+n) {
			sum += s.len()
		}
	}
	return sum
}

// begun tells whether the newest group holds some of a region.
func (c *chain) begun(g geometry, region int) bool {
	for b := range g.blocks(region) {
		if c.writable[c.slot(b)] {
			return true
		}
	}
	return false
}

// request is a change that has to be noted on disk before it may be made.
type request struct {
	off, n int64
	stamp  uint64
	p      []byte // what will be written; nil: zeros
	thin   bool   // pages of zeros become holes
	keep   bool   // nothing will: the blocks are only brought up

	rest []span // what of the range is still to be written, when it is done
	done bool
	err  error
}

func (r *request) span() span { return span{r.off, r.off + r.n} }

func (r *request) covers(s span) bool { return !r.keep && s.from >= r.off && s.to <= r.off+r.n }

// committer notes changes: those who come while others' are being noted are
// noted together.
type committer struct {
	queue   sync.Mutex
	waiting []*request

	turn sync.Mutex // one does it at a time, for all who wait
}

// prepare returns when the range has its stamps, and the newest group holds all
// of its blocks.
func (f *Files) prepare(r *request) error {
	if f.noted(r.off, r.n, r.stamp) {
		r.rest = []span{r.span()}
		return nil
	}
	f.commit.queue.Lock()
	f.commit.waiting = append(f.commit.waiting, r)
	f.commit.queue.Unlock()

	f.commit.turn.Lock()
	defer f.commit.turn.Unlock()
	if r.done {
		return r.err
	}
	f.commit.queue.Lock()
	batch := f.commit.waiting
	f.commit.waiting = nil
	f.commit.queue.Unlock()
	err := f.note(batch)
	for _, b := range batch {
		b.done, b.err = true, err
	}
	return r.err
}

// batch is what several requests need together.
type batch struct {
	f     *Files
	c     *chain
	g     geometry
	into  *stratum
	marks map[int]mark
	held  map[int64]bool // blocks that into will hold
	wants []span         // what is to be copied
}

// note writes down what the requests need, and then takes it for true: first the
// content of the blocks that the newest group does not hold, then the rows that
// say so, with the stamps. Where it can, it leaves both to the kernel, and to the
// next flush; else both are put on disk, in that order. So a power cut at any
// instant leaves each block's old content where it is found, or the new one.
func (f *Files) note(requests []*request) error {
	c := f.chain.Load()
	b := &batch{f: f, c: c, g: f.geometry(), into: c.layers[c.target], marks: map[int]mark{}, held: map[int64]bool{}}
	for _, r := range requests {
		if r.stamp > f.sb.Load().Generation {
			b.stamp(r)
		}
		if err := b.bringUp(r); err != nil {
			return err
		}
	}
	if err := b.write(); err != nil {
		return err
	}
	for region, m := range b.marks {
		c.stamp(region, m.stamp)
	}
	for block := range b.held {
		c.set(block, c.slots[c.target])
	}
	return nil
}

// write writes the rows.
func (b *batch) write() error {
	t, marks := b.into.table, sorted(b.marks)
	if b.mayWait(marks) {
		return t.applyProvisional(marks)
	}
	if len(b.held) > 0 {
		if err := t.syncContent(); err != nil {
			return err
		}
	}
	return t.apply(marks)
}

// mayWait tells whether the rows may wait for the next flush. If the power goes
// before, then what was written after them is not found any more, and so they are
// not missed: all of it is in blocks that only they say are held. Not so if the
// newest group held blocks of a region before, which are written in place: their
// stamp must be durable.
func (b *batch) mayWait(marks []mark) bool {
	if b.into.table.old || b.into.table.boot() == 0 || b.c.where == nil {
		return false
	}
	for _, m := range marks {
		if m.stamp > b.c.stamps[m.region].Load() && b.c.begun(b.g, m.region) && !b.f.hooks.StampLater {
			return false
		}
	}
	return true
}

func sorted(marks map[int]mark) []mark {
	list := make([]mark, 0, len(marks))
	for _, region := range slices.Sorted(maps.Keys(marks)) {
		list = append(list, marks[region])
	}
	return list
}

func (b *batch) stamp(r *request) {
	for region := int(r.off / b.g.region); int64(region)*b.g.region < r.off+r.n; region++ {
		if m := b.marks[region]; b.c.stamps[region].Load() < r.stamp && m.stamp < r.stamp {
			m.region, m.stamp = region, r.stamp
			b.marks[region] = m
		}
	}
}

// bringUp writes the blocks of a range that the newest group does not hold into
// its lowest layer: what the request has for them, if it covers them, else what
// they are now.
func (b *batch) bringUp(r *request) error {
	if b.c.where == nil {
		r.rest = []span{r.span()}
		return nil
	}
	var own []span
	for block := r.off / b.g.block; block*b.g.block < r.off+r.n; block++ {
		s := b.g.span(block)
		part := span{max(s.from, r.off), min(s.to, r.off+r.n)}
		switch {
		case b.c.writable[b.c.slot(block)] || b.held[block]:
			r.rest = appendSpan(r.rest, part)
			continue
		case r.covers(s):
			own = appendSpan(own, s)
		default:
			b.wants = appendSpan(b.wants, s)
			r.rest = appendSpan(r.rest, part)
		}
		b.hold(block)
	}
	if err := b.copyUp(); err != nil {
		return err
	}
	for _, s := range own {
		var p []byte
		if r.p != nil {
			p = r.p[s.from-r.off : s.to-r.off]
		}
		if err := put(b.into.data, s, p, r.thin); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", s.len(), s.from, err)
		}
	}
	return nil
}

func (b *batch) hold(block int64) {
	region := b.g.regionOf(block)
	m := b.marks[region]
	m.region = region
	m.set |= b.g.mask(block)
	b.marks[region] = m
	b.held[block] = true
}

// copyUp copies what is wanted from where it is now: tidying may move it until the
// lock is held, and then gives its old place back. Nobody writes it.
func (b *batch) copyUp() error {
	wants := b.wants
	b.wants = nil
	if b.f.hooks.ForgetCopyUp {
		return nil
	}
	b.f.maps.RLock()
	defer b.f.maps.RUnlock()
	for _, w := range wants {
		err := b.c.runs(b.g, w.from, w.len(), b.c.slot, func(s span, slot uint8) (bool, error) {
			return true, b.c.copy(b.into.data, slot, s)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// copy makes a range of a file what it is in a slot.
func (c *chain) copy(to File, slot uint8, s span) error {
	l := c.bySlot[slot]
	if l != nil && to.Share(l.data, s.from, s.len()) {
		return nil
	}
	at := s.from
	var failed error
	err := c.slotExtents(slot, s, func(n int64, hole bool) bool {
		if hole {
			failed = to.Punch(at, n) // an attempt that failed may have left something
		} else {
			failed = c.copyData(to, slot, span{at, at + n})
		}
		at += n
		return failed == nil
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("copy %d bytes at %d from the layer below: %w", s.len(), s.from, err)
	}
	return nil
}

// copyStep is how much is copied at once, in bytes.
const copyStep = 256 << 10

func (c *chain) copyData(to File, slot uint8, s span) error {
	buf := make([]byte, min(copyStep, s.len()))
	for at := s.from; at < s.to; at += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), s.to-at)]
		if err := c.readSlot(slot, p, at); err != nil {
			return err
		}
		if _, err := to.WriteAt(p, at); err != nil {
			return err
		}
	}
	return nil
}
