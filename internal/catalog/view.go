package catalog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// State is the whole catalog at one revision, without events, tokens and
// secrets. It is shared and must not be changed; its maps are by id, Leases by
// the server's id.
type State struct {
	Revision     int64
	Cluster      *argonv1.Cluster
	Servers      map[string]*argonv1.Server
	Images       map[string]*argonv1.Image
	Volumes      map[string]*argonv1.Volume
	Machines     map[string]*argonv1.Machine
	VolumeStatus map[string]*argonv1.VolumeStatus
	Leases       map[string]*argonv1.Lease
}

func newState() *State {
	return &State{
		Servers:      map[string]*argonv1.Server{},
		Images:       map[string]*argonv1.Image{},
		Volumes:      map[string]*argonv1.Volume{},
		Machines:     map[string]*argonv1.Machine{},
		VolumeStatus: map[string]*argonv1.VolumeStatus{},
		Leases:       map[string]*argonv1.Lease{},
	}
}

// clone copies the maps; records are replaced, never changed, so they are
// shared.
func (st *State) clone() *State {
	c := *st
	c.Servers, c.Images = maps.Clone(st.Servers), maps.Clone(st.Images)
	c.Volumes, c.Machines = maps.Clone(st.Volumes), maps.Clone(st.Machines)
	c.VolumeStatus, c.Leases = maps.Clone(st.VolumeStatus), maps.Clone(st.Leases)
	return &c
}

// View keeps a copy of the catalog up to date, for loops that compare what
// should be with what is. Safe for concurrent use.
type View struct {
	store *Store
	log   *slog.Logger

	mu      sync.Mutex
	state   *State
	changed chan struct{}
}

// NewView makes a view; it is empty until Run has read the catalog.
func NewView(s *Store, log *slog.Logger) *View {
	return &View{store: s, log: log, changed: make(chan struct{})}
}

// State is the newest known; nil before the first was read.
func (v *View) State() *State {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state
}

// Changed is closed when State changes next. Take it before State: then no
// change is missed.
func (v *View) Changed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}

// WaitFor waits until the view has the revision.
func (v *View) WaitFor(ctx context.Context, revision int64) error {
	for {
		changed := v.Changed()
		if st := v.State(); st != nil && st.Revision >= revision {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("catalog: wait for revision %d: %w", revision, ctx.Err())
		}
	}
}

// Sync waits until the view has everything that was written before the call.
func (v *View) Sync(ctx context.Context) error {
	// A linearizable read of one key gives the revision of the whole.
	res, err := v.store.cli.Get(ctx, clusterKey, clientv3.WithCountOnly())
	if err != nil {
		return fmt.Errorf("catalog: ask for the newest revision: %w", err)
	}
	// The watch tells of revisions below prefix only; ask for the newest such.
	return v.waitForPrefix(ctx, res.Header.Revision)
}

// waitForPrefix waits for a revision that may not concern the catalog, by
// asking the watch how far it is.
func (v *View) waitForPrefix(ctx context.Context, revision int64) error {
	for {
		changed := v.Changed()
		if st := v.State(); st != nil && st.Revision >= revision {
			return nil
		}
		if err := v.store.cli.RequestProgress(clientv3.WithRequireLeader(ctx)); err != nil {
			return fmt.Errorf("catalog: ask the watch how far it is: %w", err)
		}
		t := time.NewTimer(20 * time.Millisecond)
		select {
		case <-changed:
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("catalog: wait for revision %d: %w", revision, ctx.Err())
		}
		t.Stop()
	}
}

const (
	readTimeout = 5 * time.Second
	firstPause  = 50 * time.Millisecond
	maxPause    = time.Second
)

// Run reads the catalog and follows it until ctx ends. Whatever happens to
// etcd or the connection, it begins again; a history that was compacted in
// between is read as a whole.
func (v *View) Run(ctx context.Context) error {
	pause := firstPause
	for {
		began := time.Now()
		err := v.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > maxPause {
			pause = firstPause
		}
		v.log.Warn("the catalog cannot be followed; trying again", "err", err)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
		pause = min(2*pause, maxPause)
	}
}

// follow reads everything once and then applies changes until something
// breaks.
func (v *View) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := v.load(ctx)
	if err != nil {
		return err
	}
	v.publish(st)
	w := v.store.cli.Watch(clientv3.WithRequireLeader(ctx), prefix, clientv3.WithPrefix(), clientv3.WithRev(st.Revision+1))
	for res := range w {
		if err := res.Err(); err != nil {
			return fmt.Errorf("catalog: watch: %w", err)
		}
		next := st.clone()
		next.Revision = max(st.Revision, res.Header.Revision)
		for _, e := range res.Events {
			if err := v.apply(next, e.Type == mvccpb.Event_PUT, e.Kv); err != nil {
				return err
			}
		}
		if next.Revision == st.Revision && len(res.Events) == 0 {
			continue
		}
		st = next
		v.publish(st)
	}
	return errors.Join(errors.New("catalog: the watch ended"), ctx.Err())
}

func (v *View) load(ctx context.Context) (*State, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	// Events and secrets are read by those who want them.
	ranges := []string{schemaKey, clusterKey, leases}
	for _, kind := range []string{"server", "image", "volume", "machine", "volume-status"} {
		ranges = append(ranges, prefix+kind+"/")
	}
	var ops []clientv3.Op
	for _, r := range ranges {
		ops = append(ops, clientv3.OpGet(r, clientv3.WithPrefix()))
	}
	res, err := v.store.cli.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return nil, fmt.Errorf("catalog: read everything: %w", err)
	}
	st := newState()
	st.Revision = res.Header.Revision
	for _, r := range res.Responses {
		for _, kv := range r.GetResponseRange().Kvs {
			if err := v.apply(st, true, kv); err != nil {
				return nil, err
			}
		}
	}
	if st.Cluster == nil {
		return nil, fmt.Errorf("catalog: %w", ErrNoCluster)
	}
	return st, nil
}

func (v *View) publish(st *State) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.state = st
	close(v.changed)
	v.changed = make(chan struct{})
}

// apply puts one key into the state, or takes it out.
func (v *View) apply(st *State, put bool, kv *mvccpb.KeyValue) error {
	kind, id, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), prefix), "/")
	switch kind {
	case "cluster":
		st.Cluster = &argonv1.Cluster{}
		return proto.Unmarshal(kv.Value, st.Cluster)
	case "leases":
		return applyLease(st.Leases, put, id, kv.Value)
	case v.store.Servers.kind:
		return apply(v.store.Servers, st.Servers, put, id, kv)
	case v.store.Images.kind:
		return apply(v.store.Images, st.Images, put, id, kv)
	case v.store.Volumes.kind:
		return apply(v.store.Volumes, st.Volumes, put, id, kv)
	case v.store.Machines.kind:
		return apply(v.store.Machines, st.Machines, put, id, kv)
	case v.store.status.kind:
		return apply(v.store.status, st.VolumeStatus, put, id, kv)
	}
	return nil
}

func apply[T Record](t *Table[T], m map[string]T, put bool, id string, kv *mvccpb.KeyValue) error {
	if !put {
		delete(m, id)
		return nil
	}
	r, err := t.decode(kv.Value, kv.ModRevision)
	if err != nil {
		return err
	}
	m[id] = r
	return nil
}

func applyLease(m map[string]*argonv1.Lease, put bool, id string, value []byte) error {
	if !put {
		delete(m, id)
		return nil
	}
	l := &argonv1.Lease{}
	if err := proto.Unmarshal(value, l); err != nil {
		return fmt.Errorf("catalog: the lease of server %s is damaged: %w", id, err)
	}
	m[id] = l
	return nil
}
