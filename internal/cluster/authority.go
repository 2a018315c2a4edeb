package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const (
	authorityLife   = 30 * 365 * 24 * time.Hour
	certificateLife = 10 * 365 * 24 * time.Hour
	// backdate makes a new certificate valid for servers whose clock is behind.
	backdate = 24 * time.Hour
	// authoritySecret is the name of the authority's key in the catalog.
	authoritySecret = "ca-key"
	// serverHostname is in every server's certificate and in no client's: etcd
	// lets in only who has it.
	serverHostname = "server.argon.internal"
)

// authority signs the certificates of one cluster.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// authorityTemplate is what all certificates of a cluster's authorities have.
func authorityTemplate(serial *big.Int, clusterID string, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Argon"}, CommonName: "cluster " + clusterID},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
}

func newAuthority(clusterID string, now time.Time) (*authority, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := authorityTemplate(serial, clusterID, now)
	template.KeyUsage |= x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse the new certificate authority: %w", err)
	}
	return &authority{cert: cert, key: key}, nil
}

// parseAuthority puts together what the catalog keeps.
func parseAuthority(certPEM, keyPEM []byte) (*authority, error) {
	cert, err := parseCertificate(certPEM)
	if err != nil {
		return nil, fmt.Errorf("the certificate authority: %w", err)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("the key of the certificate authority: %w", err)
	}
	if !samePublicKey(key.Public(), cert.PublicKey) {
		return nil, errors.New("the key of the certificate authority does not fit its certificate")
	}
	return &authority{cert: cert, key: key}, nil
}

// issueServer signs the certificate of a server: valid for its address and
// name, at both ends of a connection.
func (a *authority) issueServer(request []byte, s *argonv1.Server, now time.Time) (*x509.Certificate, error) {
	id := s.GetMeta().GetId()
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: id},
		NotAfter:    now.Add(certificateLife),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{s.GetMeta().GetName(), serverHostname},
		URIs:        []*url.URL{Identity{Kind: KindServer, ID: id}.url()},
	}
	if ip := net.ParseIP(s.GetAddress()); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = append(template.DNSNames, s.GetAddress())
	}
	return a.issue(request, template, now)
}

// issueClient signs the certificate of a remote administrator.
func (a *authority) issueClient(request []byte, name string, life time.Duration, now time.Time) (*x509.Certificate, error) {
	return a.issue(request, &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		NotAfter:    now.Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{Identity{Kind: KindClient, ID: name}.url()},
	}, now)
}

// issue signs a template with the key of a request. Nothing else of the
// request is believed.
func (a *authority) issue(request []byte, template *x509.Certificate, now time.Time) (*x509.Certificate, error) {
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return nil, fmt.Errorf("the certificate request cannot be read: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("the certificate request is not signed by its own key: %w", err)
	}
	if err := checkPublicKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if template.SerialNumber, err = newSerial(); err != nil {
		return nil, err
	}
	template.NotBefore = now.Add(-backdate)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, csr.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", template.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

// checkPublicKey refuses keys that are too weak to be trusted for years.
func checkPublicKey(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize >= 256 {
			return nil
		}
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if k.N.BitLen() >= 2048 {
			return nil
		}
	}
	return errors.New("the certificate request has a weak key: use ECDSA P-256, Ed25519 or RSA of 2048 bits or more")
}

// newRequest makes a key and the request to certify it.
func newRequest() (key crypto.Signer, request []byte, err error) {
	key, err = newKey()
	if err != nil {
		return nil, nil, err
	}
	request, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a certificate request: %w", err)
	}
	return key, request, nil
}

func newKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return key, nil
}

// newSerial is a random positive number of 127 bits.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	return n, nil
}

// serialOf is a certificate's serial number as records have it: hex.
func serialOf(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

// fingerprintOf is what a token pins: SHA-256 of the certificate.
func fingerprintOf(cert *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(cert.Raw) }

func encodeCertificate(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func parseCertificate(b []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("not a certificate in PEM form")
	}
	return x509.ParseCertificate(block.Bytes)
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseKey(b []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("not a private key in PEM form")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", key)
	}
	return signer, nil
}

func samePublicKey(a, b any) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
