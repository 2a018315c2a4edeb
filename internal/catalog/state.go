package catalog

import (
	"fmt"
	"maps"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// State is the whole catalog at one revision, without events, tokens and
// secrets. It is shared and must not be changed, nor may its records; its maps
// are by id, Leases and Usage by the server's id.
type State struct {
	// Revision is etcd's: everything written up to it is in here, nothing
	// written after it.
	Revision     int64
	Cluster      *argonv1.Cluster
	Servers      map[string]*argonv1.Server
	Images       map[string]*argonv1.Image
	Volumes      map[string]*argonv1.Volume
	Machines     map[string]*argonv1.Machine
	VolumeStatus map[string]*argonv1.VolumeStatus
	Leases       map[string]*argonv1.Lease
	Checkpoints  map[string]*argonv1.Checkpoint
	Usage        map[string]*argonv1.Usage
	// Clients are the certificates of remote administrators, by serial number.
	Clients map[string]*argonv1.ClientCertificate
	// Full: the catalog takes nothing that makes it larger.
	Full bool
}

func newState(revision int64) *State {
	return &State{
		Revision:     revision,
		Servers:      map[string]*argonv1.Server{},
		Images:       map[string]*argonv1.Image{},
		Volumes:      map[string]*argonv1.Volume{},
		Machines:     map[string]*argonv1.Machine{},
		VolumeStatus: map[string]*argonv1.VolumeStatus{},
		Leases:       map[string]*argonv1.Lease{},
		Checkpoints:  map[string]*argonv1.Checkpoint{},
		Usage:        map[string]*argonv1.Usage{},
		Clients:      map[string]*argonv1.ClientCertificate{},
	}
}

// edition is a state in the making. The maps that it has not changed are those
// of the state it comes from.
type edition struct {
	*State
	store *Store
	// own has the kinds whose map belongs to this edition already.
	own map[string]bool
}

// edit begins the next state.
func (st *State) edit(s *Store) *edition {
	next := *st
	return &edition{State: &next, store: s, own: map[string]bool{}}
}

// apply makes the change of one key below statePrefix. A kind that it does not
// know is one that a newer argon has added, and is passed over.
func (e *edition) apply(put bool, kv *mvccpb.KeyValue) error {
	kind, id, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), statePrefix), "/")
	switch kind {
	case "cluster":
		return e.applyCluster(put, kv)
	case "full":
		e.Full = put
		return nil
	case "lease":
		return applyTo(e, &e.Leases, lease(), put, id, kv)
	case e.store.Servers.kind:
		return applyTo(e, &e.Servers, e.store.Servers.traits, put, id, kv)
	case e.store.Images.kind:
		return applyTo(e, &e.Images, e.store.Images.traits, put, id, kv)
	case e.store.Volumes.kind:
		return applyTo(e, &e.Volumes, e.store.Volumes.traits, put, id, kv)
	case e.store.Machines.kind:
		return applyTo(e, &e.Machines, e.store.Machines.traits, put, id, kv)
	case e.store.Checkpoints.kind:
		return applyTo(e, &e.Checkpoints, e.store.Checkpoints.traits, put, id, kv)
	case e.store.Clients.kind:
		return applyTo(e, &e.Clients, e.store.Clients.traits, put, id, kv)
	case e.store.status.kind:
		return applyTo(e, &e.VolumeStatus, e.store.status, put, id, kv)
	case e.store.usage.kind:
		return applyTo(e, &e.Usage, e.store.usage, put, id, kv)
	}
	return nil
}

func (e *edition) applyCluster(put bool, kv *mvccpb.KeyValue) error {
	if !put {
		return errNoCluster()
	}
	c := &argonv1.Cluster{}
	if err := proto.Unmarshal(kv.Value, c); err != nil {
		return fmt.Errorf("catalog: the cluster record is damaged: %w", err)
	}
	e.Cluster = c
	return nil
}

func applyTo[T Record](e *edition, records *map[string]T, t traits[T], put bool, id string, kv *mvccpb.KeyValue) error {
	if !e.own[t.kind] {
		*records = maps.Clone(*records)
		e.own[t.kind] = true
	}
	if !put {
		delete(*records, id)
		return nil
	}
	r, err := t.decode(kv)
	if err != nil {
		return err
	}
	(*records)[id] = r
	return nil
}

func lease() traits[*argonv1.Lease] {
	return traits[*argonv1.Lease]{
		kind:         "lease",
		fresh:        func() *argonv1.Lease { return &argonv1.Lease{} },
		setRevisions: func(l *argonv1.Lease, changed, _ int64) { l.Revision = changed },
	}
}
