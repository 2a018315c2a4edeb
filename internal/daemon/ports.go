package daemon

import (
	"context"
	"sync"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/network"
)

// guestPorts knows where the guests of this server are forwarded from: the
// agent opens, the published ports look up.
type guestPorts struct {
	serverID string

	mu     sync.Mutex
	guests map[string]map[network.Target]string // by guest, then target: the local address
}

func newGuestPorts(serverID string) *guestPorts {
	return &guestPorts{serverID: serverID, guests: map[string]map[network.Target]string{}}
}

// Open implements agent.Ports.
func (g *guestPorts) Open(_ context.Context, m *argonv1.Machine, guestID string) ([]hypervisor.Port, error) {
	var ports []hypervisor.Port
	targets := map[network.Target]string{}
	for _, p := range m.GetPorts() {
		target := network.Target{MachineID: m.GetMeta().GetId(), GuestPort: uint16(p.GetGuestPort())}
		if targets[target] != "" {
			continue // published under several numbers
		}
		at := network.LocalAddress(g.serverID, guestID, len(ports))
		targets[target] = at.String()
		ports = append(ports, hypervisor.Port{
			HostAddress: at.Addr().String(), HostPort: int(at.Port()), GuestPort: int(p.GetGuestPort()),
		})
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.guests[guestID] = targets
	return ports, nil
}

// Close implements agent.Ports.
func (g *guestPorts) Close(guestID string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.guests, guestID)
}

// lookup is network.Options.LocalPort.
func (g *guestPorts) lookup(t network.Target) (address string, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, targets := range g.guests {
		if address := targets[t]; address != "" {
			return address, true
		}
	}
	return "", false
}

// publications are the published ports that the records ask for.
func publications(st *catalog.State) []network.Publication {
	var all []network.Publication
	if st == nil {
		return nil
	}
	for id, m := range st.Machines {
		for _, p := range m.GetPorts() {
			all = append(all, network.Publication{
				Port:      uint16(p.GetClusterPort()),
				Target:    network.Target{MachineID: id, GuestPort: uint16(p.GetGuestPort())},
				Machine:   m.GetMeta().GetName(),
				ServerID:  m.GetServerId(),
				Placement: m.GetPlacement(),
			})
		}
	}
	return all
}
