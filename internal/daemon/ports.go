package daemon

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
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
		at := network.LocalAddress(g.serverID, guestID, target.GuestPort)
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

// closedPorts are the published ports that this server can't open now.
type closedPorts struct {
	mu    sync.Mutex
	ports map[uint16]*argonv1.ClosedPort
	// changed has something when they have.
	changed chan struct{}
}

func newClosedPorts() *closedPorts {
	return &closedPorts{ports: map[uint16]*argonv1.ClosedPort{}, changed: make(chan struct{}, 1)}
}

// note keeps what network.Options.Busy is told.
func (c *closedPorts) note(p network.Publication, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ports, p.Port)
	if err != nil {
		c.ports[p.Port] = &argonv1.ClosedPort{Port: uint32(p.Port), MachineId: p.Target.MachineID, Reason: err.Error()}
	}
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// list is in the ports' order.
func (c *closedPorts) list() []*argonv1.ClosedPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []*argonv1.ClosedPort
	for _, port := range slices.Sorted(maps.Keys(c.ports)) {
		list = append(list, c.ports[port])
	}
	return list
}

// portBusy tells that a published port can't be served here, or that it can again.
func (m *memberParts) portBusy(p network.Publication, err error) {
	m.closed.note(p, err)
	e := &argonv1.Event{
		Severity: argonv1.Severity_SEVERITY_WARNING, Kind: "machine", SubjectId: p.Target.MachineID, SubjectName: p.Machine,
		Reason: "port-busy", Message: fmt.Sprintf("port %d can't be opened on server %s: %v; it is tried again", p.Port, m.serverName(), err),
	}
	if err == nil {
		e.Severity, e.Reason = argonv1.Severity_SEVERITY_INFO, "port-opened"
		e.Message = fmt.Sprintf("port %d is not in the way on server %s any more", p.Port, m.serverName())
	}
	m.news.tell(e)
}

// serverName is this server's.
func (m *memberParts) serverName() string {
	return cmp.Or(m.view.State().Servers[m.news.serverID].GetMeta().GetName(), m.news.serverID)
}
