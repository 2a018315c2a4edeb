package soak

import "fmt"

// Picture is what a snapshot may hold: what the cells held at one instant of
// the time that it took.
type Picture struct {
	ledger *Ledger
	cells  [][]*mark // of each cell, oldest first
}

// Expose begins a picture; Close ends it.
func (l *Ledger) Expose() *Picture {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &Picture{ledger: l, cells: make([][]*mark, len(l.cells))}
	for i := range l.cells {
		c := &l.cells[i]
		from := c.oldest()
		if from < 0 {
			p.cells[i] = append(p.cells[i], c.flushed)
		}
		p.cells[i] = append(p.cells[i], c.later[max(from, 0):]...)
	}
	l.open = append(l.open, p)
	return p
}

// Close says that what is begun from now on is not on the picture.
func (p *Picture) Close() {
	l := p.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, other := range l.open {
		if other == p {
			l.open = append(l.open[:i], l.open[i+1:]...)
			return
		}
	}
}

// Restore notes that the volume may be what is on the picture again; sure: it is.
func (p *Picture) Restore(sure bool) {
	l := p.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acks++
	for i := range l.cells {
		c := &l.cells[i]
		var may []*mark
		if from := c.oldest(); !sure {
			if from < 0 {
				may = append(may, c.flushed)
			}
			may = append(may, c.later[max(from, 0):]...)
		}
		may = append(may, p.cells[i]...)
		c.flushed, c.later = may[0], nil
		for _, m := range may[1:] { // each may be there or not
			c.later = append(c.later, &mark{number: m.number, zeros: m.zeros, since: l.acks})
		}
	}
}

// Check tells what is wrong with what a snapshot holds.
func (p *Picture) Check(data []byte) error {
	l := p.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := make([]int, len(p.cells)) // which of its marks each cell holds
	var since uint64                  // what was acknowledged by then is there
	for i, marks := range p.cells {
		b := data[i*CellSize : (i+1)*CellSize]
		at, zeros := -1, 0
		for k, m := range marks {
			if l.holds(b, i, m) {
				at = k
			}
			if m.zeros {
				zeros++
			}
		}
		if at < 0 {
			return fmt.Errorf("snapshot: cell %d holds %s; it may hold %v", i, l.describe(b), marks)
		}
		seen[i] = at
		if m := marks[at]; !m.zeros || zeros == 1 { // else nobody knows which it is
			since = max(since, m.since)
		}
	}
	for i, marks := range p.cells {
		for _, m := range marks[seen[i]+1:] {
			if m.ack > 0 && m.ack <= since {
				return fmt.Errorf("snapshot: cell %d holds %v without %v, which was acknowledged before something was begun that is there", i, marks[seen[i]], m)
			}
		}
	}
	return nil
}

// Size is how many bytes Check wants.
func (p *Picture) Size() int { return len(p.cells) * CellSize }
