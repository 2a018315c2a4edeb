package rpc

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

// SetServer changes a server's address; that server itself does, and says so in
// its record once it is there.
func (s serverService) SetServer(ctx context.Context, req *connect.Request[argonv1.SetServerRequest]) (*connect.Response[argonv1.SetServerResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	name, address := req.Msg.GetName(), req.Msg.GetAddress()
	if address == "" {
		return nil, invalid("server %s: give an address", name)
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	server, ok := byName(st.Servers, name)
	if !ok {
		return nil, notFound("server", name)
	}
	id := server.GetMeta().GetId()
	if id == p.ServerID {
		if err := s.local.Readdress(ctx, address); err != nil {
			return nil, precondition("server %s: %w", name, err)
		}
		return answer(&argonv1.SetServerResponse{Server: serverView(st, server)}, nil)
	}
	if req.Header().Get(forwarded) != "" {
		return nil, precondition("server %s is another one than was asked: try again", name)
	}
	if !placement.Alive(st, id) {
		return nil, precondition("server %s does not answer at %s: start it with --address %s, or, if it runs there already, `argon server meet %s`", name, server.GetAddress(), address, address)
	}
	servers, err := p.Peers.Servers(id)
	if err != nil {
		return nil, err
	}
	res, err := servers.SetServer(ctx, handedOn(p, req.Msg))
	if err != nil {
		return nil, err
	}
	return answer(res.Msg, nil)
}

// MeetServers works without a catalog.
func (s serverService) MeetServers(ctx context.Context, req *connect.Request[argonv1.MeetServersRequest]) (*connect.Response[argonv1.MeetServersResponse], error) {
	if len(req.Msg.GetAddresses()) == 0 {
		return nil, invalid("give the address of another server of the cluster")
	}
	met, err := s.local.Meet(ctx, req.Msg.GetAddresses())
	if err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	return answer(&argonv1.MeetServersResponse{Met: met}, nil)
}

// Introduce works without a catalog.
func (s serverService) Introduce(ctx context.Context, req *connect.Request[argonv1.IntroduceRequest]) (*connect.Response[argonv1.IntroduceResponse], error) {
	res, err := s.local.Introduce(callerOf(ctx), req.Msg)
	if err != nil {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	return answer(res, nil)
}

// mayIntroduce lets servers in, also while the catalog can't be read: that is what
// introductions are for. One that is known to be removed stays out.
func (a *API) mayIntroduce(c Caller) error {
	if c.Kind != Server {
		return connect.NewError(connect.CodePermissionDenied, errors.New("only servers introduce themselves"))
	}
	if p := a.local.Parts(); p != nil {
		if st := p.View.State(); st != nil && !stillKnown(st, c) {
			return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("server %s is not part of this cluster any more", c.ID))
		}
	}
	return nil
}
