package cluster

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
)

const (
	// DefaultAPIPort is where a member's API is, unless it was told otherwise.
	DefaultAPIPort = 7440
	dialTimeout    = 5 * time.Second
	admitTimeout   = 20 * time.Second
)

// Join makes this server part of a cluster, and leaves it running. The
// member's API is believed only if it shows the authority that the token pins.
// ErrConfigured, ErrToken. If it fails before the member has admitted the
// server, the directory is as it was.
func (m *Member) Join(ctx context.Context, req *argonv1.JoinRequest) (*argonv1.JoinResponse, error) {
	m.setup.Lock()
	defer m.setup.Unlock()
	address, err := m.mayBegin(req.GetOwnAddress())
	if err != nil {
		return nil, err
	}
	tok, err := parseToken(req.GetToken())
	if err != nil {
		return nil, err
	}
	if err := m.dir.begin(); err != nil {
		return nil, err
	}
	res, err := m.join(ctx, req, address, tok)
	if err != nil {
		return nil, errors.Join(err, m.dir.clear())
	}
	// The server is a member now, whatever happens next.
	if err := m.start(ctx); err != nil {
		return nil, fmt.Errorf("server %s has joined, but cannot reach the catalog yet: check that ports %d and %d of the servers can be reached: %w",
			res.GetServer().GetMeta().GetName(), m.opts.Ports.Peer, m.opts.Ports.Etcd, err)
	}
	return res, nil
}

// join asks a member to admit this server and keeps what it answers.
func (m *Member) join(ctx context.Context, req *argonv1.JoinRequest, address string, tok token) (*argonv1.JoinResponse, error) {
	key, request, err := newRequest()
	if err != nil {
		return nil, err
	}
	res, err := askAdmission(ctx, req.GetAddress(), tok, &argonv1.AdmitRequest{
		Token:              tok.String(),
		CertificateRequest: request,
		Server:             m.newServer(address, req.GetServerName(), req.GetZone(), req.GetWitness()),
	})
	if err != nil {
		return nil, err
	}
	creds, err := m.dir.keepAnswer(res, key, tok)
	if err != nil {
		return nil, fmt.Errorf("%s admitted this server as %s, but it cannot use the answer: remove it there with `argon server rm`, then join with a new token: %w",
			req.GetAddress(), res.GetServer().GetMeta().GetName(), err)
	}
	if err := m.dir.saveSuccessions(res.GetCluster()); err != nil {
		return nil, err
	}
	if err := m.dir.addSuccessions(creds); err != nil {
		return nil, err
	}
	id := newIdentity(res.GetCluster(), res.GetServer())
	id.Endpoints = res.GetEtcdEndpoints()
	if err := m.settle(&parts{id: id, creds: creds}); err != nil {
		return nil, err
	}
	return &argonv1.JoinResponse{Cluster: res.GetCluster(), Server: res.GetServer()}, nil
}

// keepAnswer checks the certificate that a member sent and writes it.
func (d directory) keepAnswer(res *argonv1.AdmitResponse, key crypto.Signer, tok token) (*credentials, error) {
	ca, err := parseCertificate([]byte(res.GetCluster().GetCaCertificatePem()))
	if err != nil {
		return nil, fmt.Errorf("the certificate authority: %w", err)
	}
	if fingerprintOf(ca) != tok.fingerprint {
		return nil, errors.New("the certificate authority is not the one that the token names")
	}
	if len(res.GetEtcdEndpoints()) == 0 {
		return nil, errors.New("no server keeps the catalog")
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	own, err := parseCertificate([]byte(res.GetCertificatePem()))
	if err != nil {
		return nil, fmt.Errorf("this server's certificate: %w", err)
	}
	if _, err := verifyServer(own, ca); err != nil {
		return nil, err
	}
	creds, err := d.saveCredentials(encodeCertificate(ca), []byte(res.GetCertificatePem()), keyPEM)
	if err != nil {
		return nil, err
	}
	who, err := identityOf(creds.own.Leaf)
	if err != nil {
		return nil, err
	}
	if who.ID != res.GetServer().GetMeta().GetId() {
		return nil, fmt.Errorf("the certificate is for server %s", who.ID)
	}
	return creds, nil
}

// askAdmission calls a member whose authority a token pins.
func askAdmission(ctx context.Context, address string, tok token, req *argonv1.AdmitRequest) (*argonv1.AdmitResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, admitTimeout)
	defer cancel()
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout: dialTimeout,
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS13,
			// VerifyConnection does it: the token names the authority, and the
			// address may be any of the cluster.
			InsecureSkipVerify: true,
			VerifyConnection:   tok.verify,
		},
		ForceAttemptHTTP2: true,
	}
	defer transport.CloseIdleConnections()
	address = withPort(address, DefaultAPIPort)
	client := argonv1connect.NewClusterServiceClient(&http.Client{Transport: transport}, "https://"+address)
	res, err := client.Admit(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, admissionError(address, err)
	}
	return res.Msg, nil
}

// verify lets a connection be only if the peer is a server of the cluster
// whose authority has the token's fingerprint.
func (t token) verify(state tls.ConnectionState) error {
	i := indexFingerprint(state.PeerCertificates, t.fingerprint)
	if i < 0 {
		return fmt.Errorf("%w: it is of another cluster than this server", errOtherCluster)
	}
	_, err := verifyServer(state.PeerCertificates[0], state.PeerCertificates[i])
	return err
}

var errOtherCluster = errors.New("the token does not fit")

func indexFingerprint(chain []*x509.Certificate, fingerprint [32]byte) int {
	for i, cert := range chain {
		if fingerprintOf(cert) == fingerprint {
			return i
		}
	}
	return -1
}

// admissionError says in one line why a member did not admit this server.
func admissionError(address string, err error) error {
	var answer *connect.Error
	var network *net.OpError
	switch {
	case errors.Is(err, errOtherCluster):
		return fmt.Errorf("join at %s: %w: it is a token of another cluster: check the address, or make a token there", address, ErrToken)
	case errors.As(err, &network):
		return fmt.Errorf("join at %s: no server answers there: check the address, and that `argon server` runs: %w", address, network)
	case errors.As(err, &answer) && connect.IsWireError(err):
		return connect.NewError(answer.Code(), fmt.Errorf("join at %s: %s", address, answer.Message()))
	default:
		return fmt.Errorf("join at %s: %w", address, err)
	}
}

// withPort adds a port to an address that has none.
func withPort(address string, port int) string {
	if _, _, err := net.SplitHostPort(address); err == nil {
		return address
	}
	return net.JoinHostPort(strings.Trim(address, "[]"), strconv.Itoa(port))
}
