package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
	"github.com/argon-cluster/argon/internal/controller"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/fake"
	device "github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/volumetest"
)

// This file is a cluster for tests: a real etcd, the real controller and
// agents, and hosts whose guests, disks and volumes are made up. Volumes take
// epochs and change their in-sync sets by the rules of mirror.

const gib = 1 << 30

// world is the whole cluster.
type world struct {
	t     *testing.T
	cli   *clientv3.Client
	store *catalog.Store
	view  *catalog.View
	hosts map[string]*host

	mu      sync.Mutex
	holders map[string]*fakeAttachment       // by volume
	content map[string]*volumetest.MemDevice // by volume, for those with memory
	// rolledBack are the snapshots that volumes were rolled back to last.
	rolledBack map[string]uint32
	// atInstant, if it is set, is called while a guest stands still; and lateDisks
	// leaves the snapshots of that instant to be taken later.
	atInstant func() error
	lateDisks bool
	// atWake, if it is set, is called when a guest has read its memory.
	atWake func(*fake.Guest)
	// transfer is called at each step of a guest's way to another host.
	transfer func(ctx context.Context, step string) error
	census   fake.Census
}

// newRecords is a cluster of which there are only the records.
func newRecords(t *testing.T) *world {
	t.Helper()
	cli := catalogtest.Start(t)
	ctx, cancel := context.WithCancel(context.Background())
	store, err := catalog.Create(ctx, cli, &argonv1.Cluster{
		Id: "c", Name: "test", Settings: &argonv1.Settings{ReplicaGraceSeconds: 3600},
	})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		t: t, cli: cli, store: store, view: catalog.NewView(store, quiet()),
		hosts: map[string]*host{}, holders: map[string]*fakeAttachment{}, content: map[string]*volumetest.MemDevice{}, rolledBack: map[string]uint32{},
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.view.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return w
}

func newWorld(t *testing.T, servers ...string) *world {
	t.Helper()
	w := newRecords(t)
	for _, s := range servers {
		w.join(s)
	}
	observer := w.watched()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = controller.Run(ctx, controller.Options{
			ServerID: "leader", Store: w.store, Observer: observer, Tick: 50 * time.Millisecond, Log: quiet(),
		})
	})
	t.Cleanup(func() {
		for _, h := range w.hosts {
			h.kill()
		}
		cancel()
		wg.Wait()
	})
	return w
}

// watched is an observer that has seen the servers there are for an hour: it
// does not think that all have just come.
func (w *world) watched() *controller.Observer {
	w.t.Helper()
	if err := w.view.Sync(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	ago := time.Hour
	observer := controller.NewObserver(w.view, func() time.Time { return time.Now().Add(-ago) })
	observer.Look()
	ago = 0
	return observer
}

func quiet() *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.NewTextHandler(io.Discard, nil))
}

// join adds a server of 10 CPUs, 20 GiB of memory and 100 GiB of disk.
func (w *world) join(name string) {
	w.t.Helper()
	err := w.store.Servers.Create(w.t.Context(), &argonv1.Server{
		Meta:     &argonv1.Meta{Id: name, Name: name, Created: timestamppb.Now()},
		Capacity: &argonv1.Resources{Cpus: 10, MemoryBytes: 20 * gib, DiskBytes: 100 * gib},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	h := &host{world: w, id: name, tick: 20 * time.Millisecond, replicas: map[string][]uint32{}, images: map[string]bool{}}
	h.monitor.Census = &w.census
	w.hosts[name] = h
	h.start()
}

// create makes a machine m with one volume v, as the API does.
func (w *world) create(replicas uint32, on ...string) {
	w.t.Helper()
	v := &argonv1.Volume{
		Meta: &argonv1.Meta{Id: "v", Name: "v"}, SizeBytes: gib, ReplicasWanted: replicas, NextReplicaId: uint32(len(on) + 1),
	}
	for i, s := range on {
		v.Replicas = append(v.Replicas, &argonv1.Replica{
			Id: uint32(i + 1), ServerId: s, State: argonv1.ReplicaState_REPLICA_STATE_CREATING,
		})
	}
	m := &argonv1.Machine{
		Meta: &argonv1.Meta{Id: "m", Name: "m"}, Cpus: 1, MemoryBytes: gib, VolumeIds: []string{"v"},
		Wanted: argonv1.Wanted_WANTED_RUNNING, Acceleration: "auto",
	}
	if err := w.store.Txn().Create(v).Create(m).Commit(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// want changes what is wanted of the machine.
func (w *world) want(wanted argonv1.Wanted) {
	w.t.Helper()
	_, err := w.store.Machines.Update(w.t.Context(), "m", func(m *argonv1.Machine) error {
		m.Wanted = wanted
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// until waits for the catalog to come to be as told.
func (w *world) until(what string, ok func(*catalog.State) bool) *catalog.State {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	for {
		changed := w.view.Changed()
		st := w.view.State()
		if st != nil && ok(st) {
			return st
		}
		select {
		case <-changed:
		case <-ctx.Done():
			w.t.Fatalf("never %s; machine: %v; volume: %v", what, st.Machines["m"], st.Volumes["v"])
		}
	}
}

// runs waits until the machine is seen running in a placement that is new.
func (w *world) runs(after uint64) *argonv1.Machine {
	w.t.Helper()
	return w.until("running", func(st *catalog.State) bool {
		s := st.Machines["m"].GetStatus()
		return s.GetState() == stateRunning && s.GetPlacement() > after && s.GetPlacement() == st.Machines["m"].GetPlacement()
	}).Machines["m"]
}

// guests counts those that run on all hosts.
func (w *world) guests() int {
	n := 0
	for _, h := range w.hosts {
		n += len(h.monitor.Guests())
	}
	return n
}

// stops has the machine stopped, and waits until nobody uses its volume.
func (w *world) stops() {
	w.t.Helper()
	w.want(wantStopped)
	w.until("at rest", func(st *catalog.State) bool {
		return st.Machines["m"].GetServerId() == "" && st.Volumes["v"].GetAttachment() == nil
	})
}

// tells waits for an event about the machine.
func (w *world) tells(reason string) {
	w.t.Helper()
	w.tellsOf("machine", "m", reason)
}

func (w *world) tellsOf(kind, name, reason string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	found := errors.New("found")
	err := w.store.Events.Watch(ctx, 1000, catalog.EventFilter{Kind: kind, Name: name}, nil, func(e *argonv1.Event) error {
		if e.GetReason() == reason {
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		w.t.Errorf("no event %s: %v", reason, err)
	}
}

// host is a server: what outlives its daemon, and the daemon while it runs.
type host struct {
	world *world
	id    string

	mu       sync.Mutex
	replicas map[string][]uint32
	contents map[string]*contents
	images   map[string]bool
	used     uint64 // of 50 GiB
	// badDisk is why the disk can't be used, leftovers what is to be deleted then.
	badDisk   string
	leftovers map[string][]uint32
	// attachFails is what the next attachment fails with, attachTakes how long
	// one takes.
	attachFails error
	attachTakes time.Duration

	monitor fake.Monitor
	tick    time.Duration // of the daemons to come
	agent   *Agent
	lease   clientv3.LeaseID
	crashed *atomic.Bool // the daemon was killed: nothing of it does anything
	stop    context.CancelFunc
	done    chan struct{}
}

// start starts the daemon, with a new lease if it has none.
func (h *host) start() {
	w := h.world
	ctx, cancel := context.WithCancel(context.Background())
	if h.lease == clientv3.NoLease {
		grant, err := w.cli.Grant(ctx, 600)
		if err != nil {
			w.t.Fatal(err)
		}
		h.lease = grant.ID
		if err := w.store.PutLease(ctx, h.lease, &argonv1.Lease{ServerId: h.id, TtlSeconds: 3}); err != nil {
			w.t.Fatal(err)
		}
	}
	h.crashed = &atomic.Bool{}
	view := catalog.NewView(w.store, quiet())
	h.agent = New(Options{
		ServerID: h.id, Store: w.store, View: view, Gate: &fakeGate{view: view, id: h.id},
		Volumes: &fakeVolumes{host: h, crashed: h.crashed}, Replicas: (*fakeReplicas)(h), Space: (*fakeSpace)(h), Images: (*fakeImages)(h),
		Ports: fakePorts{}, Dirs: fakeDirs{}, Seeds: fakeSeeds{}, Monitor: hostMonitor{&h.monitor, w}, Carrier: fakeCarrier{h}, Now: time.Now, Tick: h.tick, Log: quiet().With("server", h.id),
	})
	h.stop, h.done = cancel, make(chan struct{})
	go func() {
		defer close(h.done)
		var wg sync.WaitGroup
		wg.Go(func() { _ = view.Run(ctx) })
		_ = h.agent.Run(ctx)
		wg.Wait()
	}()
}

// end ends the daemon in order; its guests go on.
func (h *host) end() {
	h.stop()
	<-h.done
	if twice := h.monitor.Twice(); len(twice) > 0 {
		h.world.t.Errorf("server %s started %v beside another guest", h.id, twice)
	}
}

// crash ends the daemon without warning; its guests go on.
func (h *host) crash() {
	h.crashed.Store(true)
	h.end()
}

// kill ends all of the server's processes at once, and its lease.
func (h *host) kill() {
	h.crash()
	h.monitor.KillAll()
	if h.lease != clientv3.NoLease {
		if _, err := h.world.cli.Revoke(context.Background(), h.lease); err != nil {
			h.world.t.Error(err)
		}
		h.lease = clientv3.NoLease
	}
}

// catchUp waits until the host's view, which is its own, shows what the world's does.
func (h *host) catchUp() {
	h.world.t.Helper()
	if err := h.agent.View.WaitFor(h.world.t.Context(), h.world.view.State().Revision); err != nil {
		h.world.t.Fatal(err)
	}
}

// guest is the one guest that runs on the host.
func (h *host) guest() *fake.Guest {
	if all := h.monitor.Guests(); len(all) > 0 {
		return all[0]
	}
	return nil
}

// hostMonitor tells the world of what its guests do.
type hostMonitor struct {
	*fake.Monitor
	world *world
}

func (m hostMonitor) Wake(ctx context.Context, spec hypervisor.Spec, memory io.Reader) (hypervisor.Guest, error) {
	g, err := m.Monitor.Wake(ctx, spec, memory)
	if err == nil && m.world.atWake != nil {
		m.world.atWake(g.(*fake.Guest))
	}
	return g, err
}

// fakeGate opens while the view shows the server's lease.
type fakeGate struct {
	view *catalog.View
	id   string
}

func (g *fakeGate) Allowed(int64) bool {
	st := g.view.State()
	return st != nil && st.Leases[g.id] != nil
}

type fakePorts struct{}

func (fakePorts) Open(_ context.Context, m *argonv1.Machine, _ string) ([]hypervisor.Port, error) {
	var ports []hypervisor.Port
	for _, p := range m.GetPorts() {
		ports = append(ports, hypervisor.Port{HostAddress: "127.0.0.1", HostPort: 1, GuestPort: int(p.GetGuestPort())})
	}
	return ports, nil
}
func (fakePorts) Close(string) {}

type fakeSeeds struct{}

func (fakeSeeds) Write(dir string, m *argonv1.Machine) (string, error) {
	return filepath.Join(dir, m.GetMeta().GetName()), nil
}

type fakeDirs struct{}

func (fakeDirs) Make(id string) (string, error) { return "/nowhere/" + id, nil }
func (fakeDirs) Remove(string, string)          {}
func (fakeDirs) Kept() []string                 { return nil }
func (fakeDirs) Forget(string)                  {}

// fakeReplicas are the replicas on a host's disk.
type fakeReplicas host

func (r *fakeReplicas) List(context.Context) (map[string][]uint32, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := map[string][]uint32{}
	for v, ids := range r.replicas {
		list[v] = slices.Clone(ids)
	}
	return list, nil
}

func (r *fakeReplicas) Create(_ context.Context, req CreateReplica) (Made, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id := req.Base.GetImageId(); id != "" && !r.images[id] {
		return Made{}, fmt.Errorf("image %s is not here", id)
	}
	if req.Base != nil {
		r.content(req.VolumeID, req.ReplicaID).base = 5
	}
	if !slices.Contains(r.replicas[req.VolumeID], req.ReplicaID) {
		r.replicas[req.VolumeID] = append(r.replicas[req.VolumeID], req.ReplicaID)
	}
	if req.Behind || req.Base == nil {
		return Made{Incarnation: 1}, nil
	}
	return Made{1, mirror.FirstGeneration}, nil
}

func (r *fakeReplicas) Remove(_ context.Context, volumeID string, id uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.replicas[volumeID] = slices.DeleteFunc(r.replicas[volumeID], func(x uint32) bool { return x == id })
	if len(r.replicas[volumeID]) == 0 {
		delete(r.replicas, volumeID)
	}
	return nil
}

func (r *fakeReplicas) Leave(volumeID string, id uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leftovers == nil {
		r.leftovers = map[string][]uint32{}
	}
	if !slices.Contains(r.leftovers[volumeID], id) {
		r.leftovers[volumeID] = append(r.leftovers[volumeID], id)
	}
	return nil
}

func (r *fakeReplicas) Leftovers() (map[string][]uint32, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := map[string][]uint32{}
	for v, ids := range r.leftovers {
		list[v] = slices.Clone(ids)
	}
	return list, nil
}

func (r *fakeReplicas) RemoveLeftover(volumeID string, id uint32) error {
	if err := r.Remove(context.Background(), volumeID, id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.leftovers, volumeID)
	return nil
}

// contents are those of a replica: how many steps its base still takes, its
// snapshots, and how many steps the deleted ones take.
type contents struct {
	inUse     uint32 // a snapshot that cannot go
	base      int
	snapshots []uint32
	untidy    int
}

func (r *fakeReplicas) content(volumeID string, id uint32) *contents {
	key := fmt.Sprint(volumeID, "/", id)
	if r.contents == nil {
		r.contents = map[string]*contents{}
	}
	if r.contents[key] == nil {
		r.contents[key] = &contents{}
	}
	return r.contents[key]
}

func (r *fakeReplicas) Inside(volumeID string, id uint32) (Inside, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.content(volumeID, id)
	return Inside{Based: c.base > 0, Snapshots: slices.Clone(c.snapshots), Untidy: c.untidy > 0}, nil
}

func (r *fakeReplicas) Forget(volumeID string, id, snapshot uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.content(volumeID, id)
	if snapshot == c.inUse {
		return fmt.Errorf("snapshot %d is in use", snapshot)
	}
	c.snapshots = slices.DeleteFunc(c.snapshots, func(s uint32) bool { return s == snapshot })
	c.untidy += 3
	return nil
}

func (r *fakeReplicas) Tidy(_ context.Context, volumeID string, id uint32) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.content(volumeID, id)
	c.untidy = max(0, c.untidy-1)
	return c.untidy > 0, nil
}

func (r *fakeReplicas) DetachBase(_ context.Context, volumeID string, id uint32) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.content(volumeID, id)
	c.base = max(0, c.base-1)
	return c.base > 0, nil
}

// fakeSpace is a host's disk.
type fakeSpace host

func (s *fakeSpace) Measure() (*argonv1.Usage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &argonv1.Usage{FreeBytes: 50*gib - s.used, TotalBytes: 100 * gib, ReserveBytes: gib}, nil
}

func (s *fakeSpace) Disk() *argonv1.Disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &argonv1.Disk{Path: "/volumes", Problem: s.badDisk}
}

// fakeImages are the images on a host's disk.
type fakeImages host

func (i *fakeImages) List(context.Context) ([]string, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var ids []string
	for id := range i.images {
		ids = append(ids, id)
	}
	return ids, nil
}

func (i *fakeImages) Has(_ context.Context, id string) (bool, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.images[id], nil
}

func (i *fakeImages) Fetch(_ context.Context, image *argonv1.Image, from []*argonv1.Server, _ func(copied, checked int64)) error {
	source := i.world.hosts[from[0].GetMeta().GetId()]
	source.mu.Lock()
	has := source.images[image.GetMeta().GetId()]
	source.mu.Unlock()
	if !has {
		return errors.New("the source does not have it")
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.images[image.GetMeta().GetId()] = true
	return nil
}

func (i *fakeImages) Remove(_ context.Context, id string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.images, id)
	return nil
}

// contentOf is what a volume holds, on whatever server.
func (w *world) contentOf(v *argonv1.Volume) *volumetest.MemDevice {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := v.GetMeta().GetId()
	if w.content[id] == nil {
		w.content[id] = volumetest.New(8<<20, 1)
		w.t.Cleanup(func() { _ = w.content[id].Close() })
	}
	return w.content[id]
}

// fakeVolumes attaches volumes by the rules of mirror, without any data. A
// replica that is behind is copied to as soon as its server lives.
type fakeVolumes struct {
	host       *host
	crashed    *atomic.Bool
	holdDetach atomic.Pointer[held]
	// holdOver holds what is over already.
	holdOver atomic.Pointer[held]
}

// held makes what is under way wait for the test.
type held struct{ began, goOn chan struct{} }

func (f *fakeVolumes) Attach(ctx context.Context, req AttachRequest) (Attachment, error) {
	w := f.host.world
	f.host.mu.Lock()
	fails, takes := f.host.attachFails, f.host.attachTakes
	f.host.attachFails = nil
	f.host.mu.Unlock()
	if fails != nil {
		return nil, fails
	}
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	v, err := w.store.Volumes.Update(ctx, req.VolumeID, func(v *argonv1.Volume) error {
		if v.GetEpoch() != req.Epoch {
			return fmt.Errorf("epoch %d, not %d: %w", v.GetEpoch(), req.Epoch, ErrOvertaken)
		}
		_, err := mirror.Take(v, mirror.Holder{ServerID: f.host.id, MachineID: req.MachineID}, time.Now())
		return err
	})
	if err != nil {
		return nil, err
	}
	a := &fakeAttachment{
		MemDevice: w.contentOf(v), volumes: f, id: req.VolumeID, epoch: v.GetEpoch(), ready: make(chan struct{}), done: make(chan struct{}), stopped: make(chan struct{}),
	}
	w.mu.Lock()
	old := w.holders[a.id]
	w.holders[a.id] = a
	w.mu.Unlock()
	if old != nil {
		old.end(mirror.ErrDeposed)
	}
	var loop context.Context
	loop, a.cancel = context.WithCancel(context.Background())
	go a.serve(loop)
	return a, nil
}

// Instant implements Volumes: all snapshots of the group are taken at once.
func (f *fakeVolumes) Instant(ctx context.Context, group string, _ int, stop func(context.Context) error) error {
	if err := stop(ctx); err != nil {
		return err
	}
	if at := f.host.world.atInstant; at != nil {
		if err := at(); err != nil {
			return err
		}
	}
	w := f.host.world
	if w.lateDisks {
		return nil
	}
	for id := range w.view.State().Volumes {
		_, err := w.store.Volumes.Update(ctx, id, func(v *argonv1.Volume) error {
			err := catalog.ErrUnchanged
			for _, s := range v.GetSnapshots() {
				if s.GetGroup() == group {
					s.State, err = argonv1.SnapshotState_SNAPSHOT_STATE_READY, nil
					for _, r := range v.GetReplicas() {
						s.ReplicaIds = append(s.ReplicaIds, r.GetId())
					}
				}
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// StandBy implements Volumes.
func (f *fakeVolumes) StandBy(_ context.Context, volumeID, _ string, _ int64) (Attachment, error) {
	ready := make(chan struct{})
	close(ready)
	return &fakeStandby{id: volumeID, ready: ready, done: make(chan struct{})}, nil
}

// fakeStandby is a volume's socket and nothing else.
type fakeStandby struct {
	id          string
	ready, done chan struct{}
	once        sync.Once
}

func (s *fakeStandby) Disk() hypervisor.Disk {
	return hypervisor.Disk{Socket: "/nowhere/" + s.id, Export: s.id}
}
func (s *fakeStandby) Ready() <-chan struct{}        { return s.ready }
func (s *fakeStandby) Done() <-chan struct{}         { return s.done }
func (s *fakeStandby) Err() error                    { return nil }
func (s *fakeStandby) Device() device.Device         { return nil }
func (s *fakeStandby) Status() *argonv1.VolumeStatus { return &argonv1.VolumeStatus{} }
func (s *fakeStandby) Abandon()                      { s.once.Do(func() { close(s.done) }) }
func (s *fakeStandby) Detach(context.Context) error  { s.Abandon(); return nil }

// fakeCarrier leads to the guests of the other hosts.
type fakeCarrier struct{ host *host }

func (c fakeCarrier) Open(_ context.Context, serverID, guestID string) (net.Conn, error) {
	w := c.host.world
	for _, g := range w.hosts[serverID].monitor.Guests() {
		if s, _ := g.Status(context.Background()); g.ID() == guestID && s.State == hypervisor.Receiving {
			w.mu.Lock()
			defer w.mu.Unlock()
			return &fake.Line{To: g, At: w.at}, nil
		}
	}
	return nil, errors.New("no guest waits there")
}

// at is called when a transfer comes to a step.
func (w *world) at(ctx context.Context, step string) error {
	w.mu.Lock()
	f := w.transfer
	w.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(ctx, step)
}

type fakeAttachment struct {
	*volumetest.MemDevice // what the volume holds

	volumes *fakeVolumes
	id      string
	epoch   uint64
	ready   chan struct{}
	done    chan struct{}
	stopped chan struct{} // serve has returned
	cancel  context.CancelFunc
	once    sync.Once

	mu   sync.Mutex
	err  error
	full bool
}

func (a *fakeAttachment) Disk() hypervisor.Disk {
	return hypervisor.Disk{Socket: "/nowhere/" + a.id + ".nbd", Export: a.id}
}
func (a *fakeAttachment) Device() device.Device  { return nil }
func (a *fakeAttachment) Ready() <-chan struct{} { return a.ready }
func (a *fakeAttachment) Done() <-chan struct{}  { return a.done }

func (a *fakeAttachment) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

func (a *fakeAttachment) end(err error) {
	a.once.Do(func() {
		a.mu.Lock()
		a.err = err
		a.mu.Unlock()
		a.cancel()
		<-a.stopped
		close(a.done)
	})
}

// serve keeps the in-sync set equal to the replicas whose servers live.
func (a *fakeAttachment) serve(ctx context.Context) {
	defer close(a.stopped)
	close(a.ready)
	w := a.volumes.host.world
	for {
		changed := w.view.Changed()
		if !a.volumes.crashed.Load() {
			_ = a.propose(ctx, false)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (a *fakeAttachment) propose(ctx context.Context, release bool) error {
	w := a.volumes.host.world
	_, err := w.store.Volumes.Update(ctx, a.id, func(v *argonv1.Volume) error {
		var set []mirror.Member
		same, stay := true, 0
		for _, r := range v.GetReplicas() {
			if inSync(r) && !r.GetRetiring() && w.view.State().Leases[r.GetServerId()] != nil {
				stay++
			}
		}
		for _, r := range v.GetReplicas() {
			made := r.GetState() == argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC && !r.GetRetiring() ||
				inSync(r) && (!r.GetRetiring() || stay < int(v.GetReplicasWanted()))
			if lives := w.view.State().Leases[r.GetServerId()] != nil; made && lives {
				set = append(set, mirror.Member{ID: r.GetId(), Incarnation: 1})
				same = same && inSync(r)
			} else if inSync(r) {
				same = false
			}
		}
		if (same && !release && v.GetRollbackTo() == 0) || len(set) == 0 {
			return catalog.ErrUnchanged
		}
		if v.GetRollbackTo() != 0 {
			w.mu.Lock()
			w.rolledBack[a.id] = v.GetRollbackTo()
			w.mu.Unlock()
		}
		v.RollbackTo = 0
		return mirror.Apply(v, mirror.Proposal{Epoch: a.epoch, InSync: set, Release: release, Clean: release}, time.Now())
	})
	return err
}

func (a *fakeAttachment) Detach(ctx context.Context) error {
	if a.volumes.crashed.Load() {
		a.Abandon()
		return nil
	}
	if hold := a.volumes.holdDetach.Load(); hold != nil {
		hold.began <- struct{}{}
		<-hold.goOn
	}
	err := a.propose(ctx, true)
	a.end(err)
	if hold := a.volumes.holdOver.Load(); hold != nil {
		hold.began <- struct{}{}
		<-hold.goOn
	}
	return err
}

func (a *fakeAttachment) Abandon() { a.end(mirror.ErrAbandoned) }

func (a *fakeAttachment) Status() *argonv1.VolumeStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.full {
		return &argonv1.VolumeStatus{Condition: "full", Detail: "a replica's disk has no room"}
	}
	return &argonv1.VolumeStatus{Condition: "serving"}
}

func (a *fakeAttachment) setFull(full bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.full = full
}

// untilHosts waits until something is true of every host: at the end of a
// pass of its agent at the latest.
func (w *world) untilHosts(what string, ok func(*host) bool) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	for _, h := range w.hosts {
		for {
			h.agent.mu.Lock()
			passed := h.agent.passed
			h.agent.mu.Unlock()
			h.mu.Lock()
			done := ok(h)
			h.mu.Unlock()
			if done {
				break
			}
			select {
			case <-passed:
			case <-ctx.Done():
				w.t.Fatalf("server %s never was %s", h.id, what)
			}
		}
	}
}
