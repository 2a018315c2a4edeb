package layer_test

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
)

// TestTidyingShowsNowhere does the same to two volumes, of which one is tidied and
// detached at random times and the other never. They stay equal.
func TestTidyingShowsNowhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.SampledFrom([]int{0, 3 * modelRegion}).Draw(t, "base")
		var pair [2]*model
		for i := range pair {
			m, err := newModel(simfs.New(rand.New(rand.NewPCG(1, 1))), base, layer.Hooks{})
			if err != nil {
				t.Fatal(err)
			}
			pair[i] = m
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			first := rapid.IntRange(0, pair[0].sectors()-1).Draw(t, "first")
			n := min(rapid.SampledFrom([]int{1, 3, 40}).Draw(t, "n"), pair[0].sectors()-first)
			do := rapid.SampledFrom([]string{"write", "zero", "snapshot", "forget", "revert"}).Draw(t, "do")
			id := rapid.Uint32Range(1, pair[0].nextID+1).Draw(t, "id")
			for _, m := range pair {
				if err := m.same(do, first, n, id); err != nil {
					t.Fatal(err)
				}
			}
			for range rapid.IntRange(0, 3).Draw(t, "steps of tidying") {
				if err := pair[1].tidy(); err != nil {
					t.Fatal(err)
				}
				if err := pair[1].detach(); err != nil {
					t.Fatal(err)
				}
			}
			if diff := differs(pair); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

func (m *model) same(do string, first, n int, id uint32) error {
	switch {
	case do == "write" || do == "zero":
		return m.change(first, n, do == "zero")
	case do == "snapshot":
		return m.snapshot()
	case m.snapshots[id] == nil:
		return nil
	case do == "forget":
		return m.forget(id)
	}
	return m.revert(id, first, n)
}

func differs(pair [2]*model) string {
	size := pair[0].sectors() * 512
	a, b := make([]byte, size), make([]byte, size)
	if pair[0].files.ReadAt(a, 0) != nil || pair[1].files.ReadAt(b, 0) != nil {
		return "a read failed"
	}
	if !bytes.Equal(a, b) {
		return firstDifference(a, b)
	}
	for id := range pair[0].snapshots {
		a, aerr := pair[0].readSnapshot(id)
		b, berr := pair[1].readSnapshot(id)
		if aerr != nil || berr != nil || !bytes.Equal(a, b) {
			return "a snapshot differs, or cannot be read"
		}
	}
	return ""
}

// gate lets the syncs of data files wait.
type gate struct {
	layer.OS
	mu      sync.Mutex
	closed  chan struct{} // syncs wait until it is closed; nil: they do not
	waiting chan struct{} // gets one for each that waits
}

func (g *gate) Open(name string, create bool) (layer.File, error) {
	f, err := g.OS.Open(name, create)
	if err != nil || !strings.HasSuffix(name, ".data") {
		return f, err
	}
	return gated{f, g}, nil
}

type gated struct {
	layer.File
	g *gate
}

func (f gated) Sync() error {
	f.g.mu.Lock()
	closed := f.g.closed
	f.g.mu.Unlock()
	if closed != nil {
		f.g.waiting <- struct{}{}
		<-closed
	}
	return f.File.Sync()
}

// While tidying waits for the disk, others write and read; only who writes what
// is being moved waits.
func TestTidyingHoldsNobodyUp(t *testing.T) {
	g := &gate{waiting: make(chan struct{}, 1)}
	must := orFatal(t)
	f := openNew(t, g, 8<<20)
	write := func(b byte, off int64) {
		t.Helper()
		must(f.Write(bytes.Repeat([]byte{b}, 64<<10), off, 2))
	}
	write('a', 0)
	must(f.Snapshot(1, 3))
	write('b', 0)
	write('b', 1<<20)
	must(f.Forget(1))

	done := make(chan struct{})
	g.mu.Lock()
	g.closed = done
	g.mu.Unlock()
	tidied, wrote := make(chan error), make(chan error)
	go func() {
		_, err := f.MoveDown()
		tidied <- err
	}()
	<-g.waiting
	write('c', 4<<20) // where nothing is moved
	p := make([]byte, 64<<10)
	must(f.ReadAt(p, 0)) // and where something is
	if p[0] != 'b' || !f.ReadCached(p, 0) && p[0] != 'b' {
		t.Errorf("read %q", p[0])
	}
	if f.Ready(0, 4096, 2) || !f.Ready(4<<20, 4096, 2) {
		t.Error("what is ready to be written is not so, or the other way round")
	}
	go func() { wrote <- f.Write(bytes.Repeat([]byte{'d'}, 512), 512, 2) }()
	close(done)
	must(<-tidied)
	must(<-wrote)
	must(f.ReadAt(p, 0))
	if p[0] != 'b' || p[512] != 'd' {
		t.Errorf("afterwards: %q %q", p[0], p[512])
	}
}

// What is next to each other in several layers is one stretch.
func TestExtentsAcrossLayers(t *testing.T) {
	m, err := newModel(simfs.New(rand.New(rand.NewPCG(1, 1))), 0, layer.Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		if err := m.change(i*8, 8, false); err != nil {
			t.Fatal(err)
		}
		if err := m.snapshot(); err != nil {
			t.Fatal(err)
		}
	}
	v, err := m.files.View(4)
	if err != nil {
		t.Fatal(err)
	}
	for name, extents := range map[string]func(off, n int64, found func(n int64, hole bool) bool) error{"volume": m.files.Extents, "snapshot": v.Extents} {
		var list []int64
		err := extents(512, modelSize-512, func(n int64, hole bool) bool {
			if hole {
				n = -n
			}
			list = append(list, n)
			return true
		})
		if want := []int64{32*512 - 512, -(modelSize - 32*512)}; err != nil || !slices.Equal(list, want) {
			t.Errorf("%s: %v, %v, want %v", name, list, err, want)
		}
		calls := 0
		err = extents(0, modelSize, func(int64, bool) bool { calls++; return false })
		if err != nil || calls != 1 {
			t.Errorf("%s: %d calls after it was enough, %v", name, calls, err)
		}
	}
}
