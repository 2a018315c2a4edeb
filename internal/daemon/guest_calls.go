package daemon

import (
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/argon-cluster/argon/internal/agent"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// guests are those of this server as the API sees them; see rpc.Guests.
type guests struct{ agent *agent.Agent }

func (g guests) find(machineID string) (hypervisor.Guest, error) {
	guest, err := g.agent.Guest(machineID)
	if errors.Is(err, agent.ErrNotHere) {
		return nil, fs.ErrNotExist
	}
	return guest, err
}

// Display implements rpc.Guests.
func (g guests) Display(ctx context.Context, machineID string) (io.ReadWriteCloser, error) {
	guest, err := g.find(machineID)
	if err != nil {
		return nil, err
	}
	return guest.Display(ctx)
}

// Screenshot implements rpc.Guests.
func (g guests) Screenshot(ctx context.Context, machineID string) ([]byte, error) {
	guest, err := g.find(machineID)
	if err != nil {
		return nil, err
	}
	return guest.Screenshot(ctx)
}

// Freeze implements rpc.Guests.
func (g guests) Freeze(ctx context.Context, machineID string) error {
	guest, err := g.find(machineID)
	if err != nil {
		return err
	}
	return guest.Freeze(ctx)
}

// Thaw implements rpc.Guests.
func (g guests) Thaw(ctx context.Context, machineID string) error {
	guest, err := g.find(machineID)
	if err != nil {
		return err
	}
	return guest.Thaw(ctx)
}

// Reset implements rpc.Guests.
func (g guests) Reset(ctx context.Context, machineID string) error {
	guest, err := g.find(machineID)
	if err != nil {
		return err
	}
	return guest.Reset(ctx)
}
