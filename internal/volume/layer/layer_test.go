package layer_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
)

// orFatal returns what ends a test on an error.
func orFatal(t testing.TB) func(error) {
	return func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// openNew makes a replica's files of a size in bytes, and opens them through fs.
func openNew(t *testing.T, fs layer.FS, size uint64) *layer.Files {
	t.Helper()
	must := orFatal(t)
	dir := path.Join(t.TempDir(), "v", "1")
	sb := someBlock()
	sb.Size = size
	must(layer.Create(layer.OS{}, dir, sb))
	f, err := layer.Open(fs, dir, "b", nil)
	must(err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func someBlock() layer.Superblock {
	return layer.Superblock{
		Sequence: 1, ClusterID: "c", VolumeID: "v", ReplicaID: 2, RegionSize: layer.RegionSize,
		Size: 1 << 20, Incarnation: 1, Generation: 1, Health: layer.Good, Clean: true, BootID: "b", Layers: []layer.Entry{{}},
	}
}

func TestSuperblockRoundTrip(t *testing.T) {
	id := rapid.StringMatching(`[0-9A-Z]{0,32}`)
	rapid.Check(t, func(t *rapid.T) {
		s := layer.Superblock{
			Sequence: rapid.Uint64().Draw(t, "sequence"), ClusterID: id.Draw(t, "cluster"), VolumeID: id.Draw(t, "volume"),
			ReplicaID: rapid.Uint32().Draw(t, "replica"), RegionSize: rapid.Uint32().Draw(t, "region"),
			Size: rapid.Uint64().Draw(t, "size"), SealedEpoch: rapid.Uint64().Draw(t, "epoch"),
			Incarnation: rapid.Uint64().Draw(t, "incarnation"), Generation: rapid.Uint64().Draw(t, "generation"),
			Health: layer.Health(rapid.IntRange(1, 3).Draw(t, "health")), Clean: rapid.Bool().Draw(t, "clean"),
			BootID: id.Draw(t, "boot"), Layers: drawLayers(t),
			BaseSize: rapid.Uint64().Draw(t, "base size"),
		}
		s.Base = layer.BaseRef{Image: id.Draw(t, "image"), Volume: id.Draw(t, "base volume"), Snapshot: rapid.Uint32().Draw(t, "base snapshot")}
		b, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := layer.Parse(b); err != nil || !reflect.DeepEqual(got, s) {
			t.Fatalf("%+v came back as %+v, %v", s, got, err)
		}
		b[rapid.IntRange(0, layer.BlockSize-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if _, err := layer.Parse(b); !errors.Is(err, layer.ErrNoSuperblock) {
			t.Fatalf("a flipped bit went unnoticed: %v", err)
		}
	})
}

func drawLayers(t *rapid.T) []layer.Entry {
	list := make([]layer.Entry, rapid.IntRange(1, layer.MaxLayers).Draw(t, "layers"))
	for i := range list {
		list[i] = layer.Entry{Number: uint32(i) * 3, Generation: rapid.Uint64().Draw(t, "made"), Size: rapid.Uint64().Draw(t, "size then")}
		if i < len(list)-1 && rapid.Bool().Draw(t, "is a snapshot") {
			list[i].Snapshot = uint32(i) + 1
		}
	}
	return list
}

// docs/volumes.md says where each field is; so does this.
func TestSuperblockOffsets(t *testing.T) {
	s := someBlock()
	s.Sequence, s.Size, s.SealedEpoch, s.Incarnation, s.Generation = 0x11, 0x22, 0x33, 0x44, 0x55
	s.Layers = []layer.Entry{{Number: 0x66, Snapshot: 0x77, Generation: 0x88, Size: 0x99}, {Number: 0x67}}
	s.Base, s.BaseSize = layer.BaseRef{Image: "i", Volume: "w", Snapshot: 0xaa}, 0xbb
	b, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for off, want := range map[int]uint64{16: 0x11, 96: 0x22, 104: 0x33, 112: 0x44, 120: 0x55, 168: 2, 240: 0xaa, 248: 0xbb, 256: 0x77<<32 | 0x66, 264: 0x88, 272: 0x99, 284: 0x67} {
		if got := binary.LittleEndian.Uint64(b[off:]); got != want {
			t.Errorf("at %d: %#x, want %#x", off, got, want)
		}
	}
	if string(b[:8]) != "ARGONSB1" || b[8] != 2 || b[24] != 'c' || b[56] != 'v' || b[88] != 2 || b[92] != 1 || b[93] != 1 || b[128] != 'b' || b[176] != 'i' || b[208] != 'w' {
		t.Errorf("a field is not where it was: %x", b[:320])
	}
}

func TestNewerFormatIsLeftAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "v", "1")
	if err := layer.Create(layer.OS{}, dir, someBlock()); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "superblock")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block := b[:layer.BlockSize]
	binary.LittleEndian.PutUint32(block[8:], 99)
	sum := crc32.Checksum(block[:layer.BlockSize-4], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(block[layer.BlockSize-4:], sum)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := layer.Open(layer.OS{}, dir, "b", nil); !errors.Is(err, layer.ErrNewerFormat) {
		t.Errorf("got %v", err)
	}
	if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, b) {
		t.Error("it was changed")
	}
}

func FuzzParse(f *testing.F) {
	b, _ := someBlock().Marshal()
	f.Add(b)
	f.Add(make([]byte, layer.BlockSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := layer.Parse(b); err == nil && (s.Health < layer.Good || s.Health > layer.Failed) {
			t.Errorf("%+v", s)
		}
	})
}

// Whatever a power cut leaves of a change of the superblock, the one before it
// or the new one is found, and never anything else.
func TestSuperblockSurvivesPowerCuts(t *testing.T) {
	small := someBlock()
	small.Size = 4096 // a crash copies the whole file
	for seed := range uint64(300) {
		fs := simfs.New(rand.New(rand.NewPCG(seed, 1)))
		if err := layer.Create(fs, "/r/v/1", small); err != nil {
			t.Fatal(err)
		}
		var epoch uint64
		for range 20 {
			f, err := layer.Open(fs, "/r/v/1", "b", nil)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if got := f.Superblock().SealedEpoch; got != epoch && got != epoch+1 {
				t.Fatalf("seed %d: epoch %d after %d", seed, got, epoch)
			}
			epoch = f.Superblock().SealedEpoch + 1
			// A sync that fails leaves the change to chance.
			fs.FailSync = seed%2 == 0
			if err := f.Update(func(s *layer.Superblock) { s.SealedEpoch = epoch }); err != nil {
				epoch--
			}
			fs.FailSync = false
			fs.Crash()
		}
	}
}

func TestDataOnARealDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "v", "1")
	base := filepath.Join(t.TempDir(), "base")
	content := bytes.Repeat([]byte("base"), 1024)
	if err := os.WriteFile(base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	sb := someBlock()
	sb.Base, sb.BaseSize = layer.BaseRef{Image: "image"}, sb.Size
	if err := layer.Create(layer.OS{}, dir, sb); err != nil {
		t.Fatal(err)
	}
	f, err := layer.Open(layer.OS{}, dir, "b", func(layer.BaseRef) (layer.Base, error) { return layer.OpenImage(layer.OS{}, base) })
	if err != nil {
		t.Fatal(err)
	}
	read := func(off int64, n int) []byte {
		t.Helper()
		b := make([]byte, n)
		if err := f.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		return b
	}
	if !bytes.Equal(read(0, len(content)), content) || !bytes.Equal(read(4096, 4096), make([]byte, 4096)) {
		t.Error("it does not begin with its base and then zeros")
	}
	if err := f.Write(bytes.Repeat([]byte("x"), 512<<10), 0, 2); err != nil {
		t.Fatal(err)
	}
	used := blocks(t, dir)
	if err := f.Zero(0, 512<<10, 2); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(0, 8192), make([]byte, 8192)) {
		t.Error("a hole reads as something")
	}
	if err := f.SyncData(); err != nil {
		t.Fatal(err)
	}
	if now := blocks(t, dir); now >= used {
		t.Errorf("%d blocks are used, %d were", now, used)
	}
	// A new file for a new copy; the old one is gone.
	if err := f.Write([]byte("old"), 0, 2); err != nil {
		t.Fatal(err)
	}
	if err := f.Reset(func(s *layer.Superblock) { s.Health = layer.Syncing }); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(0, 512), make([]byte, 512)) || f.Superblock().Health != layer.Syncing {
		t.Error("after Reset it is not empty, or does not say so")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) != 3 {
		t.Errorf("%v, %v", names, err)
	}
	// A data file that something else cut is not trusted.
	if err := os.Truncate(filepath.Join(dir, fmt.Sprintf("layer-%08d.data", 1)), 1000); err != nil {
		t.Fatal(err)
	}
	if _, err := layer.Open(layer.OS{}, dir, "b", nil); err == nil {
		t.Error("a data file that is too short was opened")
	}
}

func blocks(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "layer-00000000.data"), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}
