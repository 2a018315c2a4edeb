package layer_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
)

var errStopped = errors.New("the process has ended")

// stopper is a file system whose process ends at one of its calls: of that, a
// write is carried out by half, and nothing after it.
type stopper struct {
	layer.FS
	left    int // calls until then; negative: never
	stopped bool
}

func (s *stopper) pass() error {
	s.stopped = s.stopped || s.left == 0
	if s.stopped {
		return errStopped
	}
	s.left--
	return nil
}

func (s *stopper) Open(name string, create bool) (layer.File, error) {
	if create {
		if err := s.pass(); err != nil {
			return nil, err
		}
	}
	f, err := s.FS.Open(name, create)
	if err != nil {
		return nil, err
	}
	return stopFile{f, s}, nil
}

func (s *stopper) RemoveAll(name string) error {
	if err := s.pass(); err != nil {
		return err
	}
	return s.FS.RemoveAll(name)
}

func (s *stopper) SyncDir(dir string) error {
	if err := s.pass(); err != nil {
		return err
	}
	return s.FS.SyncDir(dir)
}

type stopFile struct {
	layer.File
	s *stopper
}

func (f stopFile) WriteAt(p []byte, off int64) (int, error) {
	before := f.s.stopped
	if err := f.s.pass(); err != nil {
		half := len(p) / 2 / volume.SectorSize * volume.SectorSize
		if before || half == 0 {
			return 0, err
		}
		n, werr := f.File.WriteAt(p[:half], off)
		return n, errors.Join(err, werr)
	}
	return f.File.WriteAt(p, off)
}

func (f stopFile) Truncate(size int64) error {
	if err := f.s.pass(); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f stopFile) Sync() error {
	if err := f.s.pass(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f stopFile) Punch(off, n int64) error {
	if err := f.s.pass(); err != nil {
		return err
	}
	return f.File.Punch(off, n)
}

func (f stopFile) Share(from layer.File, off, n int64) bool {
	if other, ok := from.(stopFile); ok {
		from = other.File
	}
	return f.s.pass() == nil && f.File.Share(from, off, n)
}

// used is a volume with a past: two snapshots, one whose layer is to be tidied,
// some content that was flushed and some that was not.
func used(seed uint64, base int, reflinks bool) (*model, *stopper, error) {
	fs := simfs.New(rand.New(rand.NewPCG(seed, 7)))
	fs.Reflinks = reflinks
	m, err := newModel(fs, base, layer.Hooks{})
	if err != nil {
		return nil, nil, err
	}
	s := &stopper{FS: fs, left: -1}
	m.open = func() layer.FS { return s }
	err = errors.Join(
		m.reopen(),
		m.change(0, 40, false), m.change(100, 9, false), m.flush(), m.snapshot(),
		m.change(3, 30, false), m.change(50, 2, true), m.flush(), m.snapshot(),
		m.change(10, 60, false), m.change(33, 20, true), m.flush(), m.snapshot(),
		m.change(20, 7, false), m.flush(), m.change(64, 3, false), m.forget(2),
	)
	return m, s, err
}

// ending is what an operation may come to.
type ending struct {
	do func(*model) error
	// appears and vanishes are the snapshots that may be there afterwards, or not.
	appears, vanishes uint32
	// emptied: all may be gone.
	emptied bool
}

func endings() map[string]ending {
	untilDone := func(step func() error, more func() bool) error {
		for more() {
			if err := step(); err != nil {
				return err
			}
		}
		return nil
	}
	tidy := func(m *model) error { return untilDone(m.tidy, m.files.Untidy) }
	return map[string]ending{
		"write a part of blocks": {do: func(m *model) error { return m.change(1, 6, false) }},
		"write whole blocks":     {do: func(m *model) error { return m.change(32, 64, false) }},
		"zero":                   {do: func(m *model) error { return m.change(5, 70, true) }},
		"flush":                  {do: func(m *model) error { return m.files.SyncData() }},
		"snapshot":               {do: func(m *model) error { return m.snapshot() }, appears: 4},
		"snapshot, prepared":     {do: func(m *model) error { return errors.Join(m.files.Prepare(), m.snapshot()) }, appears: 4},
		"snapshot made anew":     {do: func(m *model) error { return m.files.Snapshot(1, m.generation) }, appears: 1, vanishes: 1},
		"forget":                 {do: func(m *model) error { return m.files.Forget(3) }, vanishes: 3},
		"tidy":                   {do: tidy},
		"tidy below what is written": {do: func(m *model) error {
			if err := m.files.Forget(3); err != nil {
				return err
			}
			return tidy(m)
		}, vanishes: 3},
		"detach": {do: func(m *model) error { return untilDone(m.detach, m.files.Based) }},
		"resize": {do: func(m *model) error { return m.files.Resize(modelSize + 50*volume.SectorSize) }},
		"revert": {do: func(m *model) error { return m.revert(1, 0, 90) }},
		"reset": {do: func(m *model) error {
			return m.files.Reset(func(sb *layer.Superblock) { sb.Generation = 99 })
		}, emptied: true},
	}
}

// TestEveryCrashPoint ends the process at each call of the file system in each
// operation, with and without the power. What is there afterwards is the old
// content or the new, of each sector; nothing that was flushed is lost; snapshots
// are what they were; and all goes on.
func TestEveryCrashPoint(t *testing.T) {
	for name, e := range endings() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			points := 0
			for stopped := true; stopped; points++ {
				stopped = false
				for _, base := range []int{0, 3 * modelRegion} {
					for _, power := range []bool{false, true} {
						hit, err := crashAt(e, points, uint64(points), base, power)
						if err != nil {
							t.Fatalf("at call %d, a base of %d, the power fails: %v: %v", points, base, power, err)
						}
						stopped = stopped || hit
					}
				}
			}
			t.Logf("%d calls", points-1)
		})
	}
}

func crashAt(e ending, point int, seed uint64, base int, power bool) (stopped bool, err error) {
	m, s, err := used(seed, base, seed%3 == 0)
	if err != nil {
		return false, err
	}
	if !power { // what was handed to the kernel stays
		m.settled()
	}
	before := m.volume.clone()
	s.left = point
	err = e.do(m)
	stopped = s.stopped
	s.left, s.stopped = -1, false
	if err != nil && !stopped {
		return false, err
	}
	if power {
		m.fs.Crash()
	}
	if err := m.reopen(); err != nil {
		return stopped, err
	}
	if err := m.resume(e, before); err != nil {
		return stopped, err
	}
	return stopped, m.goOn()
}

func (m *model) settled() {
	m.volume.flush()
	for _, s := range m.snapshots {
		s.flush()
	}
}

// resume takes over what is there, if it may be.
func (m *model) resume(e ending, before content) error {
	if e.emptied && m.files.Superblock().Generation == 99 {
		size := m.sectors()
		m.volume, m.snapshots = newContent(size), map[uint32]*snapshot{}
		return m.check()
	}
	there := map[uint32]bool{}
	for _, entry := range m.files.Snapshots() {
		id := entry.Snapshot
		there[id] = true
		if id == e.appears && (m.snapshots[id] == nil || entry.Generation == m.generation) {
			m.snapshots[id] = &snapshot{before.clone(), entry.Generation}
		}
		if m.snapshots[id] == nil {
			return fmt.Errorf("snapshot %d is there", id)
		}
		read, err := m.readSnapshot(id)
		if err == nil {
			err = m.snapshots[id].adopt(read)
		}
		if err != nil {
			return fmt.Errorf("snapshot %d: %w", id, err)
		}
	}
	for id := range m.snapshots {
		if !there[id] && id != e.vanishes && id != e.appears {
			return fmt.Errorf("snapshot %d is gone", id)
		}
		if !there[id] {
			delete(m.snapshots, id)
		}
	}
	if more := int(m.files.Size())/volume.SectorSize - m.sectors(); more > 0 {
		m.volume.grow(more)
	}
	read := make([]byte, m.sectors()*volume.SectorSize)
	if err := m.files.ReadAt(read, 0); err != nil {
		return err
	}
	if err := m.volume.adopt(read); err != nil {
		return err
	}
	return m.check()
}

// goOn uses what is left of everything.
func (m *model) goOn() error {
	m.nextID = 10
	m.generation++
	for _, do := range []func() error{
		func() error { return m.change(2, 50, false) }, m.snapshot, m.check,
		func() error { return m.change(30, 9, false) }, m.tidy, m.check, m.detach, m.check,
		m.tidy, m.tidy, m.detach, m.flush, m.powerCut, m.check,
	} {
		if err := do(); err != nil {
			return fmt.Errorf("going on: %w", err)
		}
	}
	return nil
}
