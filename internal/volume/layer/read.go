package layer

// runs calls found for each stretch of a range that is in one place, until that
// says that it is enough.
func (c *chain) runs(g geometry, off, n int64, slot func(block int64) uint8, found func(s span, slot uint8) (bool, error)) error {
	for at, end := off, off+n; at < end; {
		block := at / g.block
		place := slot(block)
		next := block + 1
		for next*g.block < end && slot(next) == place {
			next++
		}
		s := span{at, min(next*g.block, end)}
		if more, err := found(s, place); err != nil || !more {
			return err
		}
		at = s.to
	}
	return nil
}

// ReadAt fills p.
func (f *Files) ReadAt(p []byte, off int64) error {
	if c := f.chain.Load(); c.where == nil {
		_, err := c.top().data.ReadAt(p, off)
		return err
	}
	f.maps.RLock()
	defer f.maps.RUnlock()
	c := f.chain.Load()
	return c.runs(f.geometry(), off, int64(len(p)), c.slot, func(s span, slot uint8) (bool, error) {
		return true, c.readSlot(slot, p[s.from-off:s.to-off], s.from)
	})
}

func (c *chain) readSlot(slot uint8, p []byte, off int64) error {
	l := c.bySlot[slot]
	if l == nil {
		return c.lowest.readAt(p, off)
	}
	_, err := l.data.ReadAt(p, off)
	return err
}

// ReadCached fills p if all of it is in memory, and reports whether it did.
func (f *Files) ReadCached(p []byte, off int64) bool {
	if c := f.chain.Load(); c.where == nil {
		return c.top().data.ReadCached(p, off)
	}
	f.maps.RLock()
	defer f.maps.RUnlock()
	c := f.chain.Load()
	all := true
	_ = c.runs(f.geometry(), off, int64(len(p)), c.slot, func(s span, slot uint8) (bool, error) {
		part := p[s.from-off : s.to-off]
		if l := c.bySlot[slot]; l != nil {
			all = l.data.ReadCached(part, s.from)
		} else {
			all = c.lowest.readCached(part, s.from)
		}
		return all, nil
	})
	return all
}

// extentsStep is how much Extents looks at while it holds the lock, in bytes: who
// moves blocks waits for that, and a snapshot.
const extentsStep = 256 << 20

// Extents calls found for each stretch of the range, hole or data, until that
// returns false; it must not use f. Holes read as zeros.
func (f *Files) Extents(off, n int64, found func(n int64, hole bool) bool) error {
	if c := f.chain.Load(); c.where == nil {
		return fileExtents(c.top().data, off, n, found)
	}
	m := merger{found: found}
	for at, end := off, off+n; at < end && !m.over; at += extentsStep {
		if err := f.someExtents(at, min(extentsStep, end-at), &m); err != nil {
			return err
		}
	}
	m.end()
	return nil
}

func (f *Files) someExtents(off, n int64, m *merger) error {
	f.maps.RLock()
	defer f.maps.RUnlock()
	c := f.chain.Load()
	if c.where == nil {
		return fileExtents(c.top().data, off, n, m.add)
	}
	return f.extents(c, c.slot, off, n, m.add)
}

// merger makes one stretch of those of a kind that follow each other.
type merger struct {
	found func(n int64, hole bool) bool
	n     int64
	hole  bool
	over  bool // found said that it is enough
}

func (m *merger) add(n int64, hole bool) bool {
	if m.n > 0 && m.hole != hole {
		m.end()
	}
	m.n, m.hole = m.n+n, hole
	return !m.over
}

func (m *merger) end() {
	if m.n > 0 && !m.over {
		m.over = !m.found(m.n, m.hole)
	}
	m.n = 0
}

// extents finds stretches by where their blocks are.
func (f *Files) extents(c *chain, slot func(block int64) uint8, off, n int64, found func(n int64, hole bool) bool) error {
	return c.runs(f.geometry(), off, n, slot, func(s span, slot uint8) (bool, error) {
		more := true
		one := func(n int64, hole bool) bool {
			more = found(n, hole)
			return more
		}
		err := c.slotExtents(slot, s, one)
		return more, err
	})
}

func (c *chain) slotExtents(slot uint8, s span, found func(n int64, hole bool) bool) error {
	if l := c.bySlot[slot]; l != nil {
		return fileExtents(l.data, s.from, s.len(), found)
	}
	return c.lowest.extents(s.from, s.len(), found)
}

// HasData sets a bit for each grain of the range, as Changed does, that may hold
// anything but zeros.
func (f *Files) HasData(off, n, grain int64, bits []byte) error {
	return hasData(f.Extents, off, n, grain, bits)
}

func hasData(extents func(off, n int64, found func(n int64, hole bool) bool) error, off, n, grain int64, bits []byte) error {
	at := int64(0)
	return extents(off, n, func(n int64, hole bool) bool {
		for g := at / grain; !hole && g*grain < at+n; g++ {
			bits[g/8] |= 1 << (g % 8)
		}
		at += n
		return true
	})
}
