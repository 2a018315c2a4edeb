package rpc

import (
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image/seed"
)

// SetFirstBoot answers once it is recorded; the machine gets it when it starts
// next, and cloud-init takes it for that of a new machine.
func (s machineService) SetFirstBoot(ctx context.Context, req *connect.Request[argonv1.SetFirstBootRequest]) (*connect.Response[argonv1.SetFirstBootResponse], error) {
	name := req.Msg.GetName()
	if err := checkFirstBoot(name, req.Msg.GetFirstBoot()); err != nil {
		return nil, err
	}
	view, err := s.want(ctx, name, func(_ *catalog.State, m *argonv1.Machine) (err error) {
		m.FirstBoot, err = nextFirstBoot(m.GetFirstBoot(), req.Msg.GetFirstBoot())
		return err
	})
	return answer(&argonv1.SetFirstBootResponse{Machine: view}, err)
}

// nextFirstBoot is a machine's first boot after a change. The same as before is
// no change: cloud-init need not begin anew.
func nextFirstBoot(old, next *argonv1.FirstBoot) (*argonv1.FirstBoot, error) {
	if next == nil {
		return nil, nil
	}
	next = proto.CloneOf(next)
	// What the catalog keeps apart is for the catalog to say.
	next.Revision, next.ContentId = old.GetRevision(), ""
	was, err := catalog.Apart(old)
	if err != nil {
		return nil, err
	}
	is, err := catalog.Apart(next)
	if err != nil {
		return nil, err
	}
	if old != nil && proto.Equal(was, is) {
		return old, nil
	}
	next.Revision++
	if is.GetContentId() != "" {
		next.ContentId = old.GetContentId() // which it takes the place of
	}
	return next, nil
}

func checkFirstBoot(machine string, b *argonv1.FirstBoot) error {
	if err := seed.Check(b); err != nil {
		return invalid("machine %s: %w", machine, err)
	}
	return nil
}

// withoutSecrets is a machine as it is shown: without what is nobody's business,
// or long.
func withoutSecrets(m *argonv1.Machine) *argonv1.Machine {
	if m.GetFirstBoot() == nil {
		return m
	}
	m = proto.CloneOf(m)
	b := m.GetFirstBoot()
	b.PasswordHash, b.UserData, b.NetworkConfig, b.ContentId = "", nil, nil, ""
	return m
}

// takeHints gives a new machine what the image's own machine had, as far as the
// caller says nothing and it can be had here.
func (p *Parts) takeHints(ctx context.Context, req *argonv1.CreateMachineRequest) error {
	if req.GetImage() == "" {
		return nil
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	i, _ := byName(st.Images, req.GetImage())
	applyHints(req, i.GetHints())
	return nil
}

func applyHints(req *argonv1.CreateMachineRequest, h *argonv1.MachineHints) {
	if req.GetCpus() == 0 {
		req.Cpus = min(h.GetCpus(), maxCPUs)
	}
	if m := h.GetMemoryBytes() / mib * mib; req.GetMemoryBytes() == 0 && m >= minMemory && m <= maxMemory {
		req.MemoryBytes = m
	}
	if req.GetFirmware() == "" {
		req.Firmware = h.GetFirmware()
	}
	if req.GetNetworks() == 0 {
		req.Networks = min(h.GetNetworks(), maxNetworks)
	}
}
