package layer_test

import (
	"bytes"
	"math/rand/v2"
	"path"
	"runtime"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
)

// A layer that was the lowest of the newest group has stamps of regions of which it
// holds nothing: they are of what was written in place above it. They outlive it.
func TestTidyingKeepsStamps(t *testing.T) {
	m, err := newModel(simfs.New(rand.New(rand.NewPCG(1, 1))), 0, layer.Hooks{})
	must := orFatal(t)
	must(err)
	const inRegion2 = 2 * modelRegion / volume.SectorSize
	must(m.snapshot())
	must(m.change(0, 1, false))
	must(m.snapshot())
	must(m.change(inRegion2, 1, false))
	must(m.forget(2))
	m.generation++
	must(m.change(inRegion2, 1, false))
	must(m.forget(1))
	for m.files.Untidy() {
		must(m.tidy())
	}
	if n := len(m.files.Superblock().Layers); n != 1 {
		t.Fatalf("%d layers are left", n)
	}
	must(m.files.Close())
	must(m.reopen())
	must(m.check())
}

// watched tells what is done to data files.
type watched struct {
	layer.OS
	// before is told of each read and each look for data, and may hold it up;
	// after of each range that was given back.
	before, after func(file string, off int64)
}

func (w watched) Open(name string, create bool) (layer.File, error) {
	f, err := w.OS.Open(name, create)
	if err != nil || !strings.HasSuffix(name, ".data") {
		return f, err
	}
	return watchedFile{f, w, path.Base(name)}, nil
}

type watchedFile struct {
	layer.File
	w    watched
	name string
}

func (f watchedFile) ReadAt(p []byte, off int64) (int, error) {
	f.w.before(f.name, off)
	return f.File.ReadAt(p, off)
}

func (f watchedFile) NextData(off int64) (start, end int64, ok bool, err error) {
	f.w.before(f.name, off)
	return f.File.NextData(off)
}

func (f watchedFile) Punch(off, n int64) error {
	err := f.File.Punch(off, n)
	f.w.after(f.name, off)
	return err
}

// awaitStack returns when a goroutine is in both functions.
func awaitStack(inner, outer string) {
	buf := make([]byte, 1<<20)
	for {
		for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(stack, inner) && strings.Contains(stack, outer) {
				return
			}
		}
		runtime.Gosched()
	}
}

// A block that is about to be copied up may be tidied away from where it was found:
// then it is copied from where it is.
func TestTidyingBeforeACopyUp(t *testing.T) {
	const elsewhere = 4 << 20
	var held, release, punched chan struct{} // nil: nothing waits
	w := watched{
		before: func(file string, off int64) {
			switch {
			case held == nil:
			case off == elsewhere && file == "layer-00000000.data":
				close(held)
				<-release
			case file == "layer-00000002.data" && isClosed(release):
				<-punched
			}
		},
		after: func(file string, off int64) {
			if file == "layer-00000002.data" && punched != nil {
				close(punched)
			}
		},
	}
	must := orFatal(t)
	f := openNew(t, w, 8<<20)
	block := bytes.Repeat([]byte{'x'}, 64<<10)
	for id := range uint32(3) {
		if id == 2 {
			must(f.Write(block, 0, uint64(id)+2)) // in the layer that is tidied
		}
		must(f.Snapshot(id+1, uint64(id)+3))
	}
	must(f.Forget(2))

	held, release, punched = make(chan struct{}), make(chan struct{}), make(chan struct{})
	read, tidied, wrote := make(chan error), make(chan error), make(chan error)
	go func() { read <- f.ReadAt(make([]byte, 512), elsewhere) }()
	<-held
	go func() {
		_, err := f.MoveDown()
		tidied <- err
	}()
	awaitStack("sync.(*RWMutex).Lock(", "(*Files).moved(") // it has copied, and waits for the reader
	go func() { wrote <- f.Write(block[:512], 512, 9) }()
	awaitStack("sync.(*RWMutex).RLock(", "(*batch).copyUp(")
	close(release)
	must(<-read)
	must(<-tidied)
	must(<-wrote)
	got := make([]byte, len(block))
	must(f.ReadAt(got, 0))
	if !bytes.Equal(got, block) {
		t.Error("a part of the block was lost")
	}
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Whoever looks for holes in a large volume gives a snapshot its turn.
func TestExtentsHoldNobodyUp(t *testing.T) {
	var held, release chan struct{}
	var f *layer.Files
	var seen error
	w := watched{
		before: func(_ string, off int64) {
			switch {
			case held == nil:
			case !isClosed(held):
				close(held)
				<-release
			case off > 512<<20:
				_, seen = f.View(2)
				held = nil
			}
		},
		after: func(string, int64) {},
	}
	must := orFatal(t)
	f = openNew(t, w, 1<<30)
	block := bytes.Repeat([]byte{'x'}, 64<<10)
	must(f.Write(block, 0, 2))
	must(f.Write(block, 640<<20, 2))
	must(f.Snapshot(1, 3))
	must(f.Write(block, 512<<20, 3))
	held, release = make(chan struct{}), make(chan struct{})
	looked, taken := make(chan error), make(chan error)
	var data int64
	go func() {
		looked <- f.Extents(0, 1<<30, func(n int64, hole bool) bool {
			if !hole {
				data += n
			}
			return true
		})
	}()
	<-held
	go func() { taken <- f.Snapshot(2, 4) }()
	awaitStack("sync.(*RWMutex).Lock(", "(*Files).replace(")
	close(release)
	must(<-looked)
	must(<-taken)
	must(seen)
	if want := int64(3 * len(block)); data != want {
		t.Errorf("%d bytes of data, want %d", data, want)
	}
}

// Who adds up what the layers take holds nobody up: a snapshot, for which all
// writes wait, would wait for that.
func TestUsageHoldsNobodyUp(t *testing.T) {
	var held, release chan struct{}
	w := watched{
		before: func(string, int64) {
			if held != nil && !isClosed(held) {
				close(held)
				<-release
			}
		},
		after: func(string, int64) {},
	}
	dir := path.Join(t.TempDir(), "v", "1")
	must := orFatal(t)
	must(layer.Create(layer.OS{}, dir, someBlock()))
	f, err := layer.Open(w, dir, "b", nil)
	must(err)
	defer f.Close()
	block := bytes.Repeat([]byte{'x'}, 64<<10)
	must(f.Write(block, 0, 2))
	must(f.Snapshot(1, 3))
	must(f.Write(block, 0, 3))
	held, release = make(chan struct{}), make(chan struct{})
	usage := make(chan uint64)
	go func() {
		_, snapshots, err := f.Usage()
		if err != nil {
			t.Error(err)
		}
		usage <- snapshots
	}()
	<-held
	must(f.Snapshot(2, 4))
	close(release)
	if got := <-usage; got != uint64(len(block)) {
		t.Errorf("the snapshot takes %d bytes", got)
	}
}
