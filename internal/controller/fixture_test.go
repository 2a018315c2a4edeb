package controller

import (
	"fmt"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const gib = 1 << 30

// noon is when every test plans; the cluster is a day old by then.
var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// fixture is a cluster that a test describes; names are ids.
type fixture struct{ *catalog.State }

func newFixture(servers ...string) fixture {
	f := fixture{&catalog.State{
		Servers:      map[string]*argonv1.Server{},
		Images:       map[string]*argonv1.Image{},
		Volumes:      map[string]*argonv1.Volume{},
		Machines:     map[string]*argonv1.Machine{},
		VolumeStatus: map[string]*argonv1.VolumeStatus{},
		Leases:       map[string]*argonv1.Lease{},
		Usage:        map[string]*argonv1.Usage{},
	}}
	for _, s := range servers {
		f.Servers[s] = &argonv1.Server{
			Meta:     meta(s),
			Capacity: &argonv1.Resources{Cpus: 10, MemoryBytes: 20 * gib, DiskBytes: 100 * gib},
		}
		f.alive(s)
	}
	return f
}

func meta(name string) *argonv1.Meta {
	return &argonv1.Meta{Id: name, Name: name, Revision: 7, Created: timestamppb.New(noon.Add(-24 * time.Hour))}
}

func (f fixture) alive(s string) {
	f.Leases[s] = &argonv1.Lease{ServerId: s}
}

func (f fixture) dead(servers ...string) fixture {
	for _, s := range servers {
		delete(f.Leases, s)
	}
	return f
}

func (f fixture) machine(name, server string, wanted argonv1.Wanted, state argonv1.MachineState) *argonv1.Machine {
	m := &argonv1.Machine{
		Meta: meta(name), ServerId: server, Wanted: wanted, Cpus: 1, MemoryBytes: gib, Placement: 3,
		Status: &argonv1.MachineStatus{
			State: state, ServerId: server, Placement: 3, Starts: 2, Since: timestamppb.New(noon.Add(-time.Minute)),
		},
	}
	f.Machines[name] = m
	return m
}

// volume adds a volume at rest; replicas are written "server:state", with ids
// from 1.
func (f fixture) volume(name string, wanted uint32, replicas ...string) *argonv1.Volume {
	v := &argonv1.Volume{
		Meta: meta(name), SizeBytes: gib, ReplicasWanted: wanted, Epoch: 4, Clean: true,
		NextReplicaId: uint32(len(replicas) + 1),
	}
	states := map[string]argonv1.ReplicaState{
		"new": creating, "in": inSync, "leaves": inSync, "out": outOfSync, "left": outOfSync, "gone": removing,
	}
	for i, r := range replicas {
		var server, state string
		for j := range r {
			if r[j] == ':' {
				server, state = r[:j], r[j+1:]
			}
		}
		v.Replicas = append(v.Replicas, &argonv1.Replica{
			Id: uint32(i + 1), ServerId: server, State: states[state], Retiring: state == "leaves" || state == "left",
			Since: timestamppb.New(noon.Add(-time.Minute)),
		})
	}
	f.Volumes[name] = v
	return v
}

// basedOn adds a volume that nobody attached yet, made of an image.
func (f fixture) basedOn(image string, replicas ...string) fixture {
	v := f.volume("based", uint32(len(replicas)), replicas...)
	v.Epoch, v.Base = 0, &argonv1.Base{ImageId: image}
	return f
}

// plan plans at noon; the servers that are lost have been for so long, and if
// that is any time, the cluster was told.
func (f fixture) plan(absent time.Duration) []Action {
	seen := f.watched(noon.Add(-absent)).Observe(f.State, noon)
	var told map[string]bool
	if absent > 0 {
		told = nowTold(nil, f.State, seen)
	}
	return Plan(f.State, noon, seen, told)
}

// watched is what somebody has seen who looks since yesterday, when every
// server had a lease; since an instant it has been as it is now.
func (f fixture) watched(since time.Time) Observation {
	before := *f.State
	before.Leases, before.Checkpoints = map[string]*argonv1.Lease{}, nil
	for id := range f.Servers {
		before.Leases[id] = &argonv1.Lease{ServerId: id}
	}
	return Observation{}.Observe(&before, noon.Add(-24*time.Hour)).Observe(f.State, since)
}

// show writes a volume's replicas as fixture.volume reads them.
func show(v *argonv1.Volume) []string {
	names := map[argonv1.ReplicaState]string{creating: "new", inSync: "in", outOfSync: "out", removing: "gone"}
	var out []string
	for _, r := range v.GetReplicas() {
		state := names[r.GetState()]
		if r.GetRetiring() {
			state = map[argonv1.ReplicaState]string{inSync: "leaves", outOfSync: "left"}[r.GetState()]
		}
		out = append(out, fmt.Sprintf("%s:%s", r.GetServerId(), state))
	}
	return out
}

// reasons lists the events of some actions.
func reasons(actions []Action) []string {
	var out []string
	for _, a := range actions {
		for _, e := range a.Events {
			out = append(out, e.GetReason())
		}
	}
	return out
}
