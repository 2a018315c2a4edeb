package replica_test

import (
	"bytes"
	"errors"
	"log/slog"
	"math/rand/v2"
	"testing"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// disk is a server's disk with its store of replicas.
type disk struct {
	t       *testing.T
	fs      *simfs.FS
	boot    string
	reserve uint64
	store   *replica.Store
}

func newDisk(t *testing.T) *disk {
	t.Helper()
	d := &disk{t: t, fs: simfs.New(rand.New(rand.NewPCG(1, 2))), boot: "first"}
	d.open()
	if _, err := d.store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *disk) open() {
	d.t.Helper()
	var err error
	d.store, err = replica.Open(replica.Options{FS: d.fs, Dir: "/volumes", ClusterID: "c", BootID: d.boot, ReserveBytes: d.reserve, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		d.t.Fatal(err)
	}
}

// powerCut loses what was not synced, and boots again.
func (d *disk) powerCut() {
	d.t.Helper()
	d.fs.Crash()
	d.boot += "'"
	d.open()
}

// restart ends the process only.
func (d *disk) restart() {
	d.t.Helper()
	if err := d.store.Close(); err != nil {
		d.t.Fatal(err)
	}
	d.open()
}

func (d *disk) seal(epoch uint64) (*replica.Session, replica.Info) {
	d.t.Helper()
	r, err := d.store.Get("v", 1)
	if err != nil {
		d.t.Fatal(err)
	}
	s, info, err := r.Seal(epoch)
	if err != nil {
		d.t.Fatal(err)
	}
	return s, info
}

func (d *disk) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

var sector = bytes.Repeat([]byte("s"), 512)

// I4: what was sealed stays sealed, through a power cut too, and ends every
// older session.
func TestSealing(t *testing.T) {
	d := newDisk(t)
	old, _ := d.seal(3)
	d.must(old.WriteAt(sector, 0, 1, false))
	again, _ := d.seal(3)
	if err := old.WriteAt(sector, 0, 1, false); !errors.Is(err, replica.ErrFenced) {
		t.Errorf("a session that was replaced in its epoch: %v", err)
	}
	newer, _ := d.seal(5)
	for name, err := range map[string]error{
		"write": again.WriteAt(sector, 0, 1, false), "read": again.ReadAt(make([]byte, 512), 0), "flush": again.Flush(),
		"zero": again.Zero(0, 512, 1, false), "end of a copy": again.EndSync(),
	} {
		if !errors.Is(err, replica.ErrFenced) {
			t.Errorf("%s of an older epoch: %v", name, err)
		}
	}
	if _, err := again.BeginSync(0, 2, 0); !errors.Is(err, replica.ErrFenced) {
		t.Errorf("a copy of an older epoch: %v", err)
	}
	d.must(newer.Flush())
	d.powerCut()
	r, err := d.store.Get("v", 1)
	d.must(err)
	_, _, err = r.Seal(4)
	if sealed := (*replica.SealedError)(nil); !errors.As(err, &sealed) || sealed.Epoch != 5 {
		t.Errorf("an older epoch after a power cut: %v", err)
	}
	d.seal(5)
}

// I7: only what may have lost something has another incarnation.
func TestIncarnation(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(*disk, *replica.Session)
		same bool
	}{
		{"the process restarts", func(d *disk, _ *replica.Session) { d.restart() }, true},
		{"the power fails", func(d *disk, _ *replica.Session) { d.powerCut() }, false},
		{"the power fails after a flush", func(d *disk, s *replica.Session) {
			// What came after the flush may be lost all the same.
			d.must(s.Flush())
			d.powerCut()
		}, false},
		{"it is closed clean, then the power fails", func(d *disk, s *replica.Session) {
			d.must(s.Close(true))
			d.powerCut()
		}, true},
		{"it is closed unclean, then the power fails", func(d *disk, s *replica.Session) {
			d.must(s.Close(false))
			d.powerCut()
		}, false},
		{"sealed only, then the power fails", func(d *disk, s *replica.Session) {
			d.must(s.Close(true))
			d.seal(2)
			d.powerCut()
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDisk(t)
			s, before := d.seal(1)
			d.must(s.WriteAt(sector, 0, 1, false))
			tt.do(d, s)
			if _, after := d.seal(9); (after.Incarnation == before.Incarnation) != tt.same {
				t.Errorf("incarnation %d, then %d", before.Incarnation, after.Incarnation)
			}
		})
	}
}

// I8: a replica whose disk failed is not used until it was copied to anew, not
// even after a restart.
func TestFailedDisk(t *testing.T) {
	for name, fail := range map[string]func(*disk, *replica.Session) error{
		"write": func(d *disk, s *replica.Session) error { d.fs.FailWrite = true; return s.WriteAt(sector, 0, 1, false) },
		"sync":  func(d *disk, s *replica.Session) error { d.fs.FailSync = true; return s.Flush() },
		"fua":   func(d *disk, s *replica.Session) error { d.fs.FailSync = true; return s.WriteAt(sector, 0, 1, true) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			s, _ := d.seal(1)
			d.must(s.WriteAt(sector, 512, 1, false))
			if err := fail(d, s); !errors.Is(err, replica.ErrFailed) {
				t.Fatalf("got %v", err)
			}
			d.fs.FailWrite, d.fs.FailSync = false, false
			if err := s.Flush(); !errors.Is(err, replica.ErrFailed) {
				t.Errorf("a flush after it: %v", err)
			}
			d.restart()
			s, info := d.seal(2)
			if info.Health != layer.Failed {
				t.Errorf("health %v after a restart", info.Health)
			}
			if err := s.ReadAt(make([]byte, 512), 0); !errors.Is(err, replica.ErrFailed) {
				t.Errorf("a read: %v", err)
			}
			info, err := s.BeginSync(0, 2, 0)
			d.must(err)
			if info.Health != layer.Syncing {
				t.Errorf("health %v while it is copied to", info.Health)
			}
			d.must(s.WriteAt(sector, 0, 1, false))
			d.must(s.EndSync())
			d.powerCut()
			if _, info = d.seal(3); info.Health != layer.Good {
				t.Errorf("health %v after the copy", info.Health)
			}
		})
	}
}

// A full disk costs nothing but time.
func TestNoRoom(t *testing.T) {
	d := newDisk(t)
	d.reserve = 1 << 20
	d.restart()
	s, _ := d.seal(1)
	d.must(s.WriteAt(sector, 0, 1, false))
	d.fs.Full = true
	if err := s.WriteAt(sector, 8192, 1, false); !errors.Is(err, volume.ErrNoSpace) {
		t.Errorf("got %v", err)
	}
	// Who gives room back must be able to.
	d.must(s.Trim(0, 512, 1, false))
	got := make([]byte, 512)
	d.must(s.ReadAt(got, 0))
	if !bytes.Equal(got, make([]byte, 512)) {
		t.Error("what was trimmed on a full disk is still there")
	}
	d.fs.Full = false
	d.must(s.WriteAt(sector, 8192, 1, false))
	d.must(s.Flush())
	d.must(s.ReadAt(got, 8192))
	if !bytes.Equal(got, sector) {
		t.Error("what was written when there was room again is not there")
	}
}

func TestRange(t *testing.T) {
	d := newDisk(t)
	s, _ := d.seal(1)
	for _, r := range []struct{ off, n int64 }{{1 << 20, 512}, {-512, 512}, {0, 1 << 21}, {256, 512}, {0, 100}} {
		if err := s.Zero(r.off, r.n, 1, false); !errors.Is(err, volume.ErrRange) {
			t.Errorf("%d bytes at %d: %v", r.n, r.off, err)
		}
	}
	for _, size := range []int64{-512, 100, volume.MaxSize + 512, 1 << 62} {
		if err := s.Resize(size); !errors.Is(err, volume.ErrRange) {
			t.Errorf("growing to %d bytes: %v", size, err)
		}
		if _, err := s.BeginSync(1, 2, size); !errors.Is(err, volume.ErrRange) {
			t.Errorf("a copy of %d bytes: %v", size, err)
		}
	}
	d.must(s.Flush())
}

func TestForeignDirectory(t *testing.T) {
	d := newDisk(t)
	_, err := replica.Open(replica.Options{FS: d.fs, Dir: "/volumes", ClusterID: "another", BootID: "b", Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, replica.ErrForeign) {
		t.Errorf("got %v", err)
	}
}

// What was half made or half removed is not there after a restart, and a
// removed replica does not come back.
func TestCreateAndRemove(t *testing.T) {
	d := newDisk(t)
	d.must(d.fs.MkdirAll("/volumes/v/.new-2"))
	d.restart()
	if list := d.store.List(); len(list) != 1 {
		t.Errorf("%+v", list)
	}
	s, _ := d.seal(1)
	d.must(d.fs.MkdirAll("/volumes/v/.old-1/left of an earlier attempt"))
	d.must(d.store.Remove("v", 1))
	if err := s.Flush(); !errors.Is(err, replica.ErrFenced) {
		t.Errorf("a session with a replica that was removed: %v", err)
	}
	d.must(d.store.Remove("v", 1))
	d.restart()
	if list := d.store.List(); len(list) != 0 {
		t.Errorf("%+v", list)
	}
}

// One whose superblock is damaged counts as lost, and can be made anew.
func TestCreateInPlaceOfADamagedOne(t *testing.T) {
	d := newDisk(t)
	for off := range int64(2) {
		d.must(d.fs.Rot("/volumes/v/1/superblock", off*layer.BlockSize+100))
	}
	d.restart()
	if list := d.store.List(); len(list) != 0 {
		t.Fatalf("%+v", list)
	}
	_, err := d.store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: 1 << 20, Behind: true})
	d.must(err)
	s, _ := d.seal(2)
	info, err := s.BeginSync(1, 2, 0)
	d.must(err)
	if !info.Emptied {
		t.Error("something was kept of a replica that is new")
	}
}

// A copy keeps what a replica has only where that is known to be of use.
func TestBeginSync(t *testing.T) {
	sector := bytes.Repeat([]byte{7}, 512)
	kept := func(s *replica.Session) bool {
		b := make([]byte, 512)
		if err := s.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		return bytes.Equal(b, sector)
	}
	begin := func(s *replica.Session, base, generation uint64, emptied bool) {
		t.Helper()
		info, err := s.BeginSync(base, generation, 0)
		if err != nil || info.Emptied != emptied || kept(s) == emptied || info.Health != layer.Syncing {
			t.Errorf("a copy since %d: %+v, kept: %v, %v", base, info, kept(s), err)
		}
	}
	d := newDisk(t)
	s, _ := d.seal(1)
	d.must(s.WriteAt(sector, 0, 20, false))
	begin(s, 20, 30, false)
	begin(s, 0, 30, true)
	d.must(s.WriteAt(sector, 0, 31, false))
	begin(s, 29, 32, true) // was emptied later than that
	d.must(s.WriteAt(sector, 0, 33, false))
	begin(s, 32, 34, false)
	d.must(s.EndSync())
	d.restart()
	s, _ = d.seal(2)
	begin(s, 32, 40, false)

	// One that is made when the volume has been in use equals none.
	if _, err := d.store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 2, Size: 1 << 20, Behind: true}); err != nil {
		t.Fatal(err)
	}
	r, err := d.store.Get("v", 2)
	d.must(err)
	s, _, err = r.Seal(2)
	d.must(err)
	info, err := s.BeginSync(1000, 1001, 0)
	if err != nil || !info.Emptied {
		t.Errorf("a new replica was taken for an old one: %+v, %v", info, err)
	}
	bits := make([]byte, 1)
	if err := s.Changed(5, 0, 1<<20, 1<<20, nil); !errors.Is(err, volume.ErrRange) {
		t.Errorf("no room for the answer: %v", err)
	}
	d.must(s.Changed(1001, 0, 1<<20, 1<<20, bits))
	if bits[0] != 1 {
		t.Error("an emptied region does not count as changed")
	}
}
