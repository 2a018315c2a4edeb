package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// admitTries bounds how often an admission is begun anew because others were
// admitted at the same time.
const admitTries = 20

// Admit lets a server join: the member's side of Join. The token notes it in the
// transaction that makes the server's record, so it lets no more servers in than
// it is for. ErrToken; catalog.ErrExists if the name or the address is taken.
func (m *Member) Admit(ctx context.Context, req *argonv1.AdmitRequest) (*argonv1.AdmitResponse, error) {
	p, err := m.running()
	if err != nil {
		return nil, err
	}
	tok, err := parseToken(req.GetToken())
	if err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		res, err := m.admit(ctx, p, tok, req)
		if errors.Is(err, catalog.ErrConflict) && try < admitTries {
			continue
		}
		if err != nil {
			return nil, err
		}
		m.opts.Log.Info("a server was admitted", "server", res.GetServer().GetMeta().GetName(), "id", res.GetServer().GetMeta().GetId())
		return res, nil
	}
}

// admit is one try.
func (m *Member) admit(ctx context.Context, p *parts, tok token, req *argonv1.AdmitRequest) (*argonv1.AdmitResponse, error) {
	now := m.opts.Now()
	rec, err := p.tokenRecord(ctx, tok, now)
	if err != nil {
		return nil, err
	}
	server, err := candidate(req.GetServer())
	if err != nil {
		return nil, err
	}
	servers, err := p.store.Servers.List(ctx)
	if err != nil {
		return nil, err
	}
	former, err := formerSelf(req, p.cluster, servers)
	if err != nil {
		return nil, err
	}
	if former != nil {
		server = returned(former, server)
		servers = slices.DeleteFunc(servers, func(s *argonv1.Server) bool { return s.GetMeta().GetId() == server.GetMeta().GetId() })
	}
	if err := checkFree(server, servers); err != nil {
		return nil, err
	}
	ca, err := p.authority(ctx)
	if err != nil {
		return nil, err
	}
	cert, err := ca.issueServer(req.GetCertificateRequest(), server, now)
	if err != nil {
		return nil, err
	}
	server.CertificateSerial, server.CertificateExpires = serialOf(cert), timestamppb.New(cert.NotAfter)
	admit(rec, server.GetMeta().GetId())
	// Addresses are unique: two admissions at once meet at the oldest record.
	txn := p.store.Txn().Put(rec)
	if len(servers) > 0 {
		txn.Put(servers[0])
	}
	if server.GetMeta().GetRevision() == 0 {
		txn.Create(server)
	} else {
		txn.Put(server)
	}
	if err := txn.Commit(ctx); err != nil {
		return nil, err
	}
	return &argonv1.AdmitResponse{
		Cluster: p.cluster, Server: server,
		CertificatePem: string(encodeCertificate(cert)),
		EtcdEndpoints:  endpointsOf(remembered(servers)),
	}, nil
}

// candidate is the record of a server that joins: only what it may say about
// itself is taken over.
func candidate(s *argonv1.Server) (*argonv1.Server, error) {
	if !reachable(s.GetAddress()) {
		return nil, fmt.Errorf("address %q: others cannot reach the server there: start it with --address", s.GetAddress())
	}
	ports := []uint32{s.GetApiPort(), s.GetDataPort(), s.GetPeerPort(), s.GetEtcdPort()}
	for i, p := range ports {
		if p == 0 || p > 65535 {
			return nil, fmt.Errorf("port %d of server %q: give 1 to 65535", p, s.GetMeta().GetName())
		}
		for _, other := range ports[:i] {
			if p == other {
				return nil, fmt.Errorf("port %d of server %q is given twice: choose another", p, s.GetMeta().GetName())
			}
		}
	}
	return &argonv1.Server{
		Meta:    &argonv1.Meta{Id: catalog.NewID(), Name: s.GetMeta().GetName(), Labels: s.GetMeta().GetLabels()},
		Address: s.GetAddress(),
		ApiPort: s.GetApiPort(), DataPort: s.GetDataPort(), PeerPort: s.GetPeerPort(), EtcdPort: s.GetEtcdPort(),
		Zone: s.GetZone(), Witness: s.GetWitness(),
		VoterRole: argonv1.VoterRole_VOTER_ROLE_CLIENT,
		Capacity:  s.GetCapacity(), Acceleration: s.GetAcceleration(), Version: s.GetVersion(),
	}, nil
}

// goodHost is a name that the leader can tell etcd in a URL.
var goodHost = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)

// reachable tells whether an address can be that of one server.
func reachable(address string) bool {
	if ip := net.ParseIP(address); ip != nil {
		return !ip.IsUnspecified() && !ip.IsMulticast()
	}
	return goodHost.MatchString(address)
}

// checkFree refuses a server with the name or at the address of another.
func checkFree(s *argonv1.Server, servers []*argonv1.Server) error {
	for _, other := range servers {
		if other.GetMeta().GetName() == s.GetMeta().GetName() {
			return fmt.Errorf("server %q %w: choose another name with --name, or remove that one with `argon server rm`", s.GetMeta().GetName(), catalog.ErrExists)
		}
		if other.GetAddress() == s.GetAddress() && (other.GetPeerPort() == s.GetPeerPort() || other.GetEtcdPort() == s.GetEtcdPort() ||
			other.GetApiPort() == s.GetApiPort() || other.GetDataPort() == s.GetDataPort()) {
			return fmt.Errorf("address %s is that of server %s: remove that one with `argon server rm`, or use another address or other ports: %w",
				s.GetAddress(), other.GetMeta().GetName(), catalog.ErrExists)
		}
	}
	return nil
}

// IssueClient signs the certificate of a remote administrator, and writes down that
// it did. request is the DER of a PKCS #10 request; life is how long the certificate
// is good; by is who asks for it.
func (m *Member) IssueClient(ctx context.Context, name string, request []byte, life time.Duration, by string) (string, error) {
	p, err := m.running()
	if err != nil {
		return "", err
	}
	ca, err := p.authority(ctx)
	if err != nil {
		return "", err
	}
	now := m.opts.Now()
	cert, err := ca.issueClient(request, name, life, now)
	if err != nil {
		return "", err
	}
	if err := p.dropExpiredClients(ctx, now); err != nil {
		return "", err
	}
	err = p.store.Clients.Create(ctx, &argonv1.ClientCertificate{
		Serial: serialOf(cert), Client: name, Created: timestamppb.New(now), Expires: timestamppb.New(cert.NotAfter), IssuedBy: by,
	})
	if err != nil {
		return "", err
	}
	return string(encodeCertificate(cert)), nil
}

// clientKept is how much longer than it is good a certificate is remembered: for
// servers whose clock is behind.
const clientKept = 7 * 24 * time.Hour

// dropExpiredClients forgets certificates that nobody takes any more. Not those
// that were revoked: a server whose clock is ahead would let them in again
// elsewhere, where they have not expired. There are few.
func (p *parts) dropExpiredClients(ctx context.Context, now time.Time) error {
	list, err := p.store.Clients.List(ctx)
	if err != nil {
		return err
	}
	for _, rec := range list {
		if rec.GetRevoked() != nil || now.Sub(rec.GetExpires().AsTime()) < clientKept {
			continue
		}
		err := p.store.Clients.Delete(ctx, rec)
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
	}
	return nil
}

// authority reads the authority's key; it is kept nowhere but in the catalog.
func (p *parts) authority(ctx context.Context) (*authority, error) {
	key, err := p.store.GetSecret(ctx, authoritySecret)
	if err != nil {
		return nil, err
	}
	return parseAuthority(encodeCertificate(p.creds.ca), key)
}
