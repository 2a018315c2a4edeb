package rpc

import (
	"context"
	"maps"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

type serverService struct{ *API }

func (s serverService) ListServers(ctx context.Context, _ *connect.Request[argonv1.ListServersRequest]) (*connect.Response[argonv1.ListServersResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	res := &argonv1.ListServersResponse{}
	for _, server := range sorted(st.Servers) {
		res.Servers = append(res.Servers, serverView(st, server))
	}
	return answer(res, nil)
}

func (s serverService) GetServer(ctx context.Context, req *connect.Request[argonv1.GetServerRequest]) (*connect.Response[argonv1.GetServerResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	server, ok := byName(st.Servers, req.Msg.GetName())
	if !ok {
		return nil, notFound("server", req.Msg.GetName())
	}
	return answer(&argonv1.GetServerResponse{Server: serverView(st, server)}, nil)
}

func (s serverService) RemoveServer(ctx context.Context, req *connect.Request[argonv1.RemoveServerRequest]) (*connect.Response[argonv1.RemoveServerResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		return planServerRemoval(st, txn, req.Msg)
	})
	if err != nil {
		return nil, err
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_WARNING, "server", "", req.Msg.GetName(), "server-removed", "removed from the cluster")
	return answer(&argonv1.RemoveServerResponse{}, nil)
}

func planServerRemoval(st *catalog.State, txn *catalog.Txn, req *argonv1.RemoveServerRequest) error {
	server, ok := byName(st.Servers, req.GetName())
	if !ok {
		return notFound("server", req.GetName())
	}
	if err := mayRemove(st, server, req.GetForce()); err != nil {
		return err
	}
	// It may go because others stay. Two removals at once meet at one record:
	// the oldest of those others, which both write, or one of them deletes.
	others := maps.Clone(st.Servers)
	delete(others, server.GetMeta().GetId())
	txn.Delete(server).Put(proto.CloneOf(oldest(others)))
	return nil
}

// mayRemove refuses to remove a server that something needs. force gives up
// what is on a server that is lost.
func mayRemove(st *catalog.State, s *argonv1.Server, force bool) error {
	id, name := s.GetMeta().GetId(), s.GetMeta().GetName()
	alive := placement.Alive(st, id)
	if len(st.Servers) == 1 {
		return precondition("server %s is the last one: a cluster has at least one", name)
	}
	if force && alive {
		return precondition("server %s is alive: stop `argon server` there before it is removed by force", name)
	}
	if force {
		return nil
	}
	var machines, volumes, replicas []string
	for _, m := range sorted(st.Machines) {
		if m.GetServerId() == id {
			machines = append(machines, m.GetMeta().GetName())
		}
	}
	for _, v := range sorted(st.Volumes) {
		switch {
		case v.GetRemoving():
		case onlyInSync(st, v, id):
			volumes = append(volumes, v.GetMeta().GetName())
		case slices.Contains(placement.Holders(v), id):
			replicas = append(replicas, v.GetMeta().GetName())
		}
	}
	images := onlyCopies(st, id)
	switch {
	case len(machines) > 0 && alive:
		return precondition("server %s runs %s: `argon server drain %s` moves them away", name, some("machine", machines), name)
	case len(machines) > 0:
		return precondition("server %s runs %s: stop or remove them first", name, some("machine", machines))
	case len(volumes) > 0 && alive:
		return precondition("server %s keeps the only replica in sync of %s: `argon server drain %s --evacuate` makes others first", name, some("volume", volumes), name)
	case len(volumes) > 0:
		return precondition("server %s keeps the only replica in sync of %s: start it, or give its data up with --force", name, some("volume", volumes))
	case len(replicas) > 0 && alive:
		return precondition("server %s keeps replicas of %s: `argon server drain %s --evacuate` moves them away", name, some("volume", replicas), name)
	case len(images) > 0 && alive:
		return precondition("server %s keeps the only copy of %s: `argon server drain %s --evacuate` makes others first", name, some("image", images), name)
	case len(images) > 0:
		return precondition("server %s keeps the only copy of %s: start it, or give them up with --force", name, some("image", images))
	}
	return nil
}

// onlyInSync tells whether a server has the only replica in sync. Those of
// servers that were removed count for nothing, though the record may list them
// a moment longer.
func onlyInSync(st *catalog.State, v *argonv1.Volume, serverID string) bool {
	here, elsewhere := false, false
	for _, r := range v.GetReplicas() {
		switch {
		case r.GetState() != inSync:
		case r.GetServerId() == serverID:
			here = true
		case st.Servers[r.GetServerId()] != nil:
			elsewhere = true
		}
	}
	return here && !elsewhere
}

// onlyCopies names the images of which a server has the only copy.
func onlyCopies(st *catalog.State, serverID string) []string {
	var names []string
	for _, i := range sorted(st.Images) {
		if onlyCopy(st, i, serverID) {
			names = append(names, i.GetMeta().GetName())
		}
	}
	return names
}

// onlyCopy tells of an image's copies what onlyInSync does of replicas.
func onlyCopy(st *catalog.State, i *argonv1.Image, serverID string) bool {
	here, elsewhere := false, false
	for _, c := range i.GetCopies() {
		switch {
		case !c.GetReady():
		case c.GetServerId() == serverID:
			here = true
		case st.Servers[c.GetServerId()] != nil:
			elsewhere = true
		}
	}
	return here && !elsewhere && !i.GetRemoving()
}

// some lists a few names.
func some(kind string, names []string) string {
	const few = 3
	if len(names) > 1 {
		kind += "s"
	}
	if len(names) > few {
		names = append(names[:few:few], "...")
	}
	return kind + " " + strings.Join(names, ", ")
}

// state is the fresh catalog for calls that only read.
func (a *API) state(ctx context.Context) (*catalog.State, error) {
	p, err := a.parts()
	if err != nil {
		return nil, err
	}
	return p.fresh(ctx)
}
