package rpc

import (
	"context"
	"errors"
	"io/fs"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// relay hands a call on to the machine's server.
func (p *Parts) relay(ctx context.Context, m *argonv1.Machine, call func(context.Context, argonv1connect.MachineServiceClient) error) error {
	machines, err := p.Peers.Machines(m.GetServerId())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return call(ctx, machines)
}

// handedOn marks a request as one that this server hands on.
func handedOn[M any](p *Parts, msg *M) *connect.Request[M] {
	req := connect.NewRequest(msg)
	req.Header().Set(forwarded, p.ServerID)
	return req
}

// pass sends on what comes from another server, until its end.
func pass[M any](there *connect.ServerStreamForClient[M], err error, send func(*M) error) error {
	if err != nil {
		return err
	}
	defer there.Close()
	for there.Receive() {
		if err := send(there.Msg()); err != nil {
			return err
		}
	}
	return there.Err()
}

// hasNoAgent: nothing was asked of the guest.
func hasNoAgent(err error) bool {
	return errors.Is(err, hypervisor.ErrNoAgent) || errors.Is(err, fs.ErrNotExist)
}
