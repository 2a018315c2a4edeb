package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
	"github.com/argon-cluster/argon/internal/volume/mirror"
)

// createTimeout bounds how long CreateVolume waits for replicas to be made.
const createTimeout = 10 * time.Minute

type volumeService struct{ *API }

func (s volumeService) CreateVolume(ctx context.Context, req *connect.Request[argonv1.CreateVolumeRequest]) (*connect.Response[argonv1.CreateVolumeResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	m := req.Msg
	if err := checkName("volume", m.GetName()); err != nil {
		return nil, err
	}
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		_, err := p.planVolume(st, txn, newVolume{
			name: m.GetName(), size: m.GetSizeBytes(), replicas: m.GetReplicas(),
			image: m.GetImage(), parent: m.GetSnapshotVolume(), snapshot: m.GetSnapshot(),
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	st, err := p.await(bounded, func(st *catalog.State) bool {
		v, ok := byName(st.Volumes, m.GetName())
		return !ok || settled(st, v)
	})
	if err != nil && (st == nil || ctx.Err() != nil) {
		return nil, err
	}
	v, ok := byName(st.Volumes, m.GetName())
	if !ok {
		return nil, precondition("volume %s was removed while it was made", m.GetName())
	}
	return answer(&argonv1.CreateVolumeResponse{Volume: volumeView(st, v), Warnings: incomplete(st, v)}, nil)
}

// newVolume is what a volume is asked to be.
type newVolume struct {
	name     string
	size     uint64
	replicas uint32
	// image, or parent and snapshot: what it is to be a clone of.
	image            string
	parent, snapshot string
	labels           map[string]string
	// machine is the id of the one that it is made with, and goes with.
	machine string
}

// planVolume puts a new volume into a transaction, with its replicas placed as
// far as there are servers for them.
func (p *Parts) planVolume(st *catalog.State, txn *catalog.Txn, want newVolume) (*argonv1.Volume, error) {
	if old, ok := byName(st.Volumes, want.name); ok {
		if want.machine != "" {
			return nil, inTheWay(st, old)
		}
		return nil, exists("volume", want.name)
	}
	from, err := baseOf(st, txn, want)
	if err != nil {
		return nil, err
	}
	size, err := checkVolumeSize(want.name, want.size, from)
	if err != nil {
		return nil, err
	}
	replicas, err := checkReplicas(want.name, want.replicas)
	if err != nil {
		return nil, err
	}
	v := &argonv1.Volume{
		Meta:           &argonv1.Meta{Id: catalog.NewID(), Name: want.name, Labels: want.labels},
		SizeBytes:      size,
		ReplicasWanted: replicas,
		ImageId:        from.base.GetImageId(),
		Base:           from.base,
		NextReplicaId:  1,
		MadeFor:        want.machine,
	}
	servers, err := placement.PlaceReplicas(st, placement.Replicas{
		Count: int(replicas), SizeBytes: size, Near: placement.BaseServers(st, v), Coming: placement.BaseComing(st, v), OnlyNear: v.GetBase().GetVolumeId() != "",
	})
	if len(servers) == 0 {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("volume %s: %w", want.name, err))
	}
	for _, id := range servers {
		v.Replicas = append(v.Replicas, &argonv1.Replica{
			Id: v.NextReplicaId, ServerId: id, State: creating, Since: timestamppb.New(p.Now()),
		})
		v.NextReplicaId++
	}
	txn.Create(v)
	return v, nil
}

// inTheWay says what to do about a volume whose name a machine's disk would get.
func inTheWay(st *catalog.State, v *argonv1.Volume) error {
	name := v.GetMeta().GetName()
	if m := userOf(st, v); m != nil {
		return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("volume %q exists already, as a disk of machine %s: choose another name", name, m.GetMeta().GetName()))
	}
	return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf(
		"volume %q exists already, and no machine has it: use it with --volume %s, remove it with `argon volume rm %s`, or choose another name", name, name, name))
}

// origin is what a volume is made from.
type origin struct {
	base *argonv1.Base
	// what names it, and size is how much it has; both empty if there is none.
	what string
	size uint64
}

// baseOf finds what a new volume is to be a clone of. It also goes into the
// transaction, so that it can't be removed in between.
func baseOf(st *catalog.State, txn *catalog.Txn, want newVolume) (origin, error) {
	switch {
	case want.image != "" && want.snapshot != "":
		return origin{}, invalid("volume %s: give either an image or a snapshot", want.name)
	case (want.parent == "") != (want.snapshot == ""):
		return origin{}, invalid("volume %s: a snapshot is named with its volume: VOLUME/SNAPSHOT", want.name)
	case want.image != "":
		i, ok := byName(st.Images, want.image)
		if !ok {
			return origin{}, notFound("image", want.image)
		}
		if i.GetRemoving() {
			return origin{}, precondition("volume %s: image %s is being removed", want.name, want.image)
		}
		txn.Put(proto.CloneOf(i))
		return origin{&argonv1.Base{ImageId: i.GetMeta().GetId()}, "image " + want.image, i.GetSizeBytes()}, nil
	case want.snapshot != "":
		parent, s, err := findSnapshot(st, want.parent, want.snapshot)
		if err != nil {
			return origin{}, err
		}
		if err := usableSnapshot(parent, s); err != nil {
			return origin{}, err
		}
		txn.Put(proto.CloneOf(parent))
		base := &argonv1.Base{VolumeId: parent.GetMeta().GetId(), SnapshotId: s.GetId()}
		return origin{base, "snapshot " + want.parent + "/" + want.snapshot, s.GetSizeBytes()}, nil
	}
	return origin{}, nil
}

// settled: no replica is being made any more on a server that is alive.
func settled(st *catalog.State, v *argonv1.Volume) bool {
	for _, r := range v.GetReplicas() {
		if r.GetState() == creating && r.GetReason() == "" && placement.Alive(st, r.GetServerId()) {
			return false
		}
	}
	return true
}

// incomplete says which of a new volume's replicas are not made.
func incomplete(st *catalog.State, v *argonv1.Volume) []string {
	var w []string
	name := v.GetMeta().GetName()
	for _, r := range v.GetReplicas() {
		if r.GetState() == creating {
			w = append(w, fmt.Sprintf("volume %s: the replica on server %s is not made yet: %s",
				name, serverName(st, r.GetServerId()), cmp.Or(r.GetReason(), "still under way")))
		}
	}
	if have, want := len(v.GetReplicas()), int(v.GetReplicasWanted()); have < want {
		w = append(w, fmt.Sprintf("volume %s has %d of %d replicas: the others are made when servers with enough free disk join", name, have, want))
	}
	return append(w, promisedTooMuch(st, v)...)
}

// promisedTooMuch warns of a thin volume that would not fit if all of it were
// written.
func promisedTooMuch(st *catalog.State, v *argonv1.Volume) []string {
	for _, r := range v.GetReplicas() {
		if st.Servers[r.GetServerId()] == nil {
			continue
		}
		if free := placement.Free(st, r.GetServerId()).GetDiskBytes(); free < v.GetSizeBytes() {
			return []string{fmt.Sprintf("volume %s may grow to %s, and server %s has %s of disk free: its writers wait when that is used",
				v.GetMeta().GetName(), humanize.IBytes(v.GetSizeBytes()), serverName(st, r.GetServerId()), humanize.IBytes(free))}
		}
	}
	return nil
}

func (s volumeService) ListVolumes(ctx context.Context, req *connect.Request[argonv1.ListVolumesRequest]) (*connect.Response[argonv1.ListVolumesResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	res := &argonv1.ListVolumesResponse{}
	for _, v := range sorted(st.Volumes) {
		if v.GetCheckpointId() == "" || req.Msg.GetAll() {
			res.Volumes = append(res.Volumes, volumeView(st, v))
		}
	}
	return answer(res, nil)
}

func (s volumeService) GetVolume(ctx context.Context, req *connect.Request[argonv1.GetVolumeRequest]) (*connect.Response[argonv1.GetVolumeResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	v, ok := byName(st.Volumes, req.Msg.GetName())
	if !ok {
		return nil, notFound("volume", req.Msg.GetName())
	}
	return answer(&argonv1.GetVolumeResponse{Volume: volumeView(st, v)}, nil)
}

func (s volumeService) RemoveVolume(ctx context.Context, req *connect.Request[argonv1.RemoveVolumeRequest]) (*connect.Response[argonv1.RemoveVolumeResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	name, id := req.Msg.GetName(), ""
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		v, ok := byName(st.Volumes, name)
		if !ok {
			return notFound("volume", name)
		}
		if id = v.GetMeta().GetId(); v.GetRemoving() {
			return nil // somebody else has begun; wait with them
		}
		if err := unusedVolume(st, v, "it can't be removed"); err != nil {
			return err
		}
		return p.planRemoval(st, txn, v)
	})
	if err != nil {
		return nil, err
	}
	_, err = p.await(ctx, func(st *catalog.State) bool { return gone(st, id) })
	return answer(&argonv1.RemoveVolumeResponse{}, err)
}

// planRemoval refuses to remove what other volumes are based on.
func (p *Parts) planRemoval(st *catalog.State, txn *catalog.Txn, v *argonv1.Volume) error {
	if clones := placement.Clones(st, v.GetMeta().GetId(), 0); len(clones) > 0 {
		return precondition("%s based on snapshots of volume %s: remove them first, or detach them with `argon volume detach-base`",
			areBased(clones), v.GetMeta().GetName())
	}
	v = proto.CloneOf(v)
	v.Removing = true
	txn.Put(v)
	return nil
}

// areBased names volumes, as the beginning of a sentence.
func areBased(clones []*argonv1.Volume) string {
	if len(clones) == 1 {
		return some("volume", namesOf(clones)) + " is"
	}
	return some("volume", namesOf(clones)) + " are"
}

func namesOf(volumes []*argonv1.Volume) []string {
	names := make([]string, len(volumes))
	for i, v := range volumes {
		names[i] = v.GetMeta().GetName()
	}
	return names
}

// connected tells whether somebody on a living server has the volume attached,
// not for a machine.
func connected(st *catalog.State, v *argonv1.Volume) bool {
	a := v.GetAttachment()
	return a.GetConnected() && placement.Alive(st, a.GetServerId())
}

// gone: the volume is removed, or all that is left of it is on servers that
// are down.
func gone(st *catalog.State, id string) bool {
	v := st.Volumes[id]
	if v == nil {
		return true
	}
	left := 0
	for _, r := range v.GetReplicas() {
		if r.GetState() != removing || placement.Alive(st, r.GetServerId()) {
			return false
		}
		left++
	}
	return left > 0
}

func (s volumeService) ConnectVolume(ctx context.Context, req *connect.Request[argonv1.ConnectVolumeRequest], stream *connect.ServerStream[argonv1.ConnectVolumeResponse]) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	v, ok := byName(st.Volumes, req.Msg.GetName())
	if !ok {
		return notFound("volume", req.Msg.GetName())
	}
	if err := errors.Join(freeVolume(st, v, "it can't be connected"), filled(v)); err != nil {
		return err
	}
	c, err := p.Volumes.Connect(ctx, v.GetMeta().GetId())
	if err != nil {
		return precondition("connecting volume %s: %w", req.Msg.GetName(), err)
	}
	defer c.Close()
	if err := stream.Send(&argonv1.ConnectVolumeResponse{Uri: c.URI()}); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case <-c.Done():
		return connect.NewError(connect.CodeAborted, fmt.Errorf("volume %s is not attached here any more: %w", req.Msg.GetName(), cmp.Or(c.Err(), errors.New("the server is stopping"))))
	}
}

func (s volumeService) PromoteReplica(ctx context.Context, req *connect.Request[argonv1.PromoteReplicaRequest]) (*connect.Response[argonv1.PromoteReplicaResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	var lost string
	var promoted *argonv1.Volume
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		v, r, err := promotable(st, req.Msg)
		if err != nil {
			return err
		}
		facts, err := p.Volumes.Inspect(ctx, v, r)
		if err != nil {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("asking the replica of volume %s on server %s: %w", v.GetMeta().GetName(), req.Msg.GetServer(), err))
		}
		if !facts.Whole {
			return precondition("the replica of volume %s on server %s is not whole: a copy to it was never finished, or its disk failed: choose another", v.GetMeta().GetName(), req.Msg.GetServer())
		}
		lost = whatIsLost(v, r, facts)
		promoted = proto.CloneOf(v)
		if err := mirror.Promote(promoted, mirror.Member{ID: r.GetId(), Incarnation: facts.Incarnation}, facts.Sealed, p.Now()); err != nil {
			return err
		}
		txn.Put(promoted)
		return nil
	})
	if err != nil {
		return nil, err
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_WARNING, "volume", promoted.GetMeta().GetId(), req.Msg.GetVolume(), "replica-promoted",
		fmt.Sprintf("the replica on server %s was made the only one in sync: %s", req.Msg.GetServer(), lost))
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	res := &argonv1.PromoteReplicaResponse{Lost: lost}
	if v := st.Volumes[promoted.GetMeta().GetId()]; v != nil {
		res.Volume = volumeView(st, v)
	}
	return answer(res, nil)
}

// promotable finds the replica and refuses where nothing needs to be given up.
func promotable(st *catalog.State, req *argonv1.PromoteReplicaRequest) (*argonv1.Volume, *argonv1.Replica, error) {
	name := req.GetVolume()
	v, ok := byName(st.Volumes, name)
	if !ok {
		return nil, nil, notFound("volume", name)
	}
	server, ok := byName(st.Servers, req.GetServer())
	if !ok {
		return nil, nil, notFound("server", req.GetServer())
	}
	var found *argonv1.Replica
	for _, r := range v.GetReplicas() {
		if r.GetServerId() == server.GetMeta().GetId() {
			found = r
		}
	}
	a := v.GetAttachment()
	switch {
	case v.GetRemoving():
		return nil, nil, precondition("volume %s is being removed", name)
	case found == nil || found.GetState() == creating || found.GetState() == removing:
		return nil, nil, precondition("volume %s has no replica on server %s that could be promoted", name, req.GetServer())
	case !req.GetAcceptLoss():
		return nil, nil, precondition("volume %s: promoting a replica loses the writes that only others have: say that you accept it with --accept-loss", name)
	case a != nil && placement.Alive(st, a.GetServerId()) && st.VolumeStatus[v.GetMeta().GetId()].GetCondition() == "serving":
		return nil, nil, precondition("volume %s is being served on server %s: nothing needs to be promoted; stop what uses it first", name, serverName(st, a.GetServerId()))
	}
	return v, found, nil
}

// whatIsLost says in words what the volume goes back to.
func whatIsLost(v *argonv1.Volume, r *argonv1.Replica, facts ReplicaFacts) string {
	since := r.GetSince().AsTime().UTC().Format(time.RFC3339)
	switch {
	case r.GetState() == inSync && r.GetIncarnation() == facts.Incarnation && facts.Sealed <= v.GetEpoch():
		return "nothing: this replica is in sync"
	case r.GetState() == inSync:
		return "writes that were acknowledged and not flushed before its server restarted"
	}
	return fmt.Sprintf("everything written after %s, when this replica left the in-sync set (%s)", since, cmp.Or(r.GetReason(), "no reason recorded"))
}
