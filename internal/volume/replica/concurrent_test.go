package replica_test

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

const (
	stripes     = 4
	stripedSize = 2 << 20
	// stripedRegion is the size of its regions.
	stripedRegion = 64 << 10
)

// striper writes every fourth sector, so that others write the same blocks.
type striper struct {
	number int
	s      *replica.Session
	want   map[int64]uint64
}

func (w *striper) run(rounds int) error {
	for i := range rounds {
		sector := int64(i*37%(stripedSize/512/stripes)*stripes + w.number)
		value := uint64(i)<<8 | uint64(w.number)
		p := bytes.Repeat(binary.LittleEndian.AppendUint64(nil, value), 64)
		if err := w.s.WriteAt(p, sector*512, 1+uint64(i/50), i%16 == 0); err != nil {
			return err
		}
		w.want[sector] = value
		if err := w.check(sector); err != nil {
			return err
		}
	}
	return nil
}

func (w *striper) check(sector int64) error {
	p := make([]byte, 512)
	done, err := w.s.TryReadAt(p, sector*512)
	if err == nil && !done {
		err = w.s.ReadAt(p, sector*512)
	}
	if got := binary.LittleEndian.Uint64(p); err == nil && got != w.want[sector] {
		return &wrong{sector, got, w.want[sector]}
	}
	return err
}

type wrong struct {
	sector    int64
	got, want uint64
}

func (e *wrong) Error() string { return "a sector is not what was written" }

// TestConcurrentUpkeep writes to blocks from several sides while snapshots come
// and go, layers are tidied, and the base is copied.
func TestConcurrentUpkeep(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "image")
	if err := os.WriteFile(base, bytes.Repeat([]byte{0xbb}, stripedSize/2), 0o600); err != nil {
		t.Fatal(err)
	}
	store, err := replica.Open(replica.Options{
		FS: layer.OS{}, Dir: filepath.Join(dir, "volumes"), ClusterID: "c", BootID: "b", RegionSize: stripedRegion,
		Images: func(string) string { return base }, Log: slog.New(slog.DiscardHandler),
	})
	d := &disk{t: t, store: store}
	d.must(err)
	defer func() { d.must(store.Close()) }()
	_, err = store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: stripedSize, Base: layer.BaseRef{Image: "i"}})
	d.must(err)
	r, s := d.get("v"), d.open2("v", 1)
	var writers sync.WaitGroup
	workers := make([]*striper, stripes)
	errs := make([]error, stripes)
	for i := range workers {
		workers[i] = &striper{i, s, map[int64]uint64{}}
		writers.Go(func() { errs[i] = workers[i].run(300) })
	}
	for id := range uint32(12) {
		d.must(s.PrepareSnapshot())
		d.must(s.Snapshot(id+1, uint64(id)+2))
		before, after := make([]byte, stripedSize), make([]byte, stripedSize)
		d.must(s.ReadSnapshot(id+1, before, 0))
		var sums [stripedSize / stripedRegion]wire.Sum
		d.must(s.SnapshotSums(id+1, 0, stripedSize, sums[:]))
		if id > 0 {
			d.must(r.Forget(id))
		}
		d.untilDone(func() (bool, error) { return r.Tidy(t.Context()) })
		if id == 6 {
			d.untilDone(func() (bool, error) { return r.DetachBase(t.Context()) })
		}
		d.must(s.Mend(id+1, before, 0)) // where there is nothing to mend
		d.must(s.ReadSnapshotVerified(id+1, after, 0))
		if !bytes.Equal(before, after) {
			t.Errorf("snapshot %d has changed", id+1)
		}
		d.must(s.Flush())
	}
	writers.Wait()
	for i, w := range workers {
		d.must(errs[i])
		for sector := range w.want {
			d.must(w.check(sector))
		}
	}
}
