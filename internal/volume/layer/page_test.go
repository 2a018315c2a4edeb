package layer

import (
	"bytes"
	"math"
	"path/filepath"
	"runtime"
	"testing"

	"pgregory.net/rapid"
)

func drawRows(t *rapid.T, n int) []row {
	rows := make([]row, n)
	for range rapid.IntRange(0, 20).Draw(t, "rows") {
		rows[rapid.IntRange(0, n-1).Draw(t, "row")] = row{stamp: rapid.Uint64().Draw(t, "stamp"), held: rapid.Uint16().Draw(t, "held")}
	}
	return rows
}

// A page is written over the older copy sector by sector; after any of them what
// is read is, for each sector, the old or the new. A flipped bit is noticed.
func TestPageOfATable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pair := make([]byte, pairSize)
		older, newer, got := drawRows(t, rowsPerPage), drawRows(t, rowsPerPage), make([]row, rowsPerPage)
		seq, page := rapid.Uint64Range(1, maxSequence-1).Draw(t, "sequence"), rapid.IntRange(0, 1<<20).Draw(t, "page")
		at := func(seq uint64) []byte { return pair[seq%2*BlockSize:][:BlockSize] }
		marshalPage(at(seq), page, sequence{number: seq}, older)
		written := make([]byte, BlockSize)
		marshalPage(written, page, sequence{number: seq + 1}, newer)
		want := append([]row(nil), older...)
		for s := range sectorsPerPage {
			if rapid.Bool().Draw(t, "this sector got there") {
				copy(at(seq + 1)[s*sectorSize:], written[s*sectorSize:(s+1)*sectorSize])
				copy(want[s*rowsPerSector:], newer[s*rowsPerSector:(s+1)*rowsPerSector])
			}
		}
		if is := parsePair(pair, page, math.MaxUint64, 0, got); is.damaged != 0 || !equalRows(got, want) {
			t.Fatalf("%d sectors are damaged, or the rows are not the old or the new", is.damaged)
		}
		if is := parsePair(pair, page, seq, 0, got); is.damaged != 0 || !equalRows(got, older) {
			t.Fatal("what is not certain was read")
		}
		off := int(seq%2)*BlockSize + rapid.IntRange(0, BlockSize-1).Draw(t, "byte")
		pair[off] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if is := parsePair(pair, page, math.MaxUint64, 0, got); is.damaged != 1 || got[off%BlockSize/sectorSize*rowsPerSector] != (row{Unknown, allHeld}) {
			t.Fatalf("%d sectors are damaged, want 1", is.damaged)
		}
	})
}

// A page that is provisional counts in its boot, and in no other.
func TestProvisionalPage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pair := make([]byte, pairSize)
		older, newer, got := drawRows(t, rowsPerPage), drawRows(t, rowsPerPage), make([]row, rowsPerPage)
		seq := rapid.Uint64Range(1, maxSequence-2).Draw(t, "sequence")
		boot := rapid.Uint64Range(1, maxBoot).Draw(t, "boot")
		other := rapid.Uint64Range(0, maxBoot).Filter(func(n uint64) bool { return n != boot }).Draw(t, "other boot")
		marshalPage(pair[seq%2*BlockSize:][:BlockSize], 7, sequence{number: seq}, older)
		marshalPage(pair[(seq+1)%2*BlockSize:][:BlockSize], 7, sequence{seq + 1, boot}, newer)
		if is := parsePair(pair, 7, math.MaxUint64, boot, got); is != (pairState{seq: seq + 1, provisional: true}) || !equalRows(got, newer) {
			t.Fatalf("in its boot: %+v", is)
		}
		if is := parsePair(pair, 7, math.MaxUint64, other, got); is != (pairState{seq: seq}) || !equalRows(got, older) {
			t.Fatalf("in another boot: %+v", is)
		}
	})
}

func equalRows(a, b []row) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// Where a page that lies in another's place is read, it counts as damaged.
func TestMisplacedPage(t *testing.T) {
	pair := make([]byte, pairSize)
	marshalPage(pair, 3, sequence{number: 2}, make([]row, rowsPerPage))
	if is := parsePair(pair, 4, math.MaxUint64, 0, make([]row, rowsPerPage)); is.damaged != sectorsPerPage {
		t.Errorf("%d sectors are damaged", is.damaged)
	}
}

func FuzzParsePair(f *testing.F) {
	pair := make([]byte, pairSize)
	marshalPage(pair, 0, sequence{number: 2}, make([]row, rowsPerPage))
	f.Add(pair, false)
	old := make([]byte, pairSize)
	marshalOldPage(old, 0, 2, make([]row, oldRowsPerPage))
	f.Add(old, true)
	f.Fuzz(func(t *testing.T, b []byte, old bool) {
		pair := make([]byte, pairSize)
		copy(pair, b)
		again := make([]byte, BlockSize)
		if old {
			rows := make([]row, oldRowsPerPage)
			if is := parseOldPair(pair, 0, math.MaxUint64, rows); is.seq > 0 && is.damaged > 0 {
				t.Error("a page that is whole is damaged")
			} else if is.seq > 0 {
				marshalOldPage(again, 0, is.seq, rows)
				if is := parseOldPair(append(again, make([]byte, BlockSize)...), 0, is.seq, rows); is.damaged > 0 {
					t.Error("what was read cannot be written")
				}
			}
			return
		}
		rows := make([]row, rowsPerPage)
		if is := parsePair(pair, 0, math.MaxUint64, 0, rows); is.damaged == 0 {
			marshalPage(again, 0, sequence{number: 1}, rows)
			got := make([]row, rowsPerPage)
			if is := parsePair(append(again, make([]byte, BlockSize)...), 0, 1, 0, got); is.damaged > 0 || !equalRows(got, rows) {
				t.Error("what was read cannot be written")
			}
		}
	})
}

func FuzzParseSum(f *testing.F) {
	f.Add(sumRecord{stamp: 7, sum: [16]byte{1}, length: 5}.marshal(3))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := parseSum(b, 3); ok && !bytes.Equal(s.marshal(3), b) {
			t.Errorf("%x was read as %+v", b, s)
		}
		if _, ok := parseSum(b, 4); ok {
			if _, too := parseSum(b, 3); too {
				t.Error("a record is of two regions")
			}
		}
	})
}

// A volume of 1 TiB takes at most 32 MiB of memory, with snapshots that are read.
func TestMemory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "v", "1")
	err := Create(OS{}, dir, Superblock{RegionSize: RegionSize, Size: 1 << 40, Generation: 1, Health: Good, Layers: []Entry{{}}})
	if err != nil {
		t.Fatal(err)
	}
	before := heap()
	f, err := Open(OS{}, dir, "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	single := heap() - before
	p := make([]byte, 4096)
	for id := range uint32(20) {
		if err := f.Write(p, int64(id)<<34, 2); err != nil {
			t.Fatal(err)
		}
		if err := f.Snapshot(id+1, uint64(id)+2); err != nil {
			t.Fatal(err)
		}
	}
	v, err := f.View(20)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < 1<<40; off += rowsPerPage * RegionSize {
		if err := v.ReadAt(p[:512], off); err != nil {
			t.Fatal(err)
		}
	}
	all := heap() - before
	runtime.KeepAlive(v)
	t.Logf("%d KiB alone, %d KiB with 20 snapshots of which one is read", single>>10, all>>10)
	if single > 9<<20 || all > 32<<20 || all < 24<<20 {
		t.Error("that is too much, or not what it should be made of")
	}
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
