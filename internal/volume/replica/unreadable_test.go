package replica_test

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// badFS cannot read the first sector of data files that are there already.
type badFS struct{ layer.FS }

type badFile struct{ layer.File }

func (b badFS) Open(name string, create bool) (layer.File, error) {
	f, err := b.FS.Open(name, create)
	if err == nil && !create && strings.HasSuffix(name, ".data") {
		return badFile{f}, nil
	}
	return f, err
}

func (f badFile) ReadAt(p []byte, off int64) (int, error) {
	if off < 512 {
		return 0, syscall.EIO
	}
	return f.File.ReadAt(p, off)
}

// A sector that cannot be read costs nothing else. But a copy to the replica, which
// has left for that, must not leave it there: it would be met again and again.
func TestUnreadableSector(t *testing.T) {
	for name, read := range map[string]func(*replica.Session) error{
		"a read":    func(s *replica.Session) error { return s.ReadAt(make([]byte, 512), 0) },
		"a scrub":   func(s *replica.Session) error { return s.Sums(0, 1<<20, 1, make([]wire.Sum, 1)) },
		"a copy":    func(s *replica.Session) error { return s.ReadVerified(make([]byte, 1<<20), 0) },
		"a history": func(s *replica.Session) error { return s.ReadSnapshot(1, make([]byte, 512), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			d := &disk{t: t, fs: simfs.New(rand.New(rand.NewPCG(1, 2))), boot: "first"}
			var err error
			d.store, err = replica.Open(replica.Options{FS: badFS{d.fs}, Dir: "/volumes", ClusterID: "c", BootID: "b", Log: slog.New(slog.DiscardHandler)})
			d.must(err)
			_, err = d.store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: 1 << 20})
			d.must(err)
			s, _ := d.seal(1)
			d.must(s.WriteAt(sector, 0, 1, false))
			d.must(s.Snapshot(1, 2))
			if err := read(s); !errors.Is(err, syscall.EIO) {
				t.Errorf("got %v", err)
			}
			d.must(s.WriteAt(sector, 128<<10, 2, false))
			d.must(s.Flush())
			info, err := s.BeginSync(2, 3, 0)
			d.must(err)
			if !info.Emptied {
				t.Error("the sector was kept")
			}
			d.must(s.EndSync())
			d.must(s.ReadAt(make([]byte, 512), 0))
			if info, err = s.BeginSync(3, 4, 0); err != nil || info.Emptied {
				t.Errorf("emptied again: %v, %v", info.Emptied, err)
			}
		})
	}
}
