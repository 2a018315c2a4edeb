package rpc

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

const (
	defaultParallel = 2
	maxParallel     = 64
)

// DrainServer answers once it is recorded that the server is to be emptied. Asked
// again it changes how.
func (s serverService) DrainServer(ctx context.Context, req *connect.Request[argonv1.DrainServerRequest]) (*connect.Response[argonv1.DrainServerResponse], error) {
	parallel := req.Msg.GetParallel()
	if parallel == 0 {
		parallel = defaultParallel
	}
	if parallel > maxParallel {
		return nil, invalid("server %s: %d machines moved at once: at most %d", req.Msg.GetName(), parallel, maxParallel)
	}
	view, err := s.changeServer(ctx, req.Msg.GetName(), "server-drained", "is drained: machines leave it, nothing is placed on it", func(st *catalog.State, server *argonv1.Server) error {
		drain := &argonv1.Drain{Since: server.GetDrain().GetSince(), Evacuate: req.Msg.GetEvacuate(), Parallel: parallel}
		if drain.Since == nil {
			p, err := s.parts()
			if err != nil {
				return err
			}
			drain.Since = timestamppb.New(p.Now())
		}
		server.Drain = drain
		return mayDrain(st, server)
	})
	return answer(&argonv1.DrainServerResponse{Server: view}, err)
}

// ActivateServer answers once it is recorded. Machines do not come back by
// themselves.
func (s serverService) ActivateServer(ctx context.Context, req *connect.Request[argonv1.ActivateServerRequest]) (*connect.Response[argonv1.ActivateServerResponse], error) {
	view, err := s.changeServer(ctx, req.Msg.GetName(), "server-activated", "takes machines and replicas again", func(_ *catalog.State, server *argonv1.Server) error {
		server.Drain = nil
		return nil
	})
	return answer(&argonv1.ActivateServerResponse{Server: view}, err)
}

// changeServer changes a server's record, and tells of it if it did.
func (s serverService) changeServer(ctx context.Context, name, reason, message string, change func(*catalog.State, *argonv1.Server) error) (*argonv1.ServerView, error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	changed := false
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		old, ok := byName(st.Servers, name)
		if !ok {
			return notFound("server", name)
		}
		next := proto.CloneOf(old)
		if err := change(st, next); err != nil {
			return err
		}
		if changed = !proto.Equal(old, next); changed {
			txn.Put(next)
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
	server, ok := byName(st.Servers, name)
	if !ok {
		return nil, notFound("server", name)
	}
	if changed {
		p.tell(ctx, argonv1.Severity_SEVERITY_INFO, "server", server.GetMeta().GetId(), name, reason, message)
	}
	return serverView(st, server), nil
}

// mayDrain refuses to drain a server when what is on it could go nowhere. next is
// the server as it would be.
func mayDrain(st *catalog.State, next *argonv1.Server) error {
	id, name := next.GetMeta().GetId(), next.GetMeta().GetName()
	if next.GetWitness() {
		return precondition("server %s is a witness: it has nothing to be drained of", name)
	}
	others := slices.ContainsFunc(sorted(st.Servers), func(o *argonv1.Server) bool {
		return o.GetMeta().GetId() != id && !o.GetWitness() && o.GetDrain() == nil
	})
	if !others {
		return precondition("server %s is the last one that takes machines and replicas: activate or add another first", name)
	}
	if !next.GetDrain().GetEvacuate() {
		return nil
	}
	after := *st
	after.Servers = map[string]*argonv1.Server{}
	for oid, o := range st.Servers {
		after.Servers[oid] = o
	}
	after.Servers[id] = next
	var stuck []string
	for _, v := range sorted(st.Volumes) {
		if !v.GetRemoving() && onlyInSync(st, v, id) && !copyFits(&after, v) {
			stuck = append(stuck, v.GetMeta().GetName())
		}
	}
	if len(stuck) > 0 {
		return precondition("server %s keeps the only replica in sync of %s, and no other server has room for one: add disk, or a server", name, some("volume", stuck))
	}
	return nil
}

// copyFits tells whether another server has, or could get, a replica of a volume.
func copyFits(st *catalog.State, v *argonv1.Volume) bool {
	for _, r := range v.GetReplicas() {
		if s := st.Servers[r.GetServerId()]; s != nil && s.GetDrain() == nil && r.GetState() != removing && placement.Alive(st, r.GetServerId()) {
			return true // it is being copied to
		}
	}
	found, _ := placement.PlaceReplicas(st, placement.Replicas{
		Count: 1, NeedBytes: placement.CopyBytes(st, v), SizeBytes: v.GetSizeBytes(), Near: placement.BaseServers(st, v), Never: placement.Holders(v),
	})
	return len(found) > 0
}

// draining says what is still to leave a drained server, and what keeps it.
func draining(st *catalog.State, s *argonv1.Server) []string {
	if s.GetDrain() == nil {
		return nil
	}
	id := s.GetMeta().GetId()
	var left []string
	for _, m := range sorted(st.Machines) {
		if m.GetServerId() != id {
			continue
		}
		how := "waits for its turn"
		_, err := placement.PlaceMachine(st, m)
		switch {
		case m.GetMigration() != nil:
			how = "is on its way, and runs"
		case m.GetMove() != nil:
			how = "is on its way"
		case placement.KeptFromLeaving(s, m):
			how = "stays: its migration was cancelled"
		case err != nil:
			how = "stays: " + err.Error()
		}
		left = append(left, fmt.Sprintf("machine %s %s", m.GetMeta().GetName(), how))
	}
	if !s.GetDrain().GetEvacuate() {
		return left
	}
	for _, v := range sorted(st.Volumes) {
		for _, r := range v.GetReplicas() {
			if r.GetServerId() == id {
				left = append(left, fmt.Sprintf("replica of volume %s %s", v.GetMeta().GetName(), replicaWaits(st, v, r)))
			}
		}
	}
	for _, i := range sorted(st.Images) {
		for _, c := range i.GetCopies() {
			if c.GetServerId() == id {
				left = append(left, fmt.Sprintf("copy of image %s", i.GetMeta().GetName()))
			}
		}
	}
	return left
}

// replicaWaits says what keeps a replica from leaving.
func replicaWaits(st *catalog.State, v *argonv1.Volume, r *argonv1.Replica) string {
	if r.GetState() == removing {
		return "is being deleted"
	}
	good := 0
	var copying []string
	for _, o := range v.GetReplicas() {
		switch s := st.Servers[o.GetServerId()]; {
		case o == r || s.GetDrain().GetEvacuate():
		case o.GetState() == inSync && placement.Alive(st, o.GetServerId()):
			good++
		case o.GetState() == creating || o.GetState() == outOfSync:
			copying = append(copying, serverName(st, o.GetServerId()))
		}
	}
	switch {
	case good >= int(v.GetReplicasWanted()):
		return "is about to leave"
	case len(copying) > 0:
		return "waits for the one on " + strings.Join(copying, ", ")
	}
	return "waits for a server that has room for another"
}

// removalCosts says what the removal of a server by force would cost.
func removalCosts(st *catalog.State, s *argonv1.Server) []string {
	id := s.GetMeta().GetId()
	var costs, machines, lost, fewer []string
	for _, m := range sorted(st.Machines) {
		if m.GetServerId() == id {
			machines = append(machines, m.GetMeta().GetName())
		}
	}
	for _, v := range sorted(st.Volumes) {
		if v.GetRemoving() || !slices.Contains(placement.Holders(v), id) {
			continue
		}
		if onlyInSync(st, v, id) {
			lost = append(lost, v.GetMeta().GetName())
		} else {
			fewer = append(fewer, v.GetMeta().GetName())
		}
	}
	if len(lost) > 0 {
		costs = append(costs, "lost for good, as no other replica is in sync: "+some("volume", lost))
	}
	if images := onlyCopies(st, id); len(images) > 0 {
		costs = append(costs, "lost for good, as no other server has a copy: "+some("image", images))
	}
	if len(machines) > 0 {
		costs = append(costs, "started again elsewhere, where its disks are left: "+some("machine", machines))
	}
	if len(fewer) > 0 {
		costs = append(costs, "copied anew from the other replicas: "+some("volume", fewer))
	}
	return costs
}
