package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
	"github.com/argon-cluster/argon/internal/placement"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// twoDisks are two volumes that one machine has attached, for real.
type twoDisks struct {
	t        *testing.T
	store    *catalog.Store
	view     *catalog.View
	replicas *replica.Store
	disks    map[string]*mirror.Attachment
}

func newTwoDisks(t *testing.T, group mirror.Group) *twoDisks {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.DiscardHandler)
	store, err := catalog.Create(ctx, catalogtest.Start(t), &argonv1.Cluster{Id: "C", Name: "test"})
	must(t, err)
	must(t, store.PutLease(ctx, 0, &argonv1.Lease{ServerId: "S", Since: timestamppb.Now()}))
	view := catalog.NewView(store, log)
	var wg sync.WaitGroup
	wg.Go(func() { _ = view.Run(ctx) })
	replicas, err := replica.Open(replica.Options{FS: layer.OS{}, Dir: t.TempDir(), ClusterID: "C", BootID: "B", Log: log})
	must(t, err)
	d := &twoDisks{t: t, store: store, view: view, replicas: replicas, disks: map[string]*mirror.Attachment{}}
	t.Cleanup(func() {
		for _, disk := range d.disks {
			if err := disk.Detach(ctx); err != nil {
				t.Error(err)
			}
		}
		cancel()
		wg.Wait()
		_ = replicas.Close()
	})
	const size = 1 << 20
	for _, id := range []string{"A", "B"} {
		info, err := replicas.Create(replica.CreateSpec{VolumeID: id, ReplicaID: 1, Size: size})
		must(t, err)
		must(t, store.Volumes.Create(ctx, &argonv1.Volume{
			Meta: &argonv1.Meta{Id: id, Name: id}, SizeBytes: size, ReplicasWanted: 1, NextSnapshotId: 1,
			Replicas: []*argonv1.Replica{{Id: 1, ServerId: "S", State: argonv1.ReplicaState_REPLICA_STATE_IN_SYNC, Incarnation: info.Incarnation}},
		}))
	}
	must(t, view.Sync(ctx))
	for _, id := range []string{"A", "B"} {
		d.disks[id], err = mirror.Attach(ctx, mirror.Options{
			VolumeID: id, Holder: mirror.Holder{ServerID: "S", MachineID: "m"}, Catalog: volumeRecords{store}, View: volumeView{view},
			Dialer: dialer{serverID: "S", clusterID: "C", store: replicas}, Config: mirror.DefaultConfig(), Group: group, Log: log,
		})
		must(t, err)
	}
	return d
}

// write puts a number on a disk, and returns when that is acknowledged.
func (d *twoDisks) write(disk string, n uint64) error {
	data := make([]byte, volume.SectorSize)
	binary.LittleEndian.PutUint64(data, n)
	done := make(chan error, 1)
	d.disks[disk].Submit(&volume.Request{Op: volume.OpWrite, Len: int64(len(data)), Data: data, Done: func(err error) { done <- err }})
	return <-done
}

// snapshot has one taken of both, as the API does.
func (d *twoDisks) snapshot(id uint32) {
	d.t.Helper()
	ctx := d.t.Context()
	for {
		txn := d.store.Txn()
		for disk := range d.disks {
			v, err := d.store.Volumes.Get(ctx, disk)
			must(d.t, err)
			v.NextSnapshotId = id + 1
			v.Snapshots = append(v.Snapshots, &argonv1.Snapshot{
				Id: id, Name: fmt.Sprint("s", id), State: argonv1.SnapshotState_SNAPSHOT_STATE_CREATING, Group: fmt.Sprint("g", id), GroupSize: 2,
			})
			txn.Put(v)
		}
		err := txn.Commit(ctx)
		if errors.Is(err, catalog.ErrConflict) {
			continue
		}
		must(d.t, err)
		break
	}
	for {
		changed, ready := d.view.Changed(), 0
		for disk := range d.disks {
			if placement.Snapshot(d.view.State().Volumes[disk], id).GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_READY {
				ready++
			}
		}
		if ready == len(d.disks) {
			return
		}
		select {
		case <-changed:
		case <-time.After(time.Minute):
			d.t.Fatal("the snapshots are not taken")
		}
	}
}

// number is what a disk holds in a snapshot.
func (d *twoDisks) number(disk string, snapshot uint32) uint64 {
	d.t.Helper()
	r, err := d.replicas.Get(disk, 1)
	must(d.t, err)
	view, err := r.OpenSnapshot(snapshot)
	must(d.t, err)
	defer view.Close()
	data := make([]byte, volume.SectorSize)
	must(d.t, view.ReadAt(data, 0))
	return binary.LittleEndian.Uint64(data)
}

// apart is a Group whose members do not wait for each other: the one that is ready
// last is held up while some more is written.
type apart struct {
	mu      sync.Mutex
	more    *sync.Cond
	written uint64
	came    map[string]bool
}

func newApart() *apart {
	a := &apart{came: map[string]bool{}}
	a.more = sync.NewCond(&a.mu)
	return a
}

func (a *apart) Meet(_ context.Context, name string, _ int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if first := !a.came[name]; first || !strings.HasSuffix(name, "/ready") {
		a.came[name] = true
		return nil
	}
	for until := a.written + 20; a.written < until; {
		a.more.Wait()
	}
	return nil
}

func (a *apart) wrote() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.written++
	a.more.Broadcast()
}

// Somebody writes each number to one disk, and when that is acknowledged to the
// other, as fast as that goes. In snapshots of both the second one has the number
// of the first, or the one before.
func TestGroupIsOfOneInstant(t *testing.T) {
	const times = 20
	wrong := func(group mirror.Group, times uint32, wrote func()) (wrong int) {
		d := newTwoDisks(t, group)
		enough := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for n := uint64(1); ; n++ {
				select {
				case <-enough:
					return
				default:
				}
				if err := errors.Join(d.write("A", n), d.write("B", n)); err != nil {
					t.Error(err)
					return
				}
				wrote()
			}
		})
		for id := uint32(1); id <= times; id++ {
			d.snapshot(id)
			a, b := d.number("A", id), d.number("B", id)
			if a < b || a-b > 1 {
				t.Logf("snapshot %d: the first disk has %d, the second %d", id, a, b)
				wrong++
			}
		}
		close(enough)
		wg.Wait()
		return wrong
	}
	if n := wrong(&mirror.Meeting{Patience: time.Minute}, times, func() {}); n > 0 {
		t.Errorf("%d of %d snapshots are of two instants", n, times)
	}
	// And it would be seen if they did not wait for each other.
	a := newApart()
	if wrong(a, 3, a.wrote) == 0 {
		t.Error("no snapshot is of two instants, though the disks did not wait for each other")
	}
}
