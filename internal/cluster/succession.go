package cluster

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file: incarnations. A recovered cluster has a new authority, so that nobody
// of an earlier incarnation is let in anywhere. Its servers also show, behind their
// own certificate, the new authority's key as certified by each former authority: a
// server of an earlier incarnation that meets one of them learns by that, and by
// nothing less, that its time is over.

// ErrSuperseded: the cluster was recovered without this server.
var ErrSuperseded = errors.New("its cluster was recovered without this server")

const (
	successionHost = "succession"
	successionFile = "succession.pem"
)

// certifySuccession has a former authority certify its successor.
func (a *authority) certifySuccession(next *authority, clusterID string, incarnation uint32, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := authorityTemplate(serial, clusterID, now)
	template.URIs = []*url.URL{{Scheme: identityScheme, Host: successionHost, Path: "/" + clusterID + "/" + strconv.FormatUint(uint64(incarnation), 10)}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, next.key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("certify the new authority: %w", err)
	}
	return x509.ParseCertificate(der)
}

// supersededBy tells which incarnation another server proves to be of; 0: none that
// follows the authority's. chain is what it has shown.
func supersededBy(chain []*x509.Certificate, ca *x509.Certificate) uint32 {
	for _, c := range chain[min(1, len(chain)):] {
		incarnation := successionOf(c)
		if incarnation == 0 || c.CheckSignatureFrom(ca) != nil {
			continue
		}
		// Whoever has seen a succession can show it: it counts if the one who
		// shows it has a certificate by the last authority that it leads to.
		if chain[0].CheckSignatureFrom(c) == nil {
			return incarnation
		}
		ca = c
	}
	return 0
}

func successionOf(c *x509.Certificate) uint32 {
	for _, u := range c.URIs {
		if u.Scheme != identityScheme || u.Host != successionHost {
			continue
		}
		_, number, _ := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
		if n, err := strconv.ParseUint(number, 10, 32); err == nil {
			return uint32(n)
		}
	}
	return 0
}

// saveSuccessions keeps what proves the cluster's incarnation.
func (d directory) saveSuccessions(c *argonv1.Cluster) error {
	if len(c.GetSuccessionCertificatesPem()) == 0 {
		return nil
	}
	return d.write(successionFile, []byte(strings.Join(c.GetSuccessionCertificatesPem(), "")), 0o644)
}

// supersession is how a server learns that its incarnation is over.
type supersession struct {
	once sync.Once
	told chan struct{}
}

func newSupersession() *supersession { return &supersession{told: make(chan struct{})} }

func (s *supersession) tell() { s.once.Do(func() { close(s.told) }) }

func (d directory) supersededFile() string { return d.path("superseded") }

// checkSuperseded refuses a directory whose server was found to be superseded.
func (d directory) checkSuperseded(id *identity) error {
	if !exists(d.supersededFile()) {
		return nil
	}
	return fmt.Errorf("%w: server %s of cluster %s: bring it back with `argon cluster rejoin`", ErrSuperseded, id.ServerName, id.ClusterName)
}

// noteSuperseded keeps that, and says it.
func (m *Member) noteSuperseded() error {
	id := m.about()
	if err := m.dir.write(filepath.Base(m.dir.supersededFile()), nil, 0o600); err != nil {
		return err
	}
	return m.dir.checkSuperseded(&id)
}

// WatchSuccession waits until this server meets one of a later incarnation of its
// cluster, and returns ErrSuperseded then; or until ctx ends.
func (m *Member) WatchSuccession(ctx context.Context) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	select {
	case <-p.creds.superseded.told:
		return m.noteSuperseded()
	case <-ctx.Done():
		return nil
	}
}

// addSuccessions has the credentials show them.
func (d directory) addSuccessions(c *credentials) error {
	rest, err := os.ReadFile(d.path(successionFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the server's certificates: %w", err)
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil
		}
		c.own.Certificate = append(c.own.Certificate, block.Bytes)
	}
}
