package layer_test

import (
	"bytes"
	"path"
	"path/filepath"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
)

// scattered is content with a page of data in each 64 KiB.
func scattered(n int) []byte {
	p := make([]byte, n)
	for at := 8192; at < n; at += 64 << 10 {
		copy(p[at:], bytes.Repeat([]byte{byte(at >> 16), 1}, 2048))
	}
	return p
}

// A thin write takes what its pages of data take, gives back what was there, and
// reads as what was written, whatever lies below.
func TestThinWrite(t *testing.T) {
	const size = 4 << 20
	must := orFatal(t)
	base := filepath.Join(t.TempDir(), "base")
	file, err := layer.OS{}.Open(base, true)
	must(err)
	_, err = file.WriteAt(bytes.Repeat([]byte("base"), size/4), 0)
	must(err)
	must(file.Close())
	for name, before := range map[string]func(*layer.Files) error{
		"nothing":    func(*layer.Files) error { return nil },
		"data":       func(f *layer.Files) error { return f.Write(bytes.Repeat([]byte("old"), size/3), 0, 2) },
		"a snapshot": func(f *layer.Files) error { return f.Snapshot(1, 2) },
	} {
		for _, based := range []bool{false, true} {
			dir := path.Join(t.TempDir(), "v", "1")
			sb := someBlock()
			if sb.Size = size; based {
				sb.Base, sb.BaseSize = layer.BaseRef{Image: "image"}, size
			}
			must(layer.Create(layer.OS{}, dir, sb))
			f, err := layer.Open(layer.OS{}, dir, "b", func(layer.BaseRef) (layer.Base, error) { return layer.OpenImage(layer.OS{}, base) })
			must(err)
			must(before(f))
			p := scattered(size)
			must(f.WriteThin(p, 0, 3))
			must(f.SyncData())
			read := make([]byte, size)
			must(f.ReadAt(read, 0))
			if !bytes.Equal(read, p) {
				t.Errorf("over %s, based %v: it reads as something else", name, based)
			}
			used, _, err := f.Usage()
			must(err)
			if most := uint64(layer.DataBytes(p, 0)) + 256<<10; used > most { // with tables and superblock
				t.Errorf("over %s, based %v: it takes %d bytes, want at most %d", name, based, used, most)
			}
			must(f.Close())
		}
	}
}

// A part of a page is zeros or not by itself.
func TestThinWriteWithinPages(t *testing.T) {
	f := openNew(t, layer.OS{}, 1<<20)
	must := orFatal(t)
	want := bytes.Repeat([]byte("x"), 16<<10)
	must(f.Write(want, 0, 2))
	p := make([]byte, 9<<10)
	p[len(p)-1] = 1
	must(f.WriteThin(p, 512, 2))
	copy(want[512:], p)
	read := make([]byte, len(want))
	must(f.ReadAt(read, 0))
	if !bytes.Equal(read, want) {
		t.Error("it reads as something else")
	}
	if got := layer.DataBytes(p, 512); got != 512+9<<10-8192 {
		t.Errorf("%d bytes are data", got)
	}
}
