package replica_test

import (
	"bytes"
	"log/slog"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// A replica that is copied to takes no more than its source, although copies move
// whole regions; what it had there goes.
func TestCopiesStayThin(t *testing.T) {
	store, err := replica.Open(replica.Options{FS: layer.OS{}, Dir: t.TempDir(), ClusterID: "c", BootID: "b", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const size, region = 16 << 20, 1 << 20
	open := func(id uint32) (*replica.Replica, *replica.Session) {
		t.Helper()
		_, err := store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: id, Size: size})
		must(err)
		r, err := store.Get("v", id)
		must(err)
		s, _, err := r.Seal(1)
		must(err)
		return r, s
	}
	source, from := open(1)
	target, to := open(2)
	page := bytes.Repeat([]byte("x"), 4096)
	for at := int64(0); at < size; at += 64 << 10 {
		must(from.WriteAt(page, at, 2, false))
	}
	must(to.WriteAt(bytes.Repeat([]byte("old"), size/3/512*512), 0, 2, false))
	_, err = to.BeginSync(2, 3, size)
	must(err)
	p := make([]byte, region)
	for at := int64(0); at < size; at += region {
		must(from.ReadVerified(p, at))
		must(to.WriteAt(p, at, 3, false))
	}
	must(to.EndSync())
	must(from.Flush())
	want, _, err := source.Usage()
	must(err)
	got, _, err := target.Usage()
	must(err)
	if got > want+128<<10 {
		t.Errorf("the copy takes %d bytes, its source %d", got, want)
	}
	// Who writes zeros to a replica that is not copied to asks for their space.
	must(to.WriteAt(make([]byte, region), 0, 4, false))
	must(to.Flush())
	if now, _, err := target.Usage(); err != nil || now < got+region/2 {
		t.Errorf("after a write of zeros %d bytes are taken, %d were; %v", now, got, err)
	}
	must(store.Close())
}
