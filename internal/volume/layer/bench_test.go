package layer_test

import (
	"math/rand/v2"
	"path"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
)

// BenchmarkFirstWrite writes 4 KiB to one block after the other, in random
// order, after a snapshot of a volume that was filled, and partly written again
// at random.
func BenchmarkFirstWrite(b *testing.B) {
	dir := path.Join(b.TempDir(), "v", "1")
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	const block, blocks = 64 << 10, 8192
	sb := someBlock()
	sb.RegionSize, sb.Size = layer.RegionSize, block*blocks
	must(layer.Create(layer.OS{}, dir, sb))
	f, err := layer.Open(layer.OS{}, dir, "b", nil)
	must(err)
	defer f.Close()
	must(f.Update(func(sb *layer.Superblock) { sb.Enter("b") }))
	p := make([]byte, layer.RegionSize)
	for i := range p {
		p[i] = byte(i)
	}
	for off := int64(0); off < block*blocks; off += layer.RegionSize {
		must(f.Write(p, off, 2))
	}
	must(f.SyncData())
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20000 {
		must(f.Write(p[:4096], rng.Int64N(block*blocks/4096)*4096, 2))
	}
	var order []int
	generation, id := uint64(2), uint32(0)
	b.SetBytes(block)
	for b.Loop() {
		if len(order) == 0 {
			order = rng.Perm(blocks)
			id++
			generation++
			must(f.Snapshot(id, generation))
		}
		must(f.Write(p[:4096], int64(order[0])*block+rng.Int64N(16)*4096, generation))
		order = order[1:]
	}
}
