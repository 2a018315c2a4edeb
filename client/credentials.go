package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// Credentials are what a remote client needs, in PEM.
type Credentials struct {
	CA          []byte // the cluster's certificate authority
	Certificate []byte
	Key         []byte
	// Servers are the addresses of the cluster's servers, as last known; empty if
	// they are not.
	Servers []string
}

// The files of a credentials directory.
const (
	caFile          = "ca.pem"
	certificateFile = "client.pem"
	keyFile         = "client.key"
	serversFile     = "servers" // one in each line
)

// RequestCredentials makes a key, which stays here, and has the cluster sign
// a certificate for it in this name. ttl 0 leaves the time to the cluster.
func (c *Client) RequestCredentials(ctx context.Context, name string, ttl time.Duration) (*Credentials, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	request, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate request for %s: %w", name, err)
	}
	res, err := Call(ctx, c.Cluster.IssueClientCertificate, &argonv1.IssueClientCertificateRequest{
		Name:               name,
		CertificateRequest: request,
		TtlSeconds:         uint32(ttl / time.Second),
	})
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the key of %s: %w", name, err)
	}
	return &Credentials{
		CA:          []byte(res.CaCertificatePem),
		Certificate: []byte(res.CertificatePem),
		Key:         pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		Servers:     res.GetServers(),
	}, nil
}

// LoadCredentials reads what [Credentials.Save] wrote.
func LoadCredentials(dir string) (*Credentials, error) {
	c := &Credentials{}
	for _, f := range []struct {
		name string
		into *[]byte
	}{{caFile, &c.CA}, {certificateFile, &c.Certificate}, {keyFile, &c.Key}} {
		data, err := os.ReadFile(filepath.Join(dir, f.name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("client certificate: no %s in %s: make one with `argon client create` on a server and copy it here, or name its directory with --certs", f.name, dir)
		}
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		*f.into = data
	}
	// Without them the caller says which server.
	c.Servers, _ = LoadServers(dir)
	return c, nil
}

// LoadServers reads where the servers are from a credentials directory; nothing if
// it does not say.
func LoadServers(dir string) ([]string, error) {
	data, err := os.ReadFile(filepath.Join(dir, serversFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the list of servers: %w", err)
	}
	return strings.Fields(string(data)), nil
}

// SaveServers writes where the servers are into a credentials directory, if it says
// something else.
func SaveServers(dir string, servers []string) error {
	if known, err := LoadServers(dir); err == nil && slices.Equal(known, servers) {
		return nil
	}
	if err := renameio.WriteFile(filepath.Join(dir, serversFile), serverLines(servers), 0o644); err != nil {
		return fmt.Errorf("the list of servers: %w", err)
	}
	return nil
}

func serverLines(servers []string) []byte {
	return []byte(strings.Join(append(slices.Clone(servers), ""), "\n"))
}

// Save writes the credentials into a directory, which it makes; the key is
// readable by its owner only. It does not overwrite: fs.ErrExist.
func (c *Credentials) Save(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("saving the client certificate: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{{keyFile, c.Key, 0o600}, {certificateFile, c.Certificate, 0o644}, {caFile, c.CA, 0o644}, {serversFile, serverLines(c.Servers), 0o644}} {
		if err := writeNew(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			return fmt.Errorf("saving the client certificate: %w", err)
		}
	}
	return nil
}

func writeNew(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// tlsConfig trusts the cluster's own authority and nothing else.
func (c *Credentials) tlsConfig() (*tls.Config, error) {
	pair, err := tls.X509KeyPair(c.Certificate, c.Key)
	if err != nil {
		return nil, fmt.Errorf("client certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(c.CA) {
		return nil, errors.New("client certificate: the CA's file holds no certificate")
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{pair},
		RootCAs:      roots,
		ServerName:   serverName,
		NextProtos:   []string{"h2"},
	}, nil
}
