package cluster

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// ErrClock: by this host's clock the server's certificate is not valid.
var ErrClock = errors.New("this host's clock or the server's certificate is wrong")

// CheckClock fails with ErrClock while nobody could speak to this server: a host's
// clock may be wrong after its start until it is set.
func (m *Member) CheckClock() error {
	m.mu.Lock()
	creds := m.creds
	m.mu.Unlock()
	if creds == nil {
		return nil
	}
	now := m.opts.Now()
	for _, cert := range []*x509.Certificate{creds.ca, creds.own.Leaf} {
		if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
			return fmt.Errorf("%w: it is %s here, and the certificate of %q is valid from %s to %s: set the clock", ErrClock,
				now.UTC().Format(time.RFC3339), cert.Subject.CommonName, cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return nil
}
