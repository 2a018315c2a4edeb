package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
	"github.com/argon-cluster/argon/internal/image"
	"github.com/argon-cluster/argon/internal/volume"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is the API of server "a" over a real catalog. Its agents and
// controllers are the test itself.
type world struct {
	t     *testing.T
	etcd  *catalogtest.Etcd
	store *catalog.Store
	view  *catalog.View
	parts *Parts
	local *fakeLocal

	cluster  argonv1connect.ClusterServiceClient
	servers  argonv1connect.ServerServiceClient
	images   argonv1connect.ImageServiceClient
	volumes  argonv1connect.VolumeServiceClient
	machines argonv1connect.MachineServiceClient
	snaps    argonv1connect.SnapshotServiceClient
	checks   argonv1connect.CheckpointServiceClient
	events   argonv1connect.EventServiceClient
}

// fakeLocal is a server whose parts a test sets.
type fakeLocal struct {
	mu    sync.Mutex
	parts *Parts
	logs  string
}

func (l *fakeLocal) Parts() *Parts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.parts
}

func (l *fakeLocal) Condition() (string, string) {
	if l.Parts() == nil {
		return "unconfigured", ""
	}
	return "ready", ""
}

func (l *fakeLocal) Init(context.Context, *argonv1.InitRequest) (*argonv1.InitResponse, error) {
	return &argonv1.InitResponse{}, nil
}

func (l *fakeLocal) Join(context.Context, *argonv1.JoinRequest) (*argonv1.JoinResponse, error) {
	return &argonv1.JoinResponse{}, nil
}

func (l *fakeLocal) Introduce(who Caller, _ *argonv1.IntroduceRequest) (*argonv1.IntroduceResponse, error) {
	return &argonv1.IntroduceResponse{Self: &argonv1.Whereabouts{ServerId: who.ID}}, nil
}

func (l *fakeLocal) Meet(context.Context, []string) ([]*argonv1.Whereabouts, error) {
	return nil, errors.New("nobody answers there")
}

func (l *fakeLocal) Readdress(_ context.Context, address string) error {
	if address == "192.0.2.1" {
		return errors.New("it is not an address of this host")
	}
	return nil
}

func (l *fakeLocal) Version() string { return "test" }
func (l *fakeLocal) LogDir() string  { return l.logs }

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, local: &fakeLocal{}}
	var cli *clientv3.Client
	var err error
	w.etcd, cli = catalogtest.StartEtcd(t)
	if w.store, err = catalog.Create(t.Context(), cli, &argonv1.Cluster{Id: "C", Name: "test"}); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	w.view = catalog.NewView(w.store, log)
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { _ = w.view.Run(ctx) })
	t.Cleanup(func() { cancel(); done.Wait() })
	images, err := image.NewStore(image.Options{Dir: filepath.Join(t.TempDir(), "images"), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	w.parts = &Parts{
		ServerID: "A", Store: w.store, View: w.view, Images: images,
		Members: fakeMembers{}, Volumes: &fakeVolumes{}, Consoles: fakeConsoles{}, Guests: &fakeGuests{}, Now: time.Now, Log: log,
	}
	for _, name := range []string{"a", "b"} {
		w.addServer(name)
	}
	w.must(w.view.Sync(t.Context()))
	w.local.parts = w.parts
	w.serve(ForSocket(New(w.local, log).Handler()))
	return w
}

func (w *world) addServer(name string) {
	w.t.Helper()
	id := map[string]string{"a": "A", "b": "B", "c": "C"}[name]
	s := &argonv1.Server{
		Meta: &argonv1.Meta{Id: id, Name: name}, Address: "127.0.0.1", ApiPort: 7440, DataPort: 7441,
		Capacity: &argonv1.Resources{Cpus: 4, MemoryBytes: 8 << 30, DiskBytes: 100 << 30, LargestFileBytes: 16 << 40}, CertificateSerial: "1",
	}
	w.must(w.store.Servers.Create(w.t.Context(), s))
	w.must(w.store.PutLease(w.t.Context(), 0, &argonv1.Lease{ServerId: id, Since: timestamppb.Now()}))
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// serve makes the clients of a handler.
func (w *world) serve(h http.Handler) {
	s := httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = true
	s.StartTLS()
	w.t.Cleanup(s.Close)
	c := s.Client()
	w.cluster = argonv1connect.NewClusterServiceClient(c, s.URL)
	w.servers = argonv1connect.NewServerServiceClient(c, s.URL)
	w.images = argonv1connect.NewImageServiceClient(c, s.URL)
	w.volumes = argonv1connect.NewVolumeServiceClient(c, s.URL)
	w.machines = argonv1connect.NewMachineServiceClient(c, s.URL)
	w.snaps = argonv1connect.NewSnapshotServiceClient(c, s.URL)
	w.checks = argonv1connect.NewCheckpointServiceClient(c, s.URL)
	w.events = argonv1connect.NewEventServiceClient(c, s.URL)
}

// agents carries out what the agents and controllers would, at each change of
// the catalog: it makes and removes replicas, and removes machines.
func (w *world) agents() {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		for ctx.Err() == nil {
			changed := w.view.Changed()
			w.agentsPass(ctx, w.view.State())
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
	})
	w.t.Cleanup(func() { cancel(); done.Wait() })
}

func (w *world) agentsPass(ctx context.Context, st *catalog.State) {
	for id, v := range st.Volumes {
		_, _ = w.store.Volumes.Update(ctx, id, func(v *argonv1.Volume) error {
			before := proto.CloneOf(v)
			carryOut(v)
			if proto.Equal(before, v) {
				return catalog.ErrUnchanged
			}
			return nil
		})
		if v.GetRemoving() {
			_ = w.store.Volumes.Delete(ctx, v)
		}
	}
	for _, m := range st.Machines {
		if m.GetWanted() == argonv1.Wanted_WANTED_REMOVED {
			_ = w.store.Machines.Delete(ctx, m)
		}
	}
}

// carryOut does what a holder and the agents would with the wishes in a record,
// except scrubs and detaching, which take their time.
func carryOut(v *argonv1.Volume) {
	var all []uint32
	for _, r := range v.GetReplicas() {
		if r.GetState() == creating {
			r.State, r.Based = inSync, v.GetBase() != nil
		}
		all = append(all, r.GetId())
	}
	for _, s := range v.GetSnapshots() {
		if s.GetState() == beingTaken {
			s.State, s.ReplicaIds = taken, all
		}
	}
	v.SizeBytes = max(v.GetSizeBytes(), v.GetWantedBytes())
}

type fakeMembers struct{}

func (fakeMembers) Admit(context.Context, *argonv1.AdmitRequest) (*argonv1.AdmitResponse, error) {
	return &argonv1.AdmitResponse{}, nil
}

func (fakeMembers) CreateToken(_ context.Context, servers uint32, ttl time.Duration) (string, *argonv1.Token, error) {
	return "argon1.x", &argonv1.Token{Servers: servers, Expires: timestamppb.New(time.Now().Add(ttl))}, nil
}

func (fakeMembers) CheckToken(_ context.Context, token string) error {
	if token != "argon1.x" {
		return errors.New("token refused: it's not one")
	}
	return nil
}

func (fakeMembers) KeyPin() string { return "cGlu" }

func (fakeMembers) ListTokens(context.Context) ([]*argonv1.Token, error) { return nil, nil }
func (fakeMembers) DeleteToken(context.Context, string) error            { return catalog.ErrNotFound }

func (fakeMembers) IssueClient(context.Context, string, []byte, time.Duration, string) (string, error) {
	return "PEM", nil
}

func (fakeMembers) Backup(_ context.Context, send func([]byte) error) error {
	return send([]byte("catalog"))
}

func (fakeMembers) LeaderID(context.Context) string { return "A" }

func (fakeMembers) CatalogLoad(context.Context) (*argonv1.CatalogLoad, error) {
	return &argonv1.CatalogLoad{UsedBytes: 600, QuotaBytes: 1000, FileBytes: 700}, nil
}

type fakeVolumes struct {
	err    error
	closed chan struct{}
	facts  ReplicaFacts
	// disks are what volumes hold, and snapshots what those held, by their ids.
	disks     map[string]*fakeDisk
	snapshots map[string]fakeView
}

func (f *fakeVolumes) Connect(_ context.Context, volumeID string) (Connection, error) {
	if f.err != nil {
		return nil, f.err
	}
	return fakeConnection{f.closed, f.disks[volumeID]}, nil
}

func (f *fakeVolumes) Inspect(context.Context, *argonv1.Volume, *argonv1.Replica) (ReplicaFacts, error) {
	return f.facts, f.err
}

func (f *fakeVolumes) OpenSnapshot(volumeID string, _, snapshotID uint32) (SnapshotView, error) {
	v, ok := f.snapshots[fmt.Sprint(volumeID, "/", snapshotID)]
	if !ok {
		return nil, os.ErrNotExist
	}
	return v, nil
}

type fakeConnection struct {
	closed chan struct{}
	disk   *fakeDisk
}

func (fakeConnection) URI() string             { return "nbd+unix:///v?socket=/x" }
func (c fakeConnection) Device() volume.Device { return c.disk }
func (fakeConnection) Done() <-chan struct{}   { return nil }
func (fakeConnection) Err() error              { return nil }
func (c fakeConnection) Close() {
	if c.closed != nil {
		close(c.closed)
	}
}

// fakeDisk is a device in memory.
type fakeDisk struct {
	mu   sync.Mutex
	data []byte
	// fails is what the n-th change from now fails with.
	fails error
	after int
}

func (d *fakeDisk) Size() int64 { return int64(len(d.data)) }

func (d *fakeDisk) Submit(r *volume.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.after--; d.fails != nil && d.after < 0 {
		r.Done(d.fails)
		return
	}
	switch r.Op {
	case volume.OpWrite:
		copy(d.data[r.Off:], r.Data)
	case volume.OpZero:
		clear(d.data[r.Off : r.Off+r.Len])
	}
	r.Done(nil)
}

// fakeView is a snapshot: regions that differ from zeros are taken for written.
type fakeView struct{ data, before []byte }

func (v fakeView) ReadAt(p []byte, off int64) error { copy(p, v.data[off:]); return nil }
func (fakeView) Close() error                       { return nil }

func (v fakeView) Changed(since uint64, off, n, grain int64, bits []byte) error {
	for at := off; at < off+n; at += grain {
		end := min(at+grain, off+n)
		if since == 0 && !allZero(v.data[at:end]) || since > 0 && !bytes.Equal(v.data[at:end], v.before[at:end]) {
			bits[(at-off)/grain/8] |= 1 << ((at - off) / grain % 8)
		}
	}
	return nil
}

func allZero(p []byte) bool { return bytes.Equal(p, make([]byte, len(p))) }

// fakeConsoles has one guest, of machine "M": it says "hello" and then what it
// is told.
type fakeConsoles struct{}

func (fakeConsoles) Open(_ context.Context, machineID string) (io.ReadWriteCloser, error) {
	if machineID != "M" {
		return nil, os.ErrNotExist
	}
	r, w := io.Pipe()
	return &fakeConsole{PipeReader: r, w: w, first: bytes.NewReader([]byte("hello"))}, nil
}

// Kept has what machine "N" printed last.
func (fakeConsoles) Kept(machineID string) ([]byte, error) {
	if machineID != "N" {
		return nil, os.ErrNotExist
	}
	return []byte("bye"), nil
}

type fakeConsole struct {
	*io.PipeReader
	w     *io.PipeWriter
	first *bytes.Reader
}

func (c *fakeConsole) Read(p []byte) (int, error) {
	if c.first.Len() > 0 {
		return c.first.Read(p)
	}
	return c.PipeReader.Read(p)
}
func (c *fakeConsole) Write(p []byte) (int, error) { return c.w.Write(p) }

func call[Req, Res any](t *testing.T, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	res, err := f(t.Context(), connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func TestUnconfigured(t *testing.T) {
	w := &world{t: t, local: &fakeLocal{}}
	w.serve(ForSocket(New(w.local, slog.New(slog.DiscardHandler)).Handler()))
	res, err := call(t, w.cluster.Status, &argonv1.StatusRequest{})
	if err != nil || res.GetState() != "unconfigured" {
		t.Errorf("status: %v, %v", res, err)
	}
	const says = "argon init"
	_, err = call(t, w.machines.ListMachines, &argonv1.ListMachinesRequest{})
	wantError(t, err, connect.CodeFailedPrecondition, says)
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "v", SizeBytes: mib})
	wantError(t, err, connect.CodeFailedPrecondition, says)
	stream := w.images.ImportImage(t.Context())
	_ = stream.Send(&argonv1.ImportImageRequest{})
	_, err = stream.Receive()
	wantError(t, err, connect.CodeFailedPrecondition, says)
	_, err = call(t, w.cluster.Init, &argonv1.InitRequest{ClusterName: "x", ServerName: "Bad"})
	wantError(t, err, connect.CodeInvalidArgument, "server name")
	_, err = call(t, w.cluster.Init, &argonv1.InitRequest{ClusterName: "x", ServerName: "a"})
	wantError(t, err, 0, "")
}

func TestVolumes(t *testing.T) {
	w := newWorld(t)
	w.agents()
	res, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: 10 * mib})
	if err != nil {
		t.Fatal(err)
	}
	if v := res.GetVolume(); v.GetHealth() != "healthy" || len(v.GetVolume().GetReplicas()) != 2 || len(res.GetWarnings()) > 0 {
		t.Errorf("got %v", res)
	}
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: 10 * mib})
	wantError(t, err, connect.CodeAlreadyExists, "data")
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "x", SizeBytes: 10 * mib, Replicas: 4})
	wantError(t, err, connect.CodeInvalidArgument, "replicas")
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "x", Image: "none"})
	wantError(t, err, connect.CodeNotFound, "none")
	thin, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "thin", SizeBytes: 1 << 40})
	if err != nil || len(thin.GetWarnings()) != 1 || !strings.Contains(thin.GetWarnings()[0], "may grow to 1.0 TiB") {
		t.Errorf("a volume larger than the disks: %v, %v", thin, err)
	}
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "large", SizeBytes: 17 << 40})
	wantError(t, err, connect.CodeResourceExhausted, "file system")
	_, err = call(t, w.volumes.ResizeVolume, &argonv1.ResizeVolumeRequest{Name: "thin", SizeBytes: 17 << 40})
	wantError(t, err, connect.CodeFailedPrecondition, "file system")
	_, err = call(t, w.volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: "thin"})
	w.must(err)

	degraded, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "three", SizeBytes: mib, Replicas: 3})
	if err != nil || len(degraded.GetWarnings()) != 1 || degraded.GetVolume().GetHealth() != "degraded" {
		t.Errorf("with too few servers: %v, %v", degraded, err)
	}
	list, err := call(t, w.volumes.ListVolumes, &argonv1.ListVolumesRequest{})
	if err != nil || len(list.GetVolumes()) != 2 || list.GetVolumes()[0].GetVolume().GetMeta().GetName() != "data" {
		t.Errorf("list: %v, %v", list, err)
	}
	_, err = call(t, w.volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: "data"})
	wantError(t, err, 0, "")
	_, err = call(t, w.volumes.GetVolume, &argonv1.GetVolumeRequest{Name: "data"})
	wantError(t, err, connect.CodeNotFound, "data")
	_, err = call(t, w.volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: "data"})
	wantError(t, err, connect.CodeNotFound, "data")
}

func TestConnect(t *testing.T) {
	w := newWorld(t)
	w.agents()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	fake := &fakeVolumes{closed: make(chan struct{})}
	w.parts.Volumes = fake
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := w.volumes.ConnectVolume(ctx, connect.NewRequest(&argonv1.ConnectVolumeRequest{Name: "data"}))
	w.must(err)
	if !stream.Receive() || stream.Msg().GetUri() == "" {
		t.Fatalf("no URI: %v", stream.Err())
	}
	cancel()
	<-fake.closed // the connection goes with its caller

	fake.err = errors.New("volume data is attached on server b")
	stream, err = w.volumes.ConnectVolume(t.Context(), connect.NewRequest(&argonv1.ConnectVolumeRequest{Name: "data"}))
	w.must(err)
	stream.Receive()
	wantError(t, stream.Err(), connect.CodeFailedPrecondition, "attached on server b")
}

func TestPromote(t *testing.T) {
	w := newWorld(t)
	w.agents()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	fake := &fakeVolumes{facts: ReplicaFacts{Incarnation: 9, Sealed: 41, Whole: true}}
	w.parts.Volumes = fake
	res, err := call(t, w.volumes.PromoteReplica, &argonv1.PromoteReplicaRequest{Volume: "data", Server: "b", AcceptLoss: true})
	w.must(err)
	v := res.GetVolume().GetVolume()
	if v.GetEpoch() != 42 || v.GetAttachment() != nil {
		t.Errorf("epoch %d, attached %v", v.GetEpoch(), v.GetAttachment())
	}
	for _, r := range v.GetReplicas() {
		if want := r.GetServerId() == "B"; (r.GetState() == inSync) != want || want && r.GetIncarnation() != 9 {
			t.Errorf("replica %v", r)
		}
	}
	fake.facts.Whole = false
	_, err = call(t, w.volumes.PromoteReplica, &argonv1.PromoteReplicaRequest{Volume: "data", Server: "a", AcceptLoss: true})
	wantError(t, err, connect.CodeFailedPrecondition, "not whole")
	fake.err = errors.New("connection refused")
	_, err = call(t, w.volumes.PromoteReplica, &argonv1.PromoteReplicaRequest{Volume: "data", Server: "a", AcceptLoss: true})
	wantError(t, err, connect.CodeUnavailable, "connection refused")
}
