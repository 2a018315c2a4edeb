package rpc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

const (
	// maxSnapshots is how many a volume may have. Each makes reading a little
	// dearer, and a replica keeps 100 in 128 layers, some of which may be of
	// snapshots that are gone and not tidied yet.
	maxSnapshots = 96
	maxLabels    = 32
	// snapshotTimeout bounds how long a call waits for its snapshot.
	snapshotTimeout = 2 * time.Minute

	beingTaken = argonv1.SnapshotState_SNAPSHOT_STATE_CREATING
	taken      = argonv1.SnapshotState_SNAPSHOT_STATE_READY
)

type snapshotService struct{ *API }

// findSnapshot finds a snapshot by its names.
func findSnapshot(st *catalog.State, volume, name string) (*argonv1.Volume, *argonv1.Snapshot, error) {
	v, ok := byName(st.Volumes, volume)
	if !ok {
		return nil, nil, notFound("volume", volume)
	}
	if s := snapshotOf(v, name); s != nil {
		return v, s, nil
	}
	return nil, nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("volume %s has no snapshot %q: see `argon snapshot ls %s`", volume, name, volume))
}

// snapshotOf is nil if the volume has none of that name.
func snapshotOf(v *argonv1.Volume, name string) *argonv1.Snapshot {
	for _, s := range v.GetSnapshots() {
		if s.GetName() == name {
			return s
		}
	}
	return nil
}

// usableSnapshot refuses one that nothing can be made from.
func usableSnapshot(v *argonv1.Volume, s *argonv1.Snapshot) error {
	name := v.GetMeta().GetName() + "/" + s.GetName()
	switch {
	case v.GetRemoving():
		return precondition("volume %s is being removed", v.GetMeta().GetName())
	case s.GetRemoving():
		return precondition("snapshot %s is being removed", name)
	case s.GetState() != taken:
		return precondition("snapshot %s is still being taken: try again", name)
	}
	return nil
}

// subjects are the volumes that a call about a volume, or about all of a
// machine's, is about. The machine goes into the transaction, so that it has
// the same disks when that is made.
func subjects(st *catalog.State, txn *catalog.Txn, volume, machine string) ([]*argonv1.Volume, error) {
	if (volume == "") == (machine == "") {
		return nil, invalid("name either a volume or a machine")
	}
	if volume != "" {
		v, ok := byName(st.Volumes, volume)
		if !ok {
			return nil, notFound("volume", volume)
		}
		return []*argonv1.Volume{v}, ownVolume(st, v, "snapshots")
	}
	m, ok := byName(st.Machines, machine)
	if !ok {
		return nil, notFound("machine", machine)
	}
	var volumes []*argonv1.Volume
	for _, id := range m.GetVolumeIds() {
		if v := st.Volumes[id]; v != nil {
			volumes = append(volumes, v)
		}
	}
	if len(volumes) == 0 {
		return nil, precondition("machine %s has no volumes", machine)
	}
	if txn != nil {
		txn.Put(proto.CloneOf(m))
	}
	return volumes, nil
}

// CreateSnapshot records the wish and waits until the holders have carried it
// out. If the caller goes away the snapshot is taken nevertheless.
func (s snapshotService) CreateSnapshot(ctx context.Context, req *connect.Request[argonv1.CreateSnapshotRequest]) (*connect.Response[argonv1.CreateSnapshotResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	m := req.Msg
	if err := checkSnapshot(m); err != nil {
		return nil, err
	}
	var ids map[string]uint32
	var st *catalog.State
	err = p.whileResting(ctx, m.GetMachine(), func() (err error) {
		if ids, err = p.askForSnapshots(ctx, m); err == nil {
			st, err = p.awaitSnapshots(ctx, ids, m.GetName())
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	res := &argonv1.CreateSnapshotResponse{}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		v := st.Volumes[id]
		if found := placement.Snapshot(v, ids[id]); found != nil {
			res.Snapshots = append(res.Snapshots, snapshotView(st, v, found))
		}
	}
	if len(res.GetSnapshots()) < len(ids) {
		return nil, precondition("snapshot %s was removed while it was taken", m.GetName())
	}
	return answer(res, nil)
}

func checkSnapshot(m *argonv1.CreateSnapshotRequest) error {
	if err := checkName("snapshot", m.GetName()); err != nil {
		return err
	}
	if n := len(m.GetLabels()); n > maxLabels {
		return invalid("snapshot %s: %d labels: at most %d", m.GetName(), n, maxLabels)
	}
	for k, v := range m.GetLabels() {
		if len(k)+len(v) > 1024 {
			return invalid("snapshot %s: label %.20q is too long: use at most 1024 bytes", m.GetName(), k)
		}
	}
	return nil
}

// askForSnapshots records snapshots as being taken, of all the volumes or of
// none. It returns their ids by those of the volumes.
func (p *Parts) askForSnapshots(ctx context.Context, m *argonv1.CreateSnapshotRequest) (map[string]uint32, error) {
	ids := map[string]uint32{}
	err := p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		clear(ids)
		volumes, err := subjects(st, txn, m.GetVolume(), m.GetMachine())
		if err != nil {
			return err
		}
		group := ""
		if m.GetMachine() != "" {
			group = catalog.NewID()
		}
		for _, v := range volumes {
			if err := snapshotPossible(st, v, m.GetName()); err != nil {
				return err
			}
			v = proto.CloneOf(v)
			v.NextSnapshotId = max(v.GetNextSnapshotId(), 1)
			snapshot := &argonv1.Snapshot{
				Id: v.GetNextSnapshotId(), Name: m.GetName(), State: beingTaken, SizeBytes: v.GetSizeBytes(),
				Created: timestamppb.New(p.Now()), Labels: m.GetLabels(),
			}
			if group != "" {
				snapshot.Group, snapshot.GroupSize = group, uint32(len(volumes))
			}
			v.NextSnapshotId++
			v.Snapshots = append(v.Snapshots, snapshot)
			ids[v.GetMeta().GetId()] = snapshot.GetId()
			txn.Put(v)
		}
		return nil
	})
	return ids, err
}

// snapshotPossible refuses what a holder could not carry out now.
func snapshotPossible(st *catalog.State, v *argonv1.Volume, name string) error {
	volume := v.GetMeta().GetName()
	if snapshotOf(v, name) != nil {
		return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("volume %s has a snapshot %s already: choose another name", volume, name))
	}
	if err := served(st, v, "snapshot "+name); err != nil {
		return err
	}
	switch {
	case v.GetRollbackTo() != 0:
		return precondition("snapshot %s: volume %s is being rolled back: wait until it is, see `argon volume show %s`", name, volume, volume)
	case len(v.GetSnapshots()) >= maxSnapshots:
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("volume %s has %d snapshots, which is all it can have: remove some", volume, maxSnapshots))
	}
	return nil
}

// served refuses a volume that no holder could attach now.
func served(st *catalog.State, v *argonv1.Volume, what string) error {
	health, advice := volumeHealth(st, v)
	switch health {
	case "removing":
		return precondition("%s: volume %s is being removed", what, v.GetMeta().GetName())
	case "unavailable", "creating":
		return precondition("%s: volume %s is %s: %s", what, v.GetMeta().GetName(), health, advice)
	}
	if !settled(st, v) && v.GetEpoch() == 0 {
		return precondition("%s: volume %s is still being made: try again", what, v.GetMeta().GetName())
	}
	return nil
}

// awaitSnapshots waits until none of the snapshots is being taken any more.
func (p *Parts) awaitSnapshots(ctx context.Context, ids map[string]uint32, name string) (*catalog.State, error) {
	bounded, cancel := context.WithTimeout(ctx, snapshotTimeout)
	defer cancel()
	waits := ""
	st, err := p.await(bounded, func(st *catalog.State) bool {
		for id, snapshot := range ids {
			if placement.Snapshot(st.Volumes[id], snapshot).GetState() == beingTaken {
				waits = st.Volumes[id].GetMeta().GetName()
				return false
			}
		}
		return true
	})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf(
			"snapshot %s is not taken yet, and is as soon as volume %s can be: see `argon volume show %s`, or give it up with `argon snapshot rm`", name, waits, waits))
	}
	return st, err
}

func (s snapshotService) ListSnapshots(ctx context.Context, req *connect.Request[argonv1.ListSnapshotsRequest]) (*connect.Response[argonv1.ListSnapshotsResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	volumes := sorted(st.Volumes)
	if m := req.Msg; m.GetVolume() != "" || m.GetMachine() != "" {
		if volumes, err = subjects(st, nil, m.GetVolume(), m.GetMachine()); err != nil {
			return nil, err
		}
	}
	res := &argonv1.ListSnapshotsResponse{}
	for _, v := range volumes {
		for _, snapshot := range v.GetSnapshots() {
			res.Snapshots = append(res.Snapshots, snapshotView(st, v, snapshot))
		}
	}
	return answer(res, nil)
}

func (s snapshotService) GetSnapshot(ctx context.Context, req *connect.Request[argonv1.GetSnapshotRequest]) (*connect.Response[argonv1.GetSnapshotResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	v, found, err := findSnapshot(st, req.Msg.GetVolume(), req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return answer(&argonv1.GetSnapshotResponse{Snapshot: snapshotView(st, v, found)}, nil)
}

func snapshotView(st *catalog.State, v *argonv1.Volume, s *argonv1.Snapshot) *argonv1.SnapshotView {
	view := &argonv1.SnapshotView{
		Snapshot: s, Volume: v.GetMeta().GetName(),
		Clones: namesOf(placement.Clones(st, v.GetMeta().GetId(), s.GetId())),
	}
	for _, id := range placement.SnapshotServers(v, s) {
		view.Servers = append(view.Servers, serverName(st, id))
	}
	return view
}

// RemoveSnapshot takes the snapshot off the record; replicas give its space
// back. It is refused while volumes are based on it, unless they are to be
// detached first.
func (s snapshotService) RemoveSnapshot(ctx context.Context, req *connect.Request[argonv1.RemoveSnapshotRequest]) (*connect.Response[argonv1.RemoveSnapshotResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	m := req.Msg
	res := &argonv1.RemoveSnapshotResponse{}
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		res.WaitsFor = nil
		volumes, err := withSnapshot(st, txn, m.GetVolume(), m.GetMachine(), m.GetName())
		if err != nil {
			return err
		}
		d := drafts{}
		for _, v := range volumes {
			waits, err := planSnapshotRemoval(st, d, v, m.GetName(), m.GetDetach())
			if err != nil {
				return err
			}
			res.WaitsFor = append(res.WaitsFor, waits...)
		}
		d.put(txn)
		return nil
	})
	return answer(res, err)
}

// withSnapshot is like subjects, without those of a machine's volumes that do
// not have the snapshot.
func withSnapshot(st *catalog.State, txn *catalog.Txn, volume, machine, name string) ([]*argonv1.Volume, error) {
	volumes, err := subjects(st, txn, volume, machine)
	if err != nil {
		return nil, err
	}
	if volume != "" {
		_, _, err := findSnapshot(st, volume, name)
		return volumes, err
	}
	volumes = slices.DeleteFunc(volumes, func(v *argonv1.Volume) bool { return snapshotOf(v, name) == nil })
	if len(volumes) == 0 {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("machine %s has no snapshot %q: see `argon snapshot ls --machine %s`", machine, name, machine))
	}
	return volumes, nil
}

func planSnapshotRemoval(st *catalog.State, d drafts, v *argonv1.Volume, name string, detach bool) (waits []string, err error) {
	full := v.GetMeta().GetName() + "/" + name
	s := snapshotOf(v, name)
	if v.GetRollbackTo() == s.GetId() {
		return nil, precondition("snapshot %s: its volume is being rolled back to it: wait until it is", full)
	}
	clones := placement.Clones(st, v.GetMeta().GetId(), s.GetId())
	switch {
	case len(clones) == 0:
		next := d.of(v)
		next.Snapshots = slices.DeleteFunc(next.Snapshots, func(o *argonv1.Snapshot) bool { return o.GetId() == s.GetId() })
	case !detach:
		return nil, precondition("%s based on snapshot %s: remove them first, or have them copy what they need of it with --detach", areBased(clones), full)
	default:
		placement.Snapshot(d.of(v), s.GetId()).Removing = true
		d.detach(clones)
	}
	return namesOf(clones), nil
}

// drafts are records of volumes, by id, that one transaction is to write: each
// once, whatever changes it.
type drafts map[string]*argonv1.Volume

func (d drafts) of(v *argonv1.Volume) *argonv1.Volume {
	id := v.GetMeta().GetId()
	if d[id] == nil {
		d[id] = proto.CloneOf(v)
	}
	return d[id]
}

// detach has volumes copy what they need of their bases.
func (d drafts) detach(volumes []*argonv1.Volume) {
	for _, v := range volumes {
		d.of(v).Base.Detaching = true
	}
}

func (d drafts) put(txn *catalog.Txn) {
	for _, v := range d {
		txn.Put(v)
	}
}

// RollBack records the wish; the holder, that an agent attaches for it if need
// be, serves nobody until it has carried it out.
func (s snapshotService) RollBack(ctx context.Context, req *connect.Request[argonv1.RollBackRequest]) (*connect.Response[argonv1.RollBackResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	m := req.Msg
	var ids []string
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		ids = nil
		volumes, err := subjects(st, txn, m.GetVolume(), m.GetMachine())
		if err != nil {
			return err
		}
		for _, v := range volumes {
			if err := planRollback(st, txn, v, m.GetName()); err != nil {
				return err
			}
			ids = append(ids, v.GetMeta().GetId())
		}
		// A machine must not start in between.
		if owner := userOf(st, volumes[0]); owner != nil && m.GetMachine() == "" {
			txn.Put(proto.CloneOf(owner))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	res := &argonv1.RollBackResponse{}
	for _, id := range ids {
		if v := st.Volumes[id]; v != nil {
			p.tell(ctx, argonv1.Severity_SEVERITY_INFO, "volume", id, v.GetMeta().GetName(), "volume-rollback", "is rolled back to snapshot "+m.GetName())
			res.Volumes = append(res.Volumes, volumeView(st, v))
		}
	}
	return answer(res, nil)
}

func planRollback(st *catalog.State, txn *catalog.Txn, v *argonv1.Volume, name string) error {
	_, s, err := findSnapshot(st, v.GetMeta().GetName(), name)
	if err != nil {
		return err
	}
	what := "rolling back to snapshot " + name
	if err := usableSnapshot(v, s); err != nil {
		return err
	}
	if err := idleVolume(st, v, what); err != nil {
		return err
	}
	if err := served(st, v, what); err != nil {
		return err
	}
	if to := v.GetRollbackTo(); to != 0 {
		return precondition("%s: volume %s is being rolled back to snapshot %s already: wait until it is",
			what, v.GetMeta().GetName(), placement.Snapshot(v, to).GetName())
	}
	for _, o := range v.GetSnapshots() {
		if o.GetState() == beingTaken {
			return precondition("%s: snapshot %s of volume %s is being taken: wait until it is", what, o.GetName(), v.GetMeta().GetName())
		}
	}
	v = proto.CloneOf(v)
	v.RollbackTo = s.GetId()
	txn.Put(v)
	return nil
}
