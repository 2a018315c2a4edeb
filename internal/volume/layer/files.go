package layer

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"sync"
	"sync/atomic"
)

const superblockName = "superblock"

func dataName(layer uint32) string  { return fmt.Sprintf("layer-%08d.data", layer) }
func tableName(layer uint32) string { return fmt.Sprintf("layer-%08d.table", layer) }

// Files is one replica's directory, open.
//
// Snapshot, Forget, Resize, DropLayer, DropBase, Reset and Close exclude
// everything else but views, which the caller sees to; Snapshot does not exclude
// MoveDown. The rest may be called concurrently; Write, Zero and Revert on ranges
// that do not overlap.
type Files struct {
	fs    FS
	dir   string
	boot  string // its id
	block File
	hooks Hooks

	mu sync.Mutex                 // who changes sb
	sb atomic.Pointer[Superblock] // what it points to never changes

	// chain changes only while maps is locked. Who looks up where a block is
	// and then uses that, holds maps shared.
	maps    sync.RWMutex
	chain   atomic.Pointer[chain]
	version uint64 // grows when blocks move or the chain changes; guarded by maps
	moving  atomic.Pointer[moving]
	// damaged is how many sectors of tables could not be read, lost whether
	// blocks can therefore not be found any more.
	damaged int
	lost    bool

	commit committer
	// tidying and detaching are how far MoveDown and CopyDown have come.
	tidying, detaching cursor

	summing sync.Mutex
	// sums is nil until it is needed; zerosSum is of so many zeros. Guarded by
	// summing.
	sums     File
	zeros    int64
	zerosSum [32]byte
	frozen   snapshotSums

	preparing sync.Mutex
	prepared  *prepared // guarded by preparing
	views     sync.Mutex
	view      *View // the one that ReadSnapshot used last; guarded by views
}

// Hooks break what durability depends on. For tests only.
type Hooks struct {
	LazyStamps     bool // stamps are not durable before their data
	HoldBeforeData bool // a block counts as held before its content is durable
	ForgetSettle   bool // a flush leaves pages of tables provisional
	StampLater     bool // a stamp may be provisional where blocks are written in place
	ForgetCopyUp   bool // a block counts as held without the rest of its content
	ForgetFrozen   bool // what was written before a snapshot is not flushed after it
	MoveUnsynced   bool // a block leaves its layer before it is durable in the one below
	StaleSums      bool // a record counts when what it is of was written since
}

// Break switches rules off. For tests only.
func (f *Files) Break(h Hooks) {
	f.hooks = h
	for _, l := range f.chain.Load().layers {
		l.table.hooks = h
	}
}

// Create makes a replica's directory: whole or not at all, under its final
// name. It has one layer, of number 0, in which nothing was written.
func Create(fs FS, dir string, sb Superblock) error {
	tmp := path.Join(path.Dir(dir), ".new-"+path.Base(dir))
	if err := fs.RemoveAll(tmp); err != nil {
		return fmt.Errorf("remove what was left of %s: %w", tmp, err)
	}
	sb.Layers = []Entry{{}}
	if err := create(fs, tmp, sb); err != nil {
		return errors.Join(err, fs.RemoveAll(tmp))
	}
	if err := fs.Rename(tmp, dir); err != nil {
		return errors.Join(fmt.Errorf("name %s: %w", dir, err), fs.RemoveAll(tmp))
	}
	return syncAbove(fs, dir)
}

// syncAbove makes a directory survive a power cut. Those above may be as new.
func syncAbove(fs FS, dir string) error {
	for range 3 {
		dir = path.Dir(dir)
		if err := fs.SyncDir(dir); err != nil {
			return fmt.Errorf("sync %s: %w", dir, err)
		}
	}
	return nil
}

func create(fs FS, dir string, sb Superblock) error {
	if err := fs.MkdirAll(dir); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	l, err := emptyLayer(fs, dir, 0, sb, nil)
	if err != nil {
		return err
	}
	if err := l.close(); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	block, err := fs.Open(path.Join(dir, superblockName), true)
	if err != nil {
		return err
	}
	f := &Files{fs: fs, dir: dir, block: block}
	f.sb.Store(&sb)
	// Twice: then both copies have their room on the disk, however full it
	// gets later.
	err = errors.Join(f.write(sb), f.Update(func(*Superblock) {}))
	if err = errors.Join(err, block.Close()); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	return fs.SyncDir(dir)
}

// emptyLayer makes a layer's files, durably, in which nothing was written.
func emptyLayer(fs FS, dir string, number uint32, sb Superblock, boot func() uint64) (*stratum, error) {
	data, err := emptyFile(fs, path.Join(dir, dataName(number)), int64(sb.Size))
	if err != nil {
		return nil, err
	}
	t := newTable(nil, data, regions(sb.Size, sb.RegionSize), false, boot)
	if t.file, err = emptyFile(fs, path.Join(dir, tableName(number)), t.fileSize()); err != nil {
		return nil, errors.Join(err, data.Close())
	}
	l := &stratum{data: data, table: t}
	if err := fs.SyncDir(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("sync %s: %w", dir, err), l.close())
	}
	return l, nil
}

// emptyFile makes a file of zeros.
func emptyFile(fs FS, name string, size int64) (File, error) {
	f, err := fs.Open(name, true)
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	if err := errors.Join(f.Truncate(0), f.Truncate(size), f.Sync()); err != nil {
		return nil, errors.Join(fmt.Errorf("make %s: %w", name, err), f.Close())
	}
	return f, nil
}

// Open opens a replica's directory. A data file that is shorter than it should
// be is an error: something else cut it. bases finds a base when it is first
// read; nil if there can be none. bootID names the kernel's boot: what an earlier
// process wrote in it, and the kernel still has, counts; the caller should have
// the superblock Enter it.
func Open(fs FS, dir, bootID string, bases func(BaseRef) (Base, error)) (*Files, error) {
	block, err := fs.Open(path.Join(dir, superblockName), false)
	if err != nil {
		return nil, fmt.Errorf("open replica: %w", err)
	}
	f := &Files{fs: fs, dir: dir, boot: bootID, block: block}
	sb, err := readSuperblock(block)
	if err == nil && (sb.RegionSize == 0 || sb.RegionSize%sectorSize != 0) {
		err = fmt.Errorf("a region size of %d: %w", sb.RegionSize, ErrNoSuperblock)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open replica %s: %w", dir, err), block.Close())
	}
	f.sb.Store(&sb)
	low := &lowest{ref: sb.Base, size: int64(sb.BaseSize), open: bases}
	if err := f.openLayers(sb, low); err != nil {
		return nil, errors.Join(fmt.Errorf("open replica %s: %w", dir, err), f.Close())
	}
	if err := errors.Join(f.removeOld(), syncAbove(fs, dir)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openLayers reads the layers' tables, and puts together what they say.
func (f *Files) openLayers(sb Superblock, low *lowest) error {
	var layers []*stratum
	var slots []uint8
	var err error
	for i, e := range sb.Layers {
		var l *stratum
		if l, err = f.openLayer(sb, e); err != nil {
			break
		}
		layers = append(layers, l)
		slots = append(slots, uint8(i))
	}
	based := sb.Base != BaseRef{}
	for i := range slots {
		if based {
			slots[i]++
		}
	}
	g := newGeometry(sb.Size, sb.RegionSize)
	c := newChainOf(layers, slots, low, sb, g)
	f.chain.Store(c)
	for i := 0; err == nil && i < len(layers); i++ {
		err = f.loadLayer(c, i, g)
	}
	return err
}

// newChainOf is a chain that says nothing of its blocks yet.
func newChainOf(layers []*stratum, slots []uint8, low *lowest, sb Superblock, g geometry) *chain {
	if len(layers) == 0 { // none could be opened
		return &chain{lowest: low}
	}
	var where []atomic.Uint64
	if len(layers) > 1 || sb.Base != (BaseRef{}) {
		where = make([]atomic.Uint64, g.words())
	}
	return newChain(slices.Clone(sb.Layers[:len(layers)]), layers, slots, low, make([]atomic.Uint64, g.regions()), where)
}

func (f *Files) openLayer(sb Superblock, e Entry) (*stratum, error) {
	data, err := f.fs.Open(path.Join(f.dir, dataName(e.Number)), false)
	if err != nil {
		return nil, err
	}
	file, err := f.fs.Open(path.Join(f.dir, tableName(e.Number)), false)
	if err != nil {
		return nil, errors.Join(err, data.Close())
	}
	l := &stratum{data: data, table: newTable(file, data, regions(sb.Size, sb.RegionSize), e.OldTable, f.bootNumber)}
	last := make([]byte, 1)
	if _, err := data.ReadAt(last, int64(sb.Size)-1); err != nil {
		return nil, errors.Join(fmt.Errorf("the data file of layer %d is not %d bytes long: %w", e.Number, sb.Size, err), l.close())
	}
	if _, err := file.ReadAt(last, l.table.fileSize()-1); err != nil {
		return nil, errors.Join(fmt.Errorf("the table of layer %d is not %d bytes long: %w", e.Number, l.table.fileSize(), err), l.close())
	}
	// What an earlier process wrote may be in the kernel's memory only.
	l.dirty.Store(true)
	return l, nil
}

// loadLayer adds what a layer's table says. What an earlier process wrote of it
// may be in the kernel's memory only, and counts from now on.
func (f *Files) loadLayer(c *chain, i int, g geometry) error {
	if err := syncFile(c.layers[i].table.file, "a table"); err != nil {
		return err
	}
	damaged, err := c.layers[i].table.load(func(region int, r row) {
		c.stamp(region, r.stamp)
		if c.where == nil || c.holdsAll(i) {
			return
		}
		for b := range g.perRegion() {
			if r.held&(1<<b) != 0 {
				block := int64(region)*g.perRegion() + b
				c.set(block, c.slots[i])
			}
		}
	})
	f.damaged += damaged
	f.lost = f.lost || damaged > 0 && !c.holdsAll(i)
	return err
}

// bootNumber is the number of this boot; 0 as long as the superblock does not say
// that the replica was opened in it.
func (f *Files) bootNumber() uint64 {
	sb := f.sb.Load()
	if sb.BootID != f.boot {
		return 0
	}
	return uint64(sb.Boots) & maxBoot
}

// DamagedSectors is how many sectors of tables were damaged when they were
// opened. Their regions count as changed at any time.
func (f *Files) DamagedSectors() int { return f.damaged }

// Lost tells whether such a sector said which blocks a layer holds: what this
// replica has then is not the volume's content.
func (f *Files) Lost() bool { return f.lost }

// removeOld deletes the files of layers that are none, or no more.
func (f *Files) removeOld() error {
	names, err := f.fs.ReadDir(f.dir)
	if err != nil {
		return fmt.Errorf("open replica %s: %w", f.dir, err)
	}
	keep := map[string]bool{superblockName: true, sumsName: true}
	for _, e := range f.sb.Load().Layers {
		keep[dataName(e.Number)], keep[tableName(e.Number)] = true, true
		keep[snapshotSumsName(e.Snapshot)] = e.Snapshot != 0
	}
	for _, n := range names {
		if !keep[n] {
			if err := f.fs.RemoveAll(path.Join(f.dir, n)); err != nil {
				return fmt.Errorf("open replica %s: %w", f.dir, err)
			}
		}
	}
	return nil
}

func readSuperblock(block File) (Superblock, error) {
	var best Superblock
	found := false
	var newer error
	for i := range int64(2) {
		b := make([]byte, BlockSize)
		if _, err := block.ReadAt(b, i*BlockSize); err != nil {
			continue // the second copy is not there before the first change
		}
		sb, err := Parse(b)
		switch {
		case errors.Is(err, ErrNewerFormat):
			newer = err
		case err == nil && (!found || sb.Sequence > best.Sequence):
			best, found = sb, true
		}
	}
	if newer != nil {
		return best, newer
	}
	if !found {
		return best, ErrNoSuperblock
	}
	return best, nil
}

// Superblock is what is on disk.
func (f *Files) Superblock() Superblock { return *f.sb.Load() }

// Size is the volume's, in bytes.
func (f *Files) Size() int64 { return int64(f.sb.Load().Size) }

func (f *Files) geometry() geometry {
	sb := f.sb.Load()
	return newGeometry(sb.Size, sb.RegionSize)
}

// Update changes the superblock; when it returns the change survives a power
// cut. When it fails either state may be found later.
func (f *Files) Update(change func(*Superblock)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	sb := *f.sb.Load()
	sb.Layers = slices.Clone(sb.Layers)
	change(&sb)
	sb.Sequence++
	if err := f.write(sb); err != nil {
		return fmt.Errorf("replica %s: write the superblock: %w", f.dir, err)
	}
	f.sb.Store(&sb)
	return nil
}

// write writes the copy that is not the newest, so that one is always whole.
func (f *Files) write(sb Superblock) error {
	b, err := sb.Marshal()
	if err != nil {
		return err
	}
	if _, err := f.block.WriteAt(b, int64(sb.Sequence%2)*BlockSize); err != nil {
		return err
	}
	return f.block.Sync()
}

// replace makes a new chain the one that counts.
func (f *Files) replace(c *chain) {
	f.maps.Lock()
	defer f.maps.Unlock()
	f.version++
	f.chain.Store(c)
}

// Reset begins a new, empty layer without a base, and changes the superblock with
// it; the old files are not touched any more: after a failed fsync nothing says
// what of them is on disk.
func (f *Files) Reset(change func(*Superblock)) error {
	f.unprepare()
	next := f.Superblock()
	change(&next)
	number := f.nextNumber()
	l, err := emptyLayer(f.fs, f.dir, number, next, f.bootNumber)
	if err != nil {
		return fmt.Errorf("replica %s: begin a new layer: %w", f.dir, err)
	}
	entries := []Entry{{Number: number}}
	err = f.Update(func(sb *Superblock) {
		change(sb)
		sb.Layers, sb.Base, sb.BaseSize = entries, BaseRef{}, 0
	})
	if err != nil {
		return errors.Join(fmt.Errorf("replica %s: begin a new layer: %w", f.dir, err), l.close())
	}
	old := f.chain.Load()
	g := newGeometry(next.Size, next.RegionSize)
	l.table.hooks = f.hooks
	f.replace(newChain(entries, []*stratum{l}, []uint8{0}, &lowest{}, make([]atomic.Uint64, g.regions()), nil))
	for _, l := range old.layers {
		_ = l.close() // nobody reads it any more
	}
	f.damaged, f.lost, f.tidying, f.detaching = 0, false, cursor{}, cursor{}
	// The sums are of what was before.
	err = errors.Join(f.closeSums(), f.closeSnapshotSums(), f.fs.RemoveAll(path.Join(f.dir, sumsName)))
	return errors.Join(err, old.lowest.close(), f.removeOld())
}

// nextNumber is one that no layer has.
func (f *Files) nextNumber() uint32 {
	var highest uint32
	for _, e := range f.sb.Load().Layers {
		highest = max(highest, e.Number)
	}
	return highest + 1
}

// Changed sets a bit for each grain of the range, both in bytes, that was
// written in the generation since or later; the lowest bit of the first byte is
// the first grain.
func (f *Files) Changed(since uint64, off, n, grain int64, bits []byte) {
	stamps := f.chain.Load().stamps
	changed(f.geometry(), f.sb.Load().Generation, since, off, n, grain, bits, func(r int) uint64 { return stamps[r].Load() })
}

func changed(g geometry, generation, since uint64, off, n, grain int64, bits []byte, stamp func(region int) uint64) {
	for i := int64(0); i*grain < n; i++ {
		from, to := off+i*grain, min(off+(i+1)*grain, off+n, g.size)
		if from >= to {
			return
		}
		for r := from / g.region; r*g.region < to; r++ {
			if max(stamp(int(r)), generation) >= since {
				bits[i/8] |= 1 << (i % 8)
			}
		}
	}
}

// SyncData makes everything that was written survive a power cut.
func (f *Files) SyncData() error {
	c := f.chain.Load()
	for i, l := range c.layers {
		frozen := i < c.target
		if frozen && (!l.dirty.Load() || f.hooks.ForgetFrozen) {
			continue
		}
		if err := l.data.Sync(); err != nil {
			return err
		}
		// What came meanwhile is little, but whoever brings blocks up waits for it.
		if err := l.table.settle(); err != nil {
			return err
		}
		if frozen { // nobody writes it any more
			l.dirty.Store(false)
		}
	}
	return nil
}

// Free is how much room the file system has.
func (f *Files) Free() (uint64, error) { return f.fs.Free(f.dir) }

// Close closes the files; it writes nothing.
func (f *Files) Close() error {
	f.unprepare()
	err := f.block.Close()
	for _, l := range f.chain.Load().layers {
		err = errors.Join(err, l.close())
	}
	return errors.Join(err, f.closeSums(), f.closeSnapshotSums(), f.chain.Load().lowest.close())
}
