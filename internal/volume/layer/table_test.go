package layer_test

import (
	"errors"
	"math/rand/v2"
	"path"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
)

// regionsOf is enough for three pages of a table.
const (
	testRegion = 512
	regionsOf  = 1200
	tableFile  = "/v/1/layer-00000000.table"
)

func tabled(t interface{ Fatal(...any) }, fs layer.FS) *layer.Files {
	sb := someBlock()
	sb.RegionSize, sb.Size = testRegion, regionsOf*testRegion
	if err := layer.Create(fs, "/v/1", sb); err != nil {
		t.Fatal(err)
	}
	return reopened(t, fs)
}

func reopened(t interface{ Fatal(...any) }, fs layer.FS) *layer.Files {
	f, err := layer.Open(fs, "/v/1", "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// changed is whether each region was written since a generation.
func changed(f *layer.Files, since uint64) []bool {
	bits := make([]byte, regionsOf/8)
	f.Changed(since, 0, regionsOf*testRegion, testRegion, bits)
	is := make([]bool, regionsOf)
	for i := range is {
		is[i] = bits[i/8]&(1<<(i%8)) != 0
	}
	return is
}

// TestStampsSurvive stamps, loses power and fills the disk in any order. What
// was stamped stays so, and no region that was not is, unless power went while
// its page was written.
func TestStampsSurvive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fs := simfs.New(rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1)))
		f := tabled(t, fs)
		sure := make([]uint64, regionsOf)  // the stamp that it must have
		maybe := make([]uint64, regionsOf) // one that it may have: tried and failed
		generation := uint64(2)
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0:
				fs.Crash()
				f = reopened(t, fs)
			case 1:
				fs.Full = !fs.Full
			case 2:
				generation++
			default:
				first := rapid.IntRange(0, regionsOf-1).Draw(t, "first")
				n := min(rapid.SampledFrom([]int{1, 2, 600}).Draw(t, "n"), regionsOf-first)
				err := f.Zero(int64(first)*testRegion, int64(n)*testRegion, generation)
				for r := first; r < first+n; r++ {
					if err == nil {
						sure[r] = generation
					}
					maybe[r] = generation
				}
			}
			for since := range generation + 2 {
				for r, is := range changed(f, since) {
					if must := max(sure[r], 1) >= since; must && !is {
						t.Fatalf("region %d was stamped in generation %d, and counts as not changed since %d", r, sure[r], since)
					}
					if may := max(maybe[r], 1) >= since; !may && is && f.DamagedSectors() == 0 {
						t.Fatalf("region %d was stamped in generation %d at most, and counts as changed since %d", r, maybe[r], since)
					}
				}
			}
		}
	})
}

// TestDamagedTable: of a page that cannot be read, everything may have changed,
// and of others nothing more than before. Stamps after that hold again.
func TestDamagedTable(t *testing.T) {
	fs := simfs.New(rand.New(rand.NewPCG(1, 1)))
	f := tabled(t, fs)
	for range 2 { // both copies of both pages
		for _, r := range []int64{7, 700} {
			if err := f.Zero(r*testRegion, testRegion, f.Superblock().Generation+5); err != nil {
				t.Fatal(err)
			}
		}
	}
	file, err := fs.Open(path.Clean(tableFile), false)
	if err != nil {
		t.Fatal(err)
	}
	for slot := range int64(2) {
		if _, err := file.WriteAt([]byte{1}, slot*layer.BlockSize+100); err != nil {
			t.Fatal(err)
		}
	}
	f = reopened(t, fs)
	if f.DamagedSectors() != 1 {
		t.Errorf("%d damaged sectors, want 1", f.DamagedSectors())
	}
	const inSector = 50
	for r, is := range changed(f, 100) {
		if is != (r < inSector) {
			t.Fatalf("region %d counts as changed: %v", r, is)
		}
	}
	if is := changed(f, 6); !is[700] || is[701] {
		t.Error("another page was read wrong")
	}
	if err := f.Zero(800*testRegion, testRegion, 200); err != nil {
		t.Fatal(err)
	}
	if !changed(reopened(t, fs), 200)[800] {
		t.Error("a stamp after the damage was lost")
	}
}

// TestConcurrentStamps: many writers of one generation share few syncs;
// none is told that it may go on before its stamp is there.
func TestConcurrentStamps(t *testing.T) {
	dir := t.TempDir()
	sb := someBlock()
	sb.RegionSize, sb.Size = testRegion, regionsOf*testRegion
	if err := layer.Create(layer.OS{}, path.Join(dir, "v", "1"), sb); err != nil {
		t.Fatal(err)
	}
	f, err := layer.Open(layer.OS{}, path.Join(dir, "v", "1"), "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	errs := make(chan error, 32)
	for w := range 32 {
		go func() {
			var err error
			for r := w; r < regionsOf && err == nil; r += 32 {
				if err = f.Zero(int64(r)*testRegion, testRegion, 9); err == nil {
					bits := make([]byte, 1)
					if f.Changed(9, int64(r)*testRegion, testRegion, testRegion, bits); bits[0] != 1 {
						t.Errorf("region %d is not stamped", r)
					}
				}
			}
			errs <- err
		}()
	}
	for range 32 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

// cramped is a file system that has room for a part of what is written to tables.
type cramped struct {
	layer.FS
	full *bool
}

type crampedFile struct {
	layer.File
	full *bool
}

func (c cramped) Open(name string, create bool) (layer.File, error) {
	f, err := c.FS.Open(name, create)
	if err == nil && path.Ext(name) == ".table" {
		return crampedFile{f, c.full}, nil
	}
	return f, err
}

func (f crampedFile) WriteAt(p []byte, off int64) (int, error) {
	if !*f.full {
		return f.File.WriteAt(p, off)
	}
	n, err := f.File.WriteAt(p[:layer.BlockSize/4], off)
	return n, errors.Join(err, syscall.ENOSPC)
}

// A page that was written in part, and cannot be put back, is a failure: nothing
// would ever be certain again, however much room there is later.
func TestHalfAPage(t *testing.T) {
	full := false
	f := tabled(t, cramped{simfs.New(rand.New(rand.NewPCG(1, 1))), &full})
	full = true
	if err := f.Zero(0, testRegion, 5); err == nil || layer.IsFull(err) {
		t.Errorf("half a page: %v", err)
	}
	full = false
	if err := f.Zero(0, testRegion, 5); err == nil || layer.IsFull(err) {
		t.Errorf("after half a page: %v", err)
	}
}
