package qemu

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// publishedNetwork is the name of the network that ports lead to.
const publishedNetwork = "net0"

// SetPorts implements hypervisor.Guest. QEMU knows this only as a command for people,
// which says nothing where it succeeds; what is open stays open when its port is
// taken away.
func (g *guest) SetPorts(ctx context.Context, stale, wanted []hypervisor.Port) error {
	for _, p := range stale {
		if !slices.Contains(wanted, p) {
			if err := g.unforward(ctx, p); err != nil {
				return err
			}
		}
	}
	for _, p := range wanted {
		// It may be there, from the guest's start or from a daemon before this one.
		if err := g.unforward(ctx, p); err != nil {
			return err
		}
		said, err := g.forPeople(ctx, fmt.Sprintf("hostfwd_add %s tcp:%s:%d-:%d", publishedNetwork, p.HostAddress, p.HostPort, p.GuestPort))
		if err == nil && said != "" {
			err = fmt.Errorf("guest %s: QEMU says: %s", g.id, said)
		}
		if err != nil {
			return fmt.Errorf("forwarding port %d: %w", p.GuestPort, err)
		}
	}
	return nil
}

// unforward takes a port away; one that is not there is no error.
func (g *guest) unforward(ctx context.Context, p hypervisor.Port) error {
	_, err := g.forPeople(ctx, fmt.Sprintf("hostfwd_remove %s tcp:%s:%d", publishedNetwork, p.HostAddress, p.HostPort))
	return err
}

// forPeople runs a command of the monitor for people, and returns what it says.
func (g *guest) forPeople(ctx context.Context, command string) (string, error) {
	var said string
	err := g.executeWith(ctx, "human-monitor-command", map[string]string{"command-line": command}, &said)
	return printable(strings.ReplaceAll(said, "\r\n", " "), mostSaid), err
}
