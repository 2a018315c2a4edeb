package layer_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
)

// oldReplica writes a replica of the first format, byte by byte: 600 regions, of
// which 5 and 550 were written in generation 4.
func oldReplica(t *testing.T) (dir string, size int64) {
	t.Helper()
	dir, size = t.TempDir(), 600*4096
	sum := func(b []byte) {
		binary.LittleEndian.PutUint32(b[4092:], crc32.Checksum(b[:4092], crc32.MakeTable(crc32.Castagnoli)))
	}
	block := make([]byte, 4096)
	copy(block, "ARGONSB1")
	for off, v := range map[int]uint64{16: 2, 96: uint64(size), 104: 7, 112: 3, 120: 1, 168: 1, 176: 2} {
		binary.LittleEndian.PutUint64(block[off:], v)
	}
	block[8], block[92] = 1, 1
	binary.LittleEndian.PutUint32(block[12:], 4096)
	copy(block[24:], "c")
	copy(block[56:], "v")
	sum(block)
	table := make([]byte, 4*4096)
	for i, r := range []int{5, 550} {
		page := table[i*8192+4096:][:4096] // sequence 1
		copy(page, "ARGONTB1")
		binary.LittleEndian.PutUint64(page[8:], uint64(i))
		binary.LittleEndian.PutUint64(page[16:], 1)
		binary.LittleEndian.PutUint64(page[32+8*(r-507*i):], 4)
		sum(page)
	}
	data := make([]byte, size)
	copy(data[5*4096:], "five")
	copy(data[550*4096:], "more")
	for name, b := range map[string][]byte{"superblock": append(block, make([]byte, 4096)...), "layer-00000002.data": data, "layer-00000002.table": table} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, size
}

// A replica that was made before there were layers goes on, and gets them.
func TestOldReplica(t *testing.T) {
	dir, size := oldReplica(t)
	reopen := func() *layer.Files {
		t.Helper()
		f, err := layer.Open(layer.OS{}, dir, "b", nil)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	must := orFatal(t)
	at := func(read func(p []byte, off int64) error, region int) string {
		t.Helper()
		p := make([]byte, 4)
		must(read(p, int64(region)*4096))
		return string(p)
	}
	changed := func(f *layer.Files, since uint64) (regions []int) {
		bits := make([]byte, 75)
		f.Changed(since, 0, size, 4096, bits)
		for r := range 600 {
			if bits[r/8]&(1<<(r%8)) != 0 {
				regions = append(regions, r)
			}
		}
		return regions
	}
	f := reopen()
	if got := changed(f, 4); len(got) != 2 || got[0] != 5 || got[1] != 550 || at(f.ReadAt, 550) != "more" {
		t.Errorf("written in generation 4: %v; %q", got, at(f.ReadAt, 550))
	}
	must(f.Write(bytes.Repeat([]byte("x"), 512), 6*4096, 5))
	must(f.Snapshot(1, 6))
	must(f.Write(bytes.Repeat([]byte("y"), 512), 5*4096, 6))
	must(f.SyncData())
	must(f.Close())
	b, err := os.ReadFile(filepath.Join(dir, "superblock"))
	must(err)
	if b[4096+8] != 2 { // sequence 3
		t.Errorf("format %d after a change", b[4096+8])
	}
	f = reopen()
	v, err := f.View(1)
	must(err)
	if at(f.ReadAt, 5) != "yyyy" || at(v.ReadAt, 5) != "five" || at(f.ReadAt, 6) != "xxxx" {
		t.Error("the snapshot or the volume is not what it was")
	}
	must(f.Forget(1))
	for f.Untidy() {
		drained, err := f.MoveDown()
		must(err)
		if drained {
			must(f.DropLayer())
		}
	}
	must(f.Close())
	f = reopen()
	if got := changed(f, 5); len(got) != 2 || got[0] != 5 || got[1] != 6 || at(f.ReadAt, 5) != "yyyy" || at(f.ReadAt, 550) != "more" {
		t.Errorf("after tidying, since generation 5: %v; %q, %q", got, at(f.ReadAt, 5), at(f.ReadAt, 550))
	}
	must(f.Close())
}
