package cluster

import (
	"context"
	"crypto"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// Init makes this server the first of a new cluster, and leaves it running.
// ErrConfigured. If it fails, the directory is as it was.
func (m *Member) Init(ctx context.Context, req *argonv1.InitRequest) (*argonv1.InitResponse, error) {
	m.setup.Lock()
	defer m.setup.Unlock()
	address, err := m.mayBegin(req.GetAddress())
	if err != nil {
		return nil, err
	}
	if err := m.dir.begin(); err != nil {
		return nil, err
	}
	res, err := m.init(ctx, req, address)
	if err != nil {
		m.stopEtcd()
		return nil, errors.Join(fmt.Errorf("make cluster %q: %w", req.GetClusterName(), err), m.dir.clear())
	}
	return res, nil
}

// mayBegin tells at which address the server may become part of a cluster. asked
// is what the request says, empty for what the server was started with. It needs
// setup held.
func (m *Member) mayBegin(asked string) (address string, err error) {
	if id := m.about(); id.ServerID != "" {
		return "", fmt.Errorf("%w: it is server %s of cluster %s: to use the host for another, choose another directory with --dir", ErrConfigured, id.ServerName, id.ClusterName)
	}
	switch started := m.opts.Address; {
	case asked != "" && started != "" && asked != started:
		return "", fmt.Errorf("this server was started with --address %s: leave out --address %s here, or start it without", started, asked)
	case asked == "":
		asked = started
	}
	if !reachable(asked) {
		return "", fmt.Errorf("address %q: others cannot reach this server there: give another --address", asked)
	}
	return asked, nil
}

func (m *Member) init(ctx context.Context, req *argonv1.InitRequest, address string) (*argonv1.InitResponse, error) {
	now := m.opts.Now()
	cluster := &argonv1.Cluster{
		Id: catalog.NewID(), Name: req.GetClusterName(), Created: timestamppb.New(now),
		Settings: withDefaults(req.GetSettings()),
	}
	server := m.newServer(address, req.GetServerName(), req.GetZone(), req.GetWitness())
	server.Meta.Id = catalog.NewID()
	server.VoterRole = argonv1.VoterRole_VOTER_ROLE_VOTER

	ca, err := newAuthority(cluster.Id, now)
	if err != nil {
		return nil, err
	}
	cluster.CaCertificatePem = string(encodeCertificate(ca.cert))
	creds, err := m.certifyFirst(ca, server)
	if err != nil {
		return nil, err
	}
	id := newIdentity(cluster, server)
	id.Endpoints = []string{urlString(server.GetAddress(), int(server.GetEtcdPort()))}
	if err := m.startEtcd(ctx, m.etcdConfig(id)); err != nil {
		return nil, err
	}
	server.MemberId = m.etcd.id()
	p := &parts{id: id, creds: creds, cluster: cluster}
	if p.client, err = newEtcdClient(creds, id.Endpoints); err != nil {
		return nil, err
	}
	if p.store, err = fillCatalog(ctx, p, ca.key, server); err != nil {
		return nil, errors.Join(err, p.client.Close())
	}
	if err := m.settle(p); err != nil {
		return nil, errors.Join(err, p.client.Close())
	}
	m.mu.Lock()
	m.parts = p
	m.mu.Unlock()
	return &argonv1.InitResponse{Cluster: proto.CloneOf(cluster), Server: server}, nil
}

// certifyFirst gives the first server its certificate.
func (m *Member) certifyFirst(ca *authority, server *argonv1.Server) (*credentials, error) {
	key, request, err := newRequest()
	if err != nil {
		return nil, err
	}
	cert, err := ca.issueServer(request, server, m.opts.Now())
	if err != nil {
		return nil, err
	}
	server.CertificateSerial, server.CertificateExpires = serialOf(cert), timestamppb.New(cert.NotAfter)
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return m.dir.saveCredentials(encodeCertificate(ca.cert), encodeCertificate(cert), keyPEM)
}

func fillCatalog(ctx context.Context, p *parts, caKey crypto.Signer, server *argonv1.Server) (*catalog.Store, error) {
	keyPEM, err := encodeKey(caKey)
	if err != nil {
		return nil, err
	}
	store, err := catalog.Create(ctx, p.client, p.cluster)
	if err != nil {
		return nil, err
	}
	if err := store.PutSecret(ctx, authoritySecret, keyPEM); err != nil {
		return nil, err
	}
	return store, store.Servers.Create(ctx, server)
}

// settle makes the server part of its cluster.
func (m *Member) settle(p *parts) error {
	if err := m.dir.saveIdentity(p.id); err != nil {
		return err
	}
	if err := m.dir.finish(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.identity, m.creds = p.id, p.creds
	return nil
}

// newServer is what this server's record begins as.
func (m *Member) newServer(address, name, zone string, witness bool) *argonv1.Server {
	return &argonv1.Server{
		Meta:    &argonv1.Meta{Name: name},
		Address: address,
		ApiPort: uint32(m.opts.Ports.API), DataPort: uint32(m.opts.Ports.Data),
		PeerPort: uint32(m.opts.Ports.Peer), EtcdPort: uint32(m.opts.Ports.Etcd),
		Zone: zone, Witness: witness,
		VoterRole: argonv1.VoterRole_VOTER_ROLE_CLIENT,
		Capacity:  m.opts.Capacity, Version: m.opts.Version,
	}
}

func newIdentity(c *argonv1.Cluster, s *argonv1.Server) *identity {
	return &identity{
		Schema:    identitySchema,
		ClusterID: c.GetId(), ClusterName: c.GetName(),
		ServerID: s.GetMeta().GetId(), ServerName: s.GetMeta().GetName(),
		Address: s.GetAddress(),
		Ports: Ports{
			API: int(s.GetApiPort()), Data: int(s.GetDataPort()),
			Peer: int(s.GetPeerPort()), Etcd: int(s.GetEtcdPort()),
		},
	}
}

// The defaults of the settings, in seconds.
const (
	defaultLease        = 3
	defaultReplicaGrace = 600
	defaultVoterGrace   = 60
)

// withDefaults fills what an operator left open.
func withDefaults(s *argonv1.Settings) *argonv1.Settings {
	orElse := func(n, otherwise uint32) uint32 {
		if n == 0 {
			return otherwise
		}
		return n
	}
	return &argonv1.Settings{
		LeaseSeconds:        orElse(s.GetLeaseSeconds(), defaultLease),
		ReplicaGraceSeconds: orElse(s.GetReplicaGraceSeconds(), defaultReplicaGrace),
		VoterGraceSeconds:   orElse(s.GetVoterGraceSeconds(), defaultVoterGrace),
		ScrubIntervalHours:  s.GetScrubIntervalHours(),
		ScrubOff:            s.GetScrubOff(),
		CpuOvercommit:       s.GetCpuOvercommit(),
	}
}
