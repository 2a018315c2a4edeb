package layer

import (
	"errors"
	"fmt"
	"path"
	"sync"
	"sync/atomic"
)

const superblockName = "superblock"

func dataName(layer uint64) string  { return fmt.Sprintf("layer-%08d.data", layer) }
func tableName(layer uint64) string { return fmt.Sprintf("layer-%08d.table", layer) }

// Files is one replica's directory, open. ReadAt, Stamp, WriteAt, Punch,
// Changed and SyncData may be called concurrently; Update and Reset exclude
// everything else, which the caller sees to.
type Files struct {
	fs    FS
	dir   string
	block File
	data  File
	table *table
	// damaged is how many pages of the table could not be read.
	damaged int

	mu sync.Mutex                 // who changes sb
	sb atomic.Pointer[Superblock] // what it points to never changes
}

// Create makes a replica's directory: whole or not at all, under its final
// name. base, if not empty, is a file whose content it begins with.
func Create(fs FS, dir string, sb Superblock, base string) error {
	tmp := path.Join(path.Dir(dir), ".new-"+path.Base(dir))
	if err := fs.RemoveAll(tmp); err != nil {
		return fmt.Errorf("remove what was left of %s: %w", tmp, err)
	}
	if err := create(fs, tmp, sb, base); err != nil {
		return errors.Join(err, fs.RemoveAll(tmp))
	}
	if err := fs.Rename(tmp, dir); err != nil {
		return errors.Join(fmt.Errorf("name %s: %w", dir, err), fs.RemoveAll(tmp))
	}
	// The directories above may be as new.
	volume := path.Dir(dir)
	return syncDirs(fs, volume, path.Dir(volume), path.Dir(path.Dir(volume)))
}

func create(fs FS, dir string, sb Superblock, base string) error {
	if err := fs.MkdirAll(dir); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	name := path.Join(dir, dataName(sb.Layer))
	if base != "" {
		if err := fs.Clone(base, name); err != nil {
			return err
		}
	}
	data, err := fs.Open(name, true)
	if err != nil {
		return err
	}
	err = errors.Join(data.Truncate(int64(sb.Size)), data.Sync(), data.Close())
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	stamps, err := createTable(fs, dir, sb)
	if err != nil {
		return err
	}
	if err := stamps.Close(); err != nil {
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

// createTable makes the table's file of a layer in which nothing was written.
func createTable(fs FS, dir string, sb Superblock) (File, error) {
	name := path.Join(dir, tableName(sb.Layer))
	f, err := fs.Open(name, true)
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	if err := errors.Join(f.Truncate(0), f.Truncate(tableSize(regions(sb.Size, sb.RegionSize))), f.Sync()); err != nil {
		return nil, errors.Join(fmt.Errorf("make %s: %w", name, err), f.Close())
	}
	return f, nil
}

func syncDirs(fs FS, dirs ...string) error {
	for _, d := range dirs {
		if err := fs.SyncDir(d); err != nil {
			return fmt.Errorf("sync %s: %w", d, err)
		}
	}
	return nil
}

// Open opens a replica's directory. A data file that is shorter than it should
// be is an error: something else cut it.
func Open(fs FS, dir string) (*Files, error) {
	block, err := fs.Open(path.Join(dir, superblockName), false)
	if err != nil {
		return nil, fmt.Errorf("open replica: %w", err)
	}
	f := &Files{fs: fs, dir: dir, block: block}
	sb, err := readSuperblock(block)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open replica %s: %w", dir, err), block.Close())
	}
	f.sb.Store(&sb)
	if sb.RegionSize == 0 {
		return nil, errors.Join(fmt.Errorf("open replica %s: a region size of 0: %w", dir, ErrNoSuperblock), block.Close())
	}
	if f.data, err = fs.Open(path.Join(dir, dataName(sb.Layer)), false); err != nil {
		return nil, errors.Join(fmt.Errorf("open replica: %w", err), block.Close())
	}
	last := make([]byte, 1)
	if _, err := f.data.ReadAt(last, int64(sb.Size)-1); err != nil {
		return nil, errors.Join(fmt.Errorf("open replica %s: its data file is not %d bytes long: %w", dir, sb.Size, err), f.Close())
	}
	stamps, err := fs.Open(path.Join(dir, tableName(sb.Layer)), false)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open replica: %w", err), f.Close())
	}
	if f.table, f.damaged, err = loadTable(stamps, regions(sb.Size, sb.RegionSize)); err != nil {
		return nil, errors.Join(fmt.Errorf("open replica %s: %w", dir, err), stamps.Close(), f.Close())
	}
	return f, f.removeOld()
}

// DamagedPages is how many pages of the table were damaged when it was opened.
// Their regions count as changed at any time.
func (f *Files) DamagedPages() int { return f.damaged }

// removeOld deletes the files of before a Reset that was cut short.
func (f *Files) removeOld() error {
	names, err := f.fs.ReadDir(f.dir)
	if err != nil {
		return fmt.Errorf("open replica %s: %w", f.dir, err)
	}
	layer := f.sb.Load().Layer
	for _, n := range names {
		if n != superblockName && n != dataName(layer) && n != tableName(layer) {
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

// Update changes the superblock; when it returns the change survives a power
// cut. When it fails either state may be found later.
func (f *Files) Update(change func(*Superblock)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	sb := *f.sb.Load()
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

// Reset begins a new, empty layer and changes the superblock with it; the old
// files are not touched any more: after a failed fsync nothing says what of
// them is on disk.
func (f *Files) Reset(change func(*Superblock)) error {
	next := f.Superblock()
	next.Layer++
	data, stamps, err := f.emptyLayer(next)
	if err != nil {
		return fmt.Errorf("replica %s: begin a new layer: %w", f.dir, err)
	}
	if err = f.Update(func(sb *Superblock) { sb.Layer = next.Layer; change(sb) }); err != nil {
		return errors.Join(fmt.Errorf("replica %s: begin a new layer: %w", f.dir, err), data.Close(), stamps.Close())
	}
	_ = f.closeLayer() // nobody reads it any more
	f.data, f.table, f.damaged = data, newTable(stamps, regions(next.Size, next.RegionSize)), 0
	return f.removeOld()
}

func (f *Files) emptyLayer(sb Superblock) (data, stamps File, err error) {
	if data, err = f.fs.Open(path.Join(f.dir, dataName(sb.Layer)), true); err != nil {
		return nil, nil, err
	}
	if err := errors.Join(data.Truncate(0), data.Truncate(int64(sb.Size)), data.Sync()); err != nil {
		return nil, nil, errors.Join(err, data.Close())
	}
	if stamps, err = createTable(f.fs, f.dir, sb); err != nil {
		return nil, nil, errors.Join(err, data.Close())
	}
	if err := f.fs.SyncDir(f.dir); err != nil {
		return nil, nil, errors.Join(err, data.Close(), stamps.Close())
	}
	return data, stamps, nil
}

// ReadAt fills p from the data.
func (f *Files) ReadAt(p []byte, off int64) error {
	_, err := f.data.ReadAt(p, off)
	return err
}

// ReadCached fills p if all of it is in memory, and reports whether it did.
func (f *Files) ReadCached(p []byte, off int64) bool { return f.data.ReadCached(p, off) }

// Stamp notes, durably, that the range is written in a generation. It comes
// before the write.
func (f *Files) Stamp(off, n int64, generation uint64) error {
	if n == 0 {
		return nil
	}
	if f.Stamped(off, n, generation) {
		return nil
	}
	size := int64(f.sb.Load().RegionSize)
	if err := f.table.stamp(int(off/size), int((off+n-1)/size), generation); err != nil {
		return fmt.Errorf("replica %s: stamp %d bytes at %d: %w", f.dir, n, off, err)
	}
	return nil
}

// Stamped tells whether Stamp would have nothing to do. The range is not empty.
func (f *Files) Stamped(off, n int64, generation uint64) bool {
	sb := f.sb.Load()
	size := int64(sb.RegionSize)
	return generation <= sb.Generation || f.table.has(int(off/size), int((off+n-1)/size), generation)
}

// Changed sets a bit for each grain of the range, both in bytes, that was
// written in the generation since or later; the lowest bit of the first byte is
// the first grain.
func (f *Files) Changed(since uint64, off, n, grain int64, bits []byte) {
	sb := f.sb.Load()
	size := int64(sb.RegionSize)
	for g := int64(0); g*grain < n; g++ {
		from, to := off+g*grain, min(off+(g+1)*grain, off+n, int64(sb.Size))
		if from >= to {
			return
		}
		for r := from / size; r*size < to; r++ {
			if max(f.table.stamps[r].Load(), sb.Generation) >= since {
				bits[g/8] |= 1 << (g % 8)
			}
		}
	}
}

// Extents calls found for each stretch of the range, hole or data, until that
// returns false. Holes read as zeros.
func (f *Files) Extents(off, n int64, found func(n int64, hole bool) bool) error {
	for at := off; at < off+n; {
		start, end, ok, err := f.data.NextData(at)
		if err != nil {
			return fmt.Errorf("replica %s: look for data: %w", f.dir, err)
		}
		if !ok {
			start, end = off+n, off+n
		}
		start, end = min(start, off+n), min(end, off+n)
		if start > at && !found(start-at, true) || end > start && !found(end-start, false) {
			return nil
		}
		at = end
	}
	return nil
}

// HasData sets a bit for each grain of the range, as Changed does, that may hold
// anything but zeros.
func (f *Files) HasData(off, n, grain int64, bits []byte) error {
	at := int64(0)
	return f.Extents(off, n, func(n int64, hole bool) bool {
		for g := at / grain; !hole && g*grain < at+n; g++ {
			bits[g/8] |= 1 << (g % 8)
		}
		at += n
		return true
	})
}

// LazyStamps stops stamps from being synced. For tests only.
func (f *Files) LazyStamps() { f.table.lazy = true }

// WriteAt hands p to the kernel.
func (f *Files) WriteAt(p []byte, off int64) error {
	_, err := f.data.WriteAt(p, off)
	return err
}

// Punch makes a range read as zeros and gives its space back.
func (f *Files) Punch(off, n int64) error { return f.data.Punch(off, n) }

// SyncData makes everything that was written survive a power cut.
func (f *Files) SyncData() error { return f.data.Sync() }

// Free is how much room the file system has.
func (f *Files) Free() (uint64, error) { return f.fs.Free(f.dir) }

// Close closes the files; it writes nothing.
func (f *Files) Close() error { return errors.Join(f.block.Close(), f.closeLayer()) }

func (f *Files) closeLayer() error {
	var err error
	if f.data != nil {
		err = f.data.Close()
	}
	if f.table != nil {
		err = errors.Join(err, f.table.file.Close())
	}
	return err
}
