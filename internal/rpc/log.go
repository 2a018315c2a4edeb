package rpc

import (
	"context"
	"errors"

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
			return connect.NewError(connect.CodeUnavailable, errors.New("the servers do not agree on which of them this is: try again"))
		default:
			servers, err := p.Peers.Servers(there.GetMeta().GetId())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			lines, err := servers.ReadLog(ctx, handedOn(p, m))
			return pass(lines, err, stream.Send)
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
