package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/stream"
)

// A snapshot of a real replica goes through a stream: all of it, and what
// differs from an earlier one.
func TestSnapshotsAreStreamed(t *testing.T) {
	dir := t.TempDir()
	store, err := replica.Open(replica.Options{FS: layer.OS{}, Dir: dir, ClusterID: "C", BootID: "B", Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	defer store.Close()
	const size = 8 << 20
	_, err = store.Create(replica.CreateSpec{VolumeID: "V", ReplicaID: 1, Size: size})
	must(t, err)
	r, err := store.Get("V", 1)
	must(t, err)
	s, _, err := r.Seal(1)
	must(t, err)
	want := make([]byte, size)
	write := func(off int, text string, generation uint64) {
		p := make([]byte, 4096)
		copy(want[off:], append(p[:0:0], append([]byte(text), make([]byte, 4096-len(text))...)...))
		copy(p, text)
		must(t, s.WriteAt(p, int64(off), generation, false))
	}
	write(3<<20, "first", 1)
	must(t, s.Snapshot(1, 2))
	first := bytes.Clone(want)
	write(5<<20, "second", 2)
	must(t, s.Snapshot(2, 3))
	write(0, "later", 3)
	want = append(want[:0:0], want...)
	clear(want[:4096])

	volumes := &volumes{replicas: store}
	for id, c := range map[uint32]struct {
		since uint64
		base  []byte
		want  []byte
	}{1: {0, make([]byte, size), first}, 2: {2, first, want}} {
		view, err := volumes.OpenSnapshot("V", 1, id)
		must(t, err)
		got := &memorySink{bytes.Clone(c.base), 0}
		must(t, stream.Walk(t.Context(), view, size, c.since, got, func(int64) {}))
		if !bytes.Equal(got.data, c.want) || got.bytes > 1<<20 {
			t.Errorf("snapshot %d: equal %v, %d bytes", id, bytes.Equal(got.data, c.want), got.bytes)
		}
		must(t, view.Close())
	}
	u, err := space{&disk{path: dir}, store, dir}.Measure()
	must(t, err)
	if len(u.GetReplicas()) != 1 || u.GetReplicas()[0].GetUsedBytes() == 0 || u.GetFreeBytes() == 0 {
		t.Errorf("measured %v", u)
	}
	if _, err := volumes.OpenSnapshot("V", 1, 9); err == nil {
		t.Error("a snapshot that is not there was opened")
	}
	if _, err := volumes.OpenSnapshot("V", 2, 1); !os.IsNotExist(err) && err == nil {
		t.Error("a replica that is not there was opened")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type memorySink struct {
	data  []byte
	bytes int
}

func (m *memorySink) Data(off int64, p []byte) error {
	m.bytes += copy(m.data[off:], p)
	return nil
}

func (m *memorySink) Zeros(off, n int64) error {
	clear(m.data[off : off+n])
	return nil
}
