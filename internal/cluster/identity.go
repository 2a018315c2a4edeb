package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// Kind says what a certificate is for.
type Kind string

// The kinds of certificates.
const (
	KindServer Kind = "server"
	KindClient Kind = "client"
)

// Identity is who a certificate of the cluster says its owner is.
type Identity struct {
	Kind Kind
	// ID is the server's id, or the client's name.
	ID string
	// Serial is the certificate's serial number, hex, as in a server's record.
	Serial string
	// Expires is when the certificate ends.
	Expires time.Time
}

const identityScheme = "argon"

func (i Identity) url() *url.URL {
	return &url.URL{Scheme: identityScheme, Host: string(i.Kind), Path: "/" + i.ID}
}

// PeerIdentity says who is at the other end of a connection to this server.
// It is an error if the TLS layer has not verified the peer's certificate.
func PeerIdentity(state tls.ConnectionState) (Identity, error) {
	if len(state.PeerCertificates) == 0 {
		return Identity{}, errors.New("the peer has shown no certificate")
	}
	if len(state.VerifiedChains) == 0 {
		return Identity{}, errors.New("the peer's certificate was not verified")
	}
	return identityOf(state.PeerCertificates[0])
}

// identityOf reads a certificate that was verified.
func identityOf(cert *x509.Certificate) (Identity, error) {
	for _, u := range cert.URIs {
		id := strings.TrimPrefix(u.Path, "/")
		kind := Kind(u.Host)
		if u.Scheme != identityScheme || id == "" || (kind != KindServer && kind != KindClient) {
			continue
		}
		return Identity{Kind: kind, ID: id, Serial: serialOf(cert), Expires: cert.NotAfter}, nil
	}
	return Identity{}, fmt.Errorf("the certificate of %q is neither a server's nor a client's", cert.Subject.CommonName)
}

// credentials are what this server shows and what it believes.
type credentials struct {
	own  tls.Certificate // its chain ends with the authority
	ca   *x509.Certificate
	pool *x509.CertPool
	// superseded is told when a server of a later incarnation was met.
	superseded *supersession
}

func newCredentials(caPEM, certPEM, keyPEM []byte) (*credentials, error) {
	ca, err := parseCertificate(caPEM)
	if err != nil {
		return nil, fmt.Errorf("the certificate authority: %w", err)
	}
	own, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("the server's certificate and key: %w", err)
	}
	c := &credentials{own: own, ca: ca, pool: x509.NewCertPool(), superseded: newSupersession()}
	c.pool.AddCert(ca)
	// What the time is, is for CheckClock.
	if _, err := verifyServerAt(c.own.Leaf, ca, c.own.Leaf.NotBefore); err != nil {
		return nil, err
	}
	// A joining server knows only the authority's fingerprint: show it all.
	c.own.Certificate = append(c.own.Certificate, ca.Raw)
	return c, nil
}

// verifyServer checks that a certificate is one of a server of the cluster
// with this authority. Who it is is told by an identity, not by an address.
func verifyServer(cert, ca *x509.Certificate) (Identity, error) {
	return verifyServerAt(cert, ca, time.Time{})
}

// verifyServerAt is verifyServer at a time; zero: now.
func verifyServerAt(cert, ca *x509.Certificate, at time.Time) (Identity, error) {
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	_, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, CurrentTime: at,
	})
	if invalid := (x509.CertificateInvalidError{}); errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return Identity{}, fmt.Errorf("the certificate is not valid at this host's time: check the clocks of both servers: %w", err)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("the certificate is not one of this cluster: %w", err)
	}
	id, err := identityOf(cert)
	if err == nil && id.Kind != KindServer {
		err = errors.New("the certificate is not a server's")
	}
	return id, err
}

// server is for listeners.
func (c *credentials) server(clients tls.ClientAuthType, protocols []string) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{c.own},
		ClientAuth:   clients,
		ClientCAs:    c.pool,
		NextProtos:   protocols,
	}
}

// client is for connections to one server, or to any if serverID is empty.
func (c *credentials) client(serverID string, protocols []string) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{c.own},
		NextProtos:   protocols,
		// What Go would verify is the address; VerifyConnection checks the
		// chain, and the identity instead.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := verifyServer(state.PeerCertificates[0], c.ca)
			if err != nil {
				if supersededBy(state.PeerCertificates, c.ca) > 0 {
					c.superseded.tell()
					return ErrSuperseded
				}
				return err
			}
			if serverID != "" && id.ID != serverID {
				return fmt.Errorf("server %s answers in the place of server %s", id.ID, serverID)
			}
			return nil
		},
	}
}
