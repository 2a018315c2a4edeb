package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/agent"
	"github.com/argon-cluster/argon/internal/boottime"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/cluster"
	"github.com/argon-cluster/argon/internal/controller"
	"github.com/argon-cluster/argon/internal/image"
	"github.com/argon-cluster/argon/internal/network"
	"github.com/argon-cluster/argon/internal/rpc"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// reserveBytes of the disk stay free for the catalog and the logs.
const reserveBytes = 64 << 20

// memberParts are those of a server that is part of a cluster.
type memberParts struct {
	store    *catalog.Store
	view     *catalog.View
	observer *controller.Observer
	news     *news
	images   *image.Store
	replicas *replica.Store
	peers    *peers
	volumes  *volumes
	ports    *network.Ports
	closed   *closedPorts
	carrier  *carrier
	agent    *agent.Agent
	gate     *gate
	data     *dataPort
}

// build makes the parts of a member whose catalog is open. Nothing runs yet.
func (s *server) build(ctx context.Context) (m *memberParts, err error) {
	id := s.member.ID()
	m = &memberParts{store: s.member.Store(), gate: newGate(boottime.Now), closed: newClosedPorts()}
	about, err := m.store.Cluster(ctx)
	if err != nil {
		return nil, err
	}
	clusterID := about.GetId()
	m.view = catalog.NewView(m.store, s.Log)
	m.observer = controller.NewObserver(m.view, time.Now)
	m.news = newNews(id, m.store.Events, s.Log)
	m.peers = &peers{
		server: func(id string) *argonv1.Server { return m.view.State().Servers[id] },
		config: s.member.ClientTLS,
	}
	if m.images, err = image.NewStore(image.Options{Dir: s.paths.images(), Free: freeForImages, Log: s.Log}); err != nil {
		return nil, err
	}
	if m.replicas, err = s.openReplicas(clusterID, m.images); err != nil {
		return nil, err
	}
	s.disk.suspend, s.disk.resume = m.replicas.Suspend, m.replicas.Resume
	local := newGuestPorts(id)
	m.ports = network.NewPorts(network.Options{
		Address: s.Address, ServerID: id,
		Published: func() ([]network.Publication, <-chan struct{}) {
			changed := m.view.Changed()
			return publications(m.view.State()), changed
		},
		LocalPort: local.lookup,
		Rate: func(machineID string) uint64 {
			return m.view.State().Machines[machineID].GetShares().GetNetworkBytesPerSecond()
		},
		Dial: func(ctx context.Context, serverID string) (net.Conn, error) {
			return m.peers.dialData(ctx, serverID, network.ALPN)
		},
		Busy: m.portBusy,
		Log:  s.Log,
	})
	m.volumes = &volumes{
		meeting:  &mirror.Meeting{Patience: meetPatience},
		serverID: id, store: m.store, view: m.view, paths: s.paths, news: m.news, replicas: m.replicas, log: s.Log,
		sockets: &sockets{keeper: s.keeper, owner: s.confinement.user, log: s.Log},
		ending:  func() bool { return ctx.Err() != nil },
		dialer:  dialer{serverID: id, clusterID: clusterID, store: m.replicas, connect: m.peers.dialData},
	}
	m.carrier = newCarrier(id, m.view, s.paths, m.peers, s.Log)
	m.agent = agent.New(agent.Options{
		ServerID: id, Store: m.store, View: m.view, Gate: m.gate,
		Volumes:  m.volumes,
		Replicas: replicas{m.replicas, s.paths.leftovers()},
		Space:    space{s.disk, m.replicas, s.paths.images()},
		Images:   imageCopies{m.images, m.replicas, m.peers, s.Log},
		Ports:    local,
		Dirs:     guestDirs{s.paths},
		Seeds:    seeds{},
		Monitor:  s.Monitor,
		Carrier:  m.carrier,
		Now:      time.Now, Log: s.Log,
	})
	m.volumes.agent = m.agent
	m.data = s.newDataPort(m, clusterID)
	return m, nil
}

// close ends what does not end by itself.
func (m *memberParts) close(log *slog.Logger) {
	m.carrier.close()
	m.peers.close()
	if err := m.replicas.Close(); err != nil {
		log.Warn("closing the replicas", "err", err)
	}
}

// renewed tells the guard and the agent how long guests may run.
func (m *memberParts) renewed(ctx context.Context, s *server) func(time.Duration) {
	return func(until time.Duration) {
		if err := s.Guard.SetDeadline(ctx, until); err != nil {
			s.Log.Error("the guard was not told of the lease", "err", err)
		}
		m.gate.renewed(until)
	}
}

func (s *server) openReplicas(clusterID string, images *image.Store) (*replica.Store, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	return replica.Open(replica.Options{
		FS: layer.OS{}, Dir: s.paths.volumes(), ClusterID: clusterID, BootID: boot,
		ReserveBytes: reserveBytes, Images: images.Path, Log: s.Log,
	})
}

// newDataPort leads what other servers send to the replicas and to the guests.
func (s *server) newDataPort(m *memberParts, clusterID string) *dataPort {
	replicas := func(ctx context.Context, conn *tls.Conn, serverID string) {
		if err := replica.Serve(ctx, conn, m.replicas); err != nil {
			s.Log.Debug("a holder's connection ended", "server", serverID, "err", err)
		}
	}
	return &dataPort{
		config: s.member.ServerTLS(tls.RequireAndVerifyClientCert, wire.Protocol, wire.ProtocolV1, network.ALPN, stateProtocol),
		allow:  m.allow,
		serve: map[string]func(context.Context, *tls.Conn, string){
			wire.Protocol:   replicas,
			wire.ProtocolV1: replicas,
			stateProtocol:   m.carrier.serve,
			network.ALPN:    func(ctx context.Context, conn *tls.Conn, _ string) { m.ports.ServeTunnel(ctx, conn) },
		},
		log: s.Log,
	}
}

// allow is allowServer by what the catalog says now, where the view may be behind:
// the peer may have joined a moment ago.
func (m *memberParts) allow(ctx context.Context, state tls.ConnectionState) (string, error) {
	id, err := allowServer(m.view.State(), state)
	if err == nil {
		return id, nil
	}
	if err := m.view.Sync(ctx); err != nil {
		return "", fmt.Errorf("looking whether the peer is a server of this cluster: %w", err)
	}
	return allowServer(m.view.State(), state)
}

// allowServer refuses whoever is not a server of this cluster any more.
func allowServer(st *catalog.State, state tls.ConnectionState) (string, error) {
	id, err := cluster.PeerIdentity(state)
	if err != nil {
		return "", err
	}
	if st == nil {
		return "", errors.New("the catalog was not read yet")
	}
	s := st.Servers[id.ID]
	if id.Kind != cluster.KindServer || s == nil || s.GetCertificateSerial() != id.Serial {
		return "", fmt.Errorf("%s is not a server of this cluster", id.ID)
	}
	return id.ID, nil
}

// rpcParts are what the API's handlers get to see.
func (s *server) rpcParts(m *memberParts) *rpc.Parts {
	return &rpc.Parts{
		ServerID: s.member.ID(), Store: m.store, View: m.view,
		Members: s.member, Images: m.images, Volumes: m.volumes,
		Consoles: consoles{m.agent, s.paths}, Guests: guests{m.agent}, Peers: m.peers,
		Now: time.Now, Log: s.Log,
	}
}

// consoles opens the consoles of this server's guests; see rpc.Consoles.
type consoles struct {
	agent *agent.Agent
	paths paths
}

// Kept implements rpc.Consoles.
func (c consoles) Kept(machineID string) ([]byte, error) {
	return os.ReadFile(c.paths.console(machineID))
}

func (c consoles) Open(ctx context.Context, machineID string) (io.ReadWriteCloser, error) {
	g, err := c.agent.Guest(machineID)
	if errors.Is(err, agent.ErrNotHere) {
		return nil, fs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	return g.Console(ctx)
}
