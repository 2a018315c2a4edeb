package rpc

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// withVolume is a world whose agents carry out wishes, with one volume.
func withVolume(t *testing.T, name string) *world {
	t.Helper()
	w := newWorld(t)
	w.agents()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: name, SizeBytes: 8 * mib})
	w.must(err)
	return w
}

func (w *world) snapshot(volume, name string) error {
	_, err := call(w.t, w.snaps.CreateSnapshot, &argonv1.CreateSnapshotRequest{Volume: volume, Name: name})
	return err
}

// record changes a volume's record behind the API's back.
func (w *world) record(name string, change func(*argonv1.Volume)) {
	w.t.Helper()
	v, err := w.store.Volumes.ByName(w.t.Context(), name)
	w.must(err)
	_, err = w.store.Volumes.Update(w.t.Context(), v.GetMeta().GetId(), func(v *argonv1.Volume) error {
		change(v)
		return nil
	})
	w.must(err)
}

func TestSnapshots(t *testing.T) {
	w := withVolume(t, "db")
	w.must(w.snapshot("db", "monday"))
	res, err := call(t, w.snaps.CreateSnapshot, &argonv1.CreateSnapshotRequest{Volume: "db", Name: "tuesday", Labels: map[string]string{"by": "cron"}})
	w.must(err)
	s := res.GetSnapshots()[0]
	if s.GetVolume() != "db" || s.GetSnapshot().GetId() != 2 || s.GetSnapshot().GetState() != taken || len(s.GetServers()) != 2 || s.GetSnapshot().GetLabels()["by"] != "cron" {
		t.Errorf("got %v", s)
	}
	wantError(t, w.snapshot("db", "monday"), connect.CodeAlreadyExists, "monday")
	wantError(t, w.snapshot("none", "x"), connect.CodeNotFound, "none")
	wantError(t, w.snapshot("db", "Bad/Name"), connect.CodeInvalidArgument, "snapshot name")
	_, err = call(t, w.snaps.CreateSnapshot, &argonv1.CreateSnapshotRequest{Name: "x"})
	wantError(t, err, connect.CodeInvalidArgument, "either a volume or a machine")

	list, err := call(t, w.snaps.ListSnapshots, &argonv1.ListSnapshotsRequest{})
	if err != nil || len(list.GetSnapshots()) != 2 {
		t.Errorf("list: %v, %v", list, err)
	}
	_, err = call(t, w.snaps.ListSnapshots, &argonv1.ListSnapshotsRequest{Volume: "none"})
	wantError(t, err, connect.CodeNotFound, "none")
	_, err = call(t, w.snaps.GetSnapshot, &argonv1.GetSnapshotRequest{Volume: "db", Name: "friday"})
	wantError(t, err, connect.CodeNotFound, "snapshot ls db")

	_, err = call(t, w.snaps.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{Volume: "db", Name: "tuesday"})
	w.must(err)
	w.must(w.snapshot("db", "tuesday"))
	again, err := call(t, w.snaps.GetSnapshot, &argonv1.GetSnapshotRequest{Volume: "db", Name: "tuesday"})
	if err != nil || again.GetSnapshot().GetSnapshot().GetId() != 3 {
		t.Errorf("a name that is used again: %v, %v; want the id 3", again, err)
	}
}

func TestClones(t *testing.T) {
	w := withVolume(t, "db")
	w.must(w.snapshot("db", "monday"))
	create := func(change func(*argonv1.CreateVolumeRequest)) (*argonv1.CreateVolumeResponse, error) {
		req := &argonv1.CreateVolumeRequest{Name: "copy", SnapshotVolume: "db", Snapshot: "monday"}
		change(req)
		return call(t, w.volumes.CreateVolume, req)
	}
	res, err := create(func(*argonv1.CreateVolumeRequest) {})
	w.must(err)
	if v := res.GetVolume(); v.GetVolume().GetSizeBytes() != 8*mib || v.GetBase() != "snapshot db/monday" || len(v.GetVolume().GetReplicas()) != 2 {
		t.Errorf("got %v", v)
	}
	for says, c := range map[string]struct {
		code   connect.Code
		change func(*argonv1.CreateVolumeRequest)
	}{
		"VOLUME/SNAPSHOT":        {connect.CodeInvalidArgument, func(r *argonv1.CreateVolumeRequest) { r.Name, r.SnapshotVolume = "x", "" }},
		"an image or a snapshot": {connect.CodeInvalidArgument, func(r *argonv1.CreateVolumeRequest) { r.Name, r.Image = "x", "debian" }},
		`no snapshot "friday"`:   {connect.CodeNotFound, func(r *argonv1.CreateVolumeRequest) { r.Name, r.Snapshot = "x", "friday" }},
		"less than snapshot":     {connect.CodeInvalidArgument, func(r *argonv1.CreateVolumeRequest) { r.Name, r.SizeBytes = "x", mib }},
	} {
		_, err := create(c.change)
		wantError(t, err, c.code, says)
	}

	_, err = call(t, w.snaps.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{Volume: "db", Name: "monday"})
	wantError(t, err, connect.CodeFailedPrecondition, "volume copy is based on snapshot db/monday")
	_, err = call(t, w.volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: "db"})
	wantError(t, err, connect.CodeFailedPrecondition, "volume copy is based on snapshots of volume db")
	gone, err := call(t, w.snaps.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{Volume: "db", Name: "monday", Detach: true})
	w.must(err)
	if !slices.Equal(gone.GetWaitsFor(), []string{"copy"}) {
		t.Errorf("waits for %v", gone.GetWaitsFor())
	}
	_, err = create(func(r *argonv1.CreateVolumeRequest) { r.Name = "late" })
	wantError(t, err, connect.CodeFailedPrecondition, "being removed")
	view, err := call(t, w.volumes.GetVolume, &argonv1.GetVolumeRequest{Name: "db"})
	w.must(err)
	if a := view.GetVolume().GetActivity(); len(a) != 1 || !strings.Contains(a[0], "once volume copy is detached") {
		t.Errorf("activity %q", a)
	}
}

// A clone's replicas go where the snapshot is.
func TestClonesStayNearTheirParent(t *testing.T) {
	w := withVolume(t, "db")
	w.must(w.snapshot("db", "monday"))
	w.record("db", func(v *argonv1.Volume) { v.Snapshots[0].ReplicaIds = v.Snapshots[0].ReplicaIds[:1] })
	parent, err := call(t, w.volumes.GetVolume, &argonv1.GetVolumeRequest{Name: "db"})
	w.must(err)
	res, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "copy", SnapshotVolume: "db", Snapshot: "monday"})
	w.must(err)
	at := res.GetVolume().GetVolume().GetReplicas()
	if len(at) != 1 || at[0].GetServerId() != parent.GetVolume().GetVolume().GetReplicas()[0].GetServerId() || len(res.GetWarnings()) != 1 {
		t.Errorf("made on %v, warned %q", at, res.GetWarnings())
	}
}

func TestMachineSnapshot(t *testing.T) {
	w := withVolume(t, "root")
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Volumes: []string{"root", "data"}, Stopped: true})
	w.must(err)
	w.must(w.snapshot("data", "taken-alone"))
	res, err := call(t, w.snaps.CreateSnapshot, &argonv1.CreateSnapshotRequest{Machine: "web", Name: "monday"})
	w.must(err)
	if s := res.GetSnapshots(); len(s) != 2 || s[0].GetSnapshot().GetGroup() == "" || s[0].GetSnapshot().GetGroup() != s[1].GetSnapshot().GetGroup() || s[1].GetSnapshot().GetGroupSize() != 2 {
		t.Fatalf("got %v", s)
	}
	_, err = call(t, w.snaps.CreateSnapshot, &argonv1.CreateSnapshotRequest{Machine: "web", Name: "taken-alone"})
	wantError(t, err, connect.CodeAlreadyExists, "data has a snapshot taken-alone")
	_, err = call(t, w.snaps.RollBack, &argonv1.RollBackRequest{Machine: "web", Name: "taken-alone"})
	wantError(t, err, connect.CodeNotFound, "root has no snapshot")
	back, err := call(t, w.snaps.RollBack, &argonv1.RollBackRequest{Machine: "web", Name: "monday"})
	w.must(err)
	if v := back.GetVolumes(); len(v) != 2 || v[0].GetVolume().GetRollbackTo() == 0 || v[1].GetVolume().GetRollbackTo() == 0 {
		t.Errorf("rolled back %v", v)
	}
	_, err = call(t, w.snaps.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{Machine: "web", Name: "monday"})
	wantError(t, err, connect.CodeFailedPrecondition, "being rolled back to it")
	for _, name := range []string{"root", "data"} {
		w.record(name, func(v *argonv1.Volume) { v.RollbackTo = 0 })
	}
	_, err = call(t, w.snaps.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{Machine: "web", Name: "monday"})
	w.must(err)
	list, err := call(t, w.snaps.ListSnapshots, &argonv1.ListSnapshotsRequest{Machine: "web"})
	if err != nil || len(list.GetSnapshots()) != 1 {
		t.Errorf("left: %v, %v", list, err)
	}
}

func TestRollbackIsRefused(t *testing.T) {
	w := withVolume(t, "db")
	w.must(w.snapshot("db", "monday"))
	roll := func() error {
		_, err := call(t, w.snaps.RollBack, &argonv1.RollBackRequest{Volume: "db", Name: "monday"})
		return err
	}
	w.record("db", func(v *argonv1.Volume) { v.Attachment = &argonv1.Attachment{ServerId: "B", Connected: true} })
	wantError(t, roll(), connect.CodeFailedPrecondition, "in use by `argon volume connect`")
	_, err := call(t, w.volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: "db"})
	wantError(t, err, connect.CodeFailedPrecondition, "in use by `argon volume connect`")
	w.record("db", func(v *argonv1.Volume) { v.Attachment = nil })
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Volumes: []string{"db"}})
	w.must(err)
	wantError(t, roll(), connect.CodeFailedPrecondition, "machine web runs on volume db")
	_, err = call(t, w.machines.StopMachine, &argonv1.StopMachineRequest{Name: "web"})
	w.must(err)
	w.must(roll())
	wantError(t, roll(), connect.CodeFailedPrecondition, "is being rolled back to snapshot monday already")
	wantError(t, w.snapshot("db", "tuesday"), connect.CodeFailedPrecondition, "being rolled back")
}

func TestResize(t *testing.T) {
	w := withVolume(t, "db")
	resize := func(size uint64) (*argonv1.ResizeVolumeResponse, error) {
		return call(t, w.volumes.ResizeVolume, &argonv1.ResizeVolumeRequest{Name: "db", SizeBytes: size})
	}
	for _, size := range []uint64{16 * mib, 16 * mib} { // the same again is fine
		res, err := resize(size)
		if err != nil || res.GetVolume().GetVolume().GetSizeBytes() != size {
			t.Errorf("got %v, %v", res, err)
		}
	}
	_, err := resize(8 * mib)
	wantError(t, err, connect.CodeInvalidArgument, "only grow")
	_, err = resize(17*mib + 1)
	wantError(t, err, connect.CodeInvalidArgument, "multiple of 1 MiB")
	_, err = call(t, w.volumes.ResizeVolume, &argonv1.ResizeVolumeRequest{Name: "none", SizeBytes: mib})
	wantError(t, err, connect.CodeNotFound, "none")
}

func TestScrubIsAskedForOnce(t *testing.T) {
	w := withVolume(t, "db")
	scrub := func() uint64 {
		res, err := call(t, w.volumes.ScrubVolume, &argonv1.ScrubVolumeRequest{Name: "db"})
		w.must(err)
		return res.GetNumber()
	}
	if a, b := scrub(), scrub(); a != 1 || b != 1 {
		t.Errorf("numbers %d and %d of the same scrub", a, b)
	}
	w.record("db", func(v *argonv1.Volume) { v.Scrub.Finished = 1 })
	if n := scrub(); n != 2 {
		t.Errorf("the next one has the number %d", n)
	}
}

func TestDetachBase(t *testing.T) {
	w := withVolume(t, "db")
	_, err := call(t, w.volumes.DetachBase, &argonv1.DetachBaseRequest{Name: "db"})
	wantError(t, err, connect.CodeFailedPrecondition, "has no base")
	w.must(w.snapshot("db", "monday"))
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "copy", SnapshotVolume: "db", Snapshot: "monday"})
	w.must(err)
	res, err := call(t, w.volumes.DetachBase, &argonv1.DetachBaseRequest{Name: "copy"})
	if err != nil || !res.GetVolume().GetVolume().GetBase().GetDetaching() {
		t.Errorf("got %v, %v", res, err)
	}
}

// Of two who want opposite things at once one gets it, and the other is told.
func TestCloneAgainstRemoval(t *testing.T) {
	w := withVolume(t, "db")
	for i := range 5 {
		snapshot, clone := fmt.Sprintf("s%d", i), fmt.Sprintf("c%d", i)
		w.must(w.snapshot("db", snapshot))
		var made, removed error
		var both sync.WaitGroup
		both.Go(func() {
			_, made = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: clone, SnapshotVolume: "db", Snapshot: snapshot})
		})
		both.Go(func() {
			_, removed = call(t, w.snaps.RemoveSnapshot, &argonv1.RemoveSnapshotRequest{Volume: "db", Name: snapshot})
		})
		both.Wait()
		if (made == nil) == (removed == nil) {
			t.Errorf("clone: %v, removal: %v", made, removed)
		}
	}
}

func TestActivity(t *testing.T) {
	now := time.Now()
	st := servers("a", "b")
	v := &argonv1.Volume{
		Meta: &argonv1.Meta{Id: "V", Name: "db"}, SizeBytes: 10 << 30, WantedBytes: 20 << 30, RollbackTo: 1,
		Scrub:     &argonv1.Scrub{Wanted: 1},
		Snapshots: []*argonv1.Snapshot{{Id: 1, Name: "monday", State: taken}, {Id: 2, Name: "tuesday", State: beingTaken}},
		Replicas:  []*argonv1.Replica{{Id: 1, ServerId: "a", Based: true}, {Id: 2, ServerId: "c", Based: true}},
		Base:      &argonv1.Base{ImageId: "I", Detaching: true},
	}
	st.Images["I"] = &argonv1.Image{Meta: &argonv1.Meta{Name: "debian"}}
	st.Usage = map[string]*argonv1.Usage{"a": {Replicas: []*argonv1.ReplicaUsage{{VolumeId: "V", ReplicaId: 1, DetachedBytes: 3 << 30}}}}
	st.VolumeStatus = map[string]*argonv1.VolumeStatus{"V": {
		Updated:       timestamppb.New(now),
		ScrubbedBytes: 5 << 30, RollbackDoneBytes: 1, RollbackTotalBytes: 3,
		Resyncs: []*argonv1.ResyncProgress{{ReplicaId: 2, DoneBytes: 1 << 30, TotalBytes: 4 << 30, Started: timestamppb.New(now.Add(-30 * time.Second)), Snapshot: "monday"}},
	}}
	want := []string{
		"copying to server c: snapshot monday, 1.0 GiB of 4.0 GiB (25 %), about 1m30s left",
		"rolling back to snapshot monday: 1 B of 3 B (33 %)",
		"growing to 20 GiB",
		"scrub: 5.0 GiB of 10 GiB (50 %)",
		"snapshot tuesday: being taken",
		"detaching: server a copies what it needs of image debian, 3.0 GiB of 10 GiB (30 %)",
		"detaching: server c copies what it needs of image debian, once its server is back",
	}
	if got := activity(st, v); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	st.Images["I"].SizeBytes = 4 << 30
	v.Replicas[0].State = creating
	for _, c := range []struct {
		copied, checked uint64
		want            string
	}{
		{0, 0, "image debian is copied to a: about to begin"},
		{1 << 30, 0, "image debian is copied to a: 1.0 GiB of 4.0 GiB (25 %)"},
		{4 << 30, 3 << 30, "image debian is checked on a: 3.0 GiB of 4.0 GiB (75 %)"},
	} {
		st.Images["I"].Copies = []*argonv1.ImageCopy{{ServerId: "a", CopiedBytes: c.copied, CheckedBytes: c.checked}}
		if got := activity(st, v); got[0] != c.want {
			t.Errorf("got %q, want %q", got[0], c.want)
		}
	}
	v.Snapshots[0].SizeBytes = 8 << 30
	st.VolumeStatus["V"].ScrubbedSnapshot = "monday"
	if got, want := activity(st, v), "scrub: snapshot monday, 5.0 GiB of 8.0 GiB (62 %)"; !slices.Contains(got, want) {
		t.Errorf("got\n%s\nwithout %s", strings.Join(got, "\n"), want)
	}
	for d, want := range map[time.Duration]string{900 * time.Millisecond: "1s", 61 * time.Second: "1m1s", 59*time.Minute + 59*time.Second: "59m59s", 25 * time.Hour: "25h0m"} {
		if got := roughly(d); got != want {
			t.Errorf("%v is written %s, want %s", d, got, want)
		}
	}
}

func TestTooManySnapshots(t *testing.T) {
	st := &catalog.State{Servers: servers("a").Servers, Leases: servers("a").Leases}
	v := &argonv1.Volume{Meta: &argonv1.Meta{Name: "db"}, Epoch: 1, ReplicasWanted: 1, Replicas: []*argonv1.Replica{{ServerId: "a", State: inSync}}}
	for i := range maxSnapshots {
		wantError(t, snapshotPossible(st, v, "next"), 0, "")
		v.Snapshots = append(v.Snapshots, &argonv1.Snapshot{Name: fmt.Sprint(i)})
	}
	wantError(t, snapshotPossible(st, v, "next"), connect.CodeResourceExhausted, "remove some")
}
