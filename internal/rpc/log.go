package rpc

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/logfile"
)

// ReadLog implements the service: from this server's files, or from another server.
func (s serverService) ReadLog(ctx context.Context, req *connect.Request[argonv1.ReadLogRequest], stream *connect.ServerStream[argonv1.ReadLogResponse]) error {
	m := req.Msg
	if m.GetServer() != "" {
		p, err := s.parts()
		if err != nil {
			return err
		}
		// Not fresh: logs are read when things are as they should not be.
		there, ok := byName(p.View.State().Servers, m.GetServer())
		switch {
		case !ok:
			return notFound("server", m.GetServer())
		case there.GetMeta().GetId() == p.ServerID:
		case req.Header().Get(forwarded) != "":
			return precondition("server %s is another one than was asked: try again", m.GetServer())
		default:
			return readThere(ctx, p, there, m, stream.Send)
		}
	}
	q := logfile.Query{Lines: int(m.GetLines()), Follow: m.GetFollow()}
	if m.GetSince() != nil {
		q.Since = m.GetSince().AsTime()
	}
	return logfile.Read(ctx, s.local.LogDir(), q, func(line string) error {
		return stream.Send(&argonv1.ReadLogResponse{Lines: []string{line}})
	})
}

// readThere passes on another server's log.
func readThere(ctx context.Context, p *Parts, there *argonv1.Server, m *argonv1.ReadLogRequest, send func(*argonv1.ReadLogResponse) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	servers, err := p.Peers.Servers(there.GetMeta().GetId())
	if err == nil {
		lines, opening := servers.ReadLog(ctx, handedOn(p, m))
		err = pass(lines, opening, send)
	}
	var gone *connect.Error
	if errors.As(err, &gone) && gone.Code() == connect.CodeUnavailable {
		return connect.NewError(connect.CodeUnavailable,
			fmt.Errorf("server %s does not answer (%s): read its log there, in log/argon.log of its data directory", m.GetServer(), gone.Message()))
	}
	return err
}
