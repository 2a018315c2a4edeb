package rpc

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
)

// quiesceLimit is how long a guest's file systems may rest: what writes in it
// waits.
const quiesceLimit = 30 * time.Second

// QuiesceMachine brings a guest's file systems to rest until the caller ends the
// call, or is gone, or takes too long. They go on in any case.
func (s machineService) QuiesceMachine(ctx context.Context, req *connect.Request[argonv1.QuiesceMachineRequest], stream *connect.ServerStream[argonv1.QuiesceMachineResponse]) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	m, here, err := p.findGuest(ctx, req.Msg.GetName(), req.Header())
	if err != nil {
		return err
	}
	if !here {
		return p.relay(ctx, m, func(ctx context.Context, machines argonv1connect.MachineServiceClient) error {
			there, err := machines.QuiesceMachine(ctx, handedOn(p, req.Msg))
			return pass(there, err, stream.Send)
		})
	}
	defer func() {
		if err := p.Guests.Thaw(context.WithoutCancel(ctx), m.GetMeta().GetId()); err != nil {
			p.Log.Warn("a guest's file systems may still rest", "machine", req.Msg.GetName(), "err", err)
		}
	}()
	if err := p.Guests.Freeze(ctx, m.GetMeta().GetId()); err != nil {
		return p.guestError(m, "file systems", err)
	}
	if err := stream.Send(&argonv1.QuiesceMachineResponse{}); err != nil {
		return err
	}
	limit := time.NewTimer(quiesceLimit)
	defer limit.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-limit.C:
		return connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("machine %s: its file systems rested for %v, and go on", req.Msg.GetName(), quiesceLimit))
	}
}

// quiesced runs do while the file systems of a machine's guest rest. If it has
// no agent, or is not there, do runs all the same: quiet says which. The file
// systems go on when do returns, whatever comes of it.
func (p *Parts) quiesced(ctx context.Context, m *argonv1.Machine, do func() error) (quiet bool, err error) {
	quiet, end := p.quiesce(ctx, m)
	defer end()
	return quiet, do()
}

// quiesce asks the machine's server, which may be this one.
func (p *Parts) quiesce(ctx context.Context, m *argonv1.Machine) (resting bool, end func()) {
	nothing := func() {}
	id := m.GetMeta().GetId()
	switch m.GetServerId() {
	case "":
		return false, nothing
	case p.ServerID:
		thaw := func() {
			if err := p.Guests.Thaw(context.WithoutCancel(ctx), id); err != nil {
				p.Log.Warn("a guest's file systems may still rest", "machine", m.GetMeta().GetName(), "err", err)
			}
		}
		if err := p.Guests.Freeze(ctx, id); err != nil {
			p.Log.Debug("a guest's file systems do not rest", "machine", m.GetMeta().GetName(), "err", err)
			if hasNoAgent(err) {
				return false, nothing
			}
			return false, thaw // it may have begun
		}
		limit := time.AfterFunc(quiesceLimit, thaw)
		return true, func() {
			if limit.Stop() {
				thaw()
			}
		}
	}
	machines, err := p.Peers.Machines(m.GetServerId())
	if err != nil {
		return false, nothing
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := machines.QuiesceMachine(ctx, handedOn(p, &argonv1.QuiesceMachineRequest{Name: m.GetMeta().GetName()}))
	if err != nil {
		cancel()
		return false, nothing
	}
	resting = stream.Receive()
	return resting, func() {
		cancel()
		_ = stream.Close()
	}
}

// whileResting is quiesced for the machine of that name; for none, do just runs.
func (p *Parts) whileResting(ctx context.Context, machine string, do func() error) error {
	if machine == "" {
		return do()
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	m, ok := byName(st.Machines, machine)
	if !ok {
		return do() // which says so
	}
	quiet, err := p.quiesced(ctx, m, do)
	if err == nil {
		p.Log.Info("a machine's disks were frozen in time", "machine", machine, "quiet", quiet)
	}
	return err
}
