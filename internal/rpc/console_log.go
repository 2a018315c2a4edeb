package rpc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

// ReadConsoleLog implements the service: it is kept where the machine ran last.
func (s machineService) ReadConsoleLog(ctx context.Context, req *connect.Request[argonv1.ReadConsoleLogRequest]) (*connect.Response[argonv1.ReadConsoleLogResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	name := req.Msg.GetName()
	m, ok := byName(st.Machines, name)
	if !ok {
		return nil, notFound("machine", name)
	}
	if m.GetServerId() != "" {
		return nil, precondition("machine %s is not stopped: see `argon machine console %s`", name, name)
	}
	nothing := precondition("machine %s does not run, and nothing is kept of what it printed: start it with `argon machine start %s`", name, name)
	switch at := m.GetRanOn(); {
	case at == p.ServerID:
		data, err := p.Consoles.Kept(m.GetMeta().GetId())
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nothing
		}
		return answer(&argonv1.ReadConsoleLogResponse{Data: data}, err)
	case at == "" || req.Header().Get(forwarded) != "" || st.Servers[at] == nil:
		return nil, nothing
	case !placement.Alive(st, at):
		return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("machine %s does not run, and server %s, where it ran last, is down", name, serverName(st, at)))
	}
	there, err := p.Peers.Machines(m.GetRanOn())
	if err != nil {
		return nil, err
	}
	return there.ReadConsoleLog(ctx, handedOn(p, req.Msg))
}
