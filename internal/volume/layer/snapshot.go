package layer

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
)

// MaxSnapshots is how many a replica keeps.
const MaxSnapshots = 100

// ErrTooMany: there are as many snapshots, or layers, as can be.
var ErrTooMany = errors.New("no more layers can be begun before others were deleted")

// prepared is a layer whose files were made before it is needed.
type prepared struct {
	number uint32
	layer  *stratum
}

// Prepare makes the next layer's files, durably, so that Snapshot has to write
// the superblock only. ErrTooMany as Snapshot would say it.
func (f *Files) Prepare() error {
	f.preparing.Lock()
	defer f.preparing.Unlock()
	c := f.chain.Load()
	if _, err := f.nextSlot(c, c.entries); err != nil {
		return err
	}
	return f.prepare1()
}

// nextSlot is the slot of another layer, if there may be one.
func (f *Files) nextSlot(c *chain, entries []Entry) (uint8, error) {
	named := 0
	for _, e := range entries {
		if e.Snapshot != 0 {
			named++
		}
	}
	slot, err := c.freeSlot()
	if err != nil || named >= MaxSnapshots {
		return 0, fmt.Errorf("replica %s: %d snapshots in %d layers: %w", f.dir, named, len(entries), ErrTooMany)
	}
	return slot, nil
}

func (f *Files) prepare1() error {
	if f.prepared != nil {
		return nil
	}
	sb, number := f.Superblock(), f.nextNumber()
	l, err := emptyLayer(f.fs, f.dir, number, sb, f.bootNumber)
	if err != nil {
		return fmt.Errorf("replica %s: prepare a new layer: %w", f.dir, err)
	}
	l.table.hooks = f.hooks
	f.prepared = &prepared{number: number, layer: l}
	return nil
}

// unprepare forgets the files; the next Prepare makes them anew.
func (f *Files) unprepare() {
	f.preparing.Lock()
	defer f.preparing.Unlock()
	if f.prepared != nil {
		_ = f.prepared.layer.close()
		f.prepared = nil
	}
}

// Snapshot keeps the content as it is under an id, and begins a new layer. If
// that was done and nothing was written since, it does nothing; an older
// snapshot of the id loses its name.
func (f *Files) Snapshot(id uint32, generation uint64) error {
	f.preparing.Lock()
	defer f.preparing.Unlock()
	c := f.chain.Load()
	if done, err := c.justMade(id); done || err != nil {
		return err
	}
	entries := slices.Clone(c.entries)
	for i := range entries {
		if entries[i].Snapshot == id {
			entries[i].Snapshot = 0
		}
	}
	slot, err := f.nextSlot(c, entries)
	if err != nil {
		return err
	}
	if err := f.prepare1(); err != nil {
		return err
	}
	next := f.prepared
	last := &entries[len(entries)-1]
	last.Snapshot, last.Generation, last.Size = id, generation, f.sb.Load().Size
	entries = append(entries, Entry{Number: next.number})
	if err := f.Update(func(sb *Superblock) { sb.Layers = entries }); err != nil {
		return err
	}
	f.prepared = nil
	for _, l := range c.layers[c.target:] {
		l.dirty.Store(true)
	}
	where := c.where
	if where == nil {
		where = make([]atomic.Uint64, f.geometry().words())
	}
	f.replace(newChain(entries, append(slices.Clone(c.layers), next.layer), append(slices.Clone(c.slots), slot), c.lowest, c.stamps, where))
	return nil
}

// justMade tells whether the newest snapshot has the id, and nothing was written
// since.
func (c *chain) justMade(id uint32) (bool, error) {
	n := len(c.entries)
	if n < 2 || c.entries[n-2].Snapshot != id {
		return false, nil
	}
	return c.top().table.holdsNothing()
}

// Snapshots are the layers that are snapshots' newest, oldest first.
func (f *Files) Snapshots() []Entry {
	return slices.DeleteFunc(slices.Clone(f.sb.Load().Layers), func(e Entry) bool { return e.Snapshot == 0 })
}

// Forget takes a snapshot's name off. Tidy then makes one layer of the two that
// it kept apart.
func (f *Files) Forget(id uint32) error {
	c := f.chain.Load()
	i := c.snapshot(id)
	if i < 0 {
		return nil
	}
	// From now on blocks are written in place of which only the stamps may be
	// provisional.
	if err := c.settle(); err != nil {
		return fmt.Errorf("replica %s: %w", f.dir, err)
	}
	entries := slices.Clone(c.entries)
	entries[i].Snapshot = 0
	if err := f.Update(func(sb *Superblock) { sb.Layers = entries }); err != nil {
		return err
	}
	f.replace(newChain(entries, c.layers, c.slots, c.lowest, c.stamps, c.where))
	// What stays of it the next opening deletes.
	_ = f.removeSnapshotSums(id)
	return nil
}

// Resize makes the volume larger; the new space reads as zeros.
func (f *Files) Resize(size int64) error {
	g := newGeometry(uint64(size), f.sb.Load().RegionSize)
	if size <= f.Size() {
		return nil
	}
	f.unprepare()
	if err := f.closeSums(); err != nil { // it is to be longer
		return fmt.Errorf("replica %s: %w", f.dir, err)
	}
	c := f.chain.Load()
	for _, l := range c.layers {
		err := l.data.Truncate(size)
		if err == nil {
			err = syncFile(l.data, "the longer data file")
		}
		if err == nil {
			err = l.table.resize(g.regions())
		}
		if err != nil {
			return fmt.Errorf("replica %s: grow to %d bytes: %w", f.dir, size, err)
		}
	}
	if err := f.Update(func(sb *Superblock) { sb.Size = uint64(size) }); err != nil {
		return err
	}
	var where []atomic.Uint64
	if c.where != nil {
		where = grown(c.where, g.words())
	}
	f.detaching = cursor{} // the new space is to be held, too
	f.replace(newChain(c.entries, c.layers, c.slots, c.lowest, grown(c.stamps, g.regions()), where))
	return nil
}

func grown(old []atomic.Uint64, n int) []atomic.Uint64 {
	list := make([]atomic.Uint64, n)
	for i := range old {
		list[i].Store(old[i].Load())
	}
	return list
}
