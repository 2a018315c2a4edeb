package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// serverName is in the certificate of every server of a cluster: a client trusts
// that it is one, whatever the address that it is reached at.
const serverName = "server.argon.internal"

// nextAfter bounds how long one of several servers may take to answer before the
// next one is asked.
const nextAfter = 2 * time.Second

// split takes a list of addresses apart, and adds the port where there is none.
func split(list string) []string {
	var all []string
	for _, address := range strings.Split(list, ",") {
		if address = strings.TrimSpace(address); address == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(address); err != nil {
			address = net.JoinHostPort(strings.Trim(address, "[]"), DefaultPort)
		}
		all = append(all, address)
	}
	return all
}

// remote connects to the first of several servers that answers, and then to the
// same again, as long as it does. Safe for concurrent use.
type remote struct {
	addresses []string
	config    *tls.Config

	mu sync.Mutex
	// last is the one that answered last; answered: one has.
	last     int
	answered bool
}

func (r *remote) transport() *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP2(true)
	return &http.Transport{Protocols: &protocols, HTTP2: http2Config(), DialTLSContext: r.dial}
}

// at is the server that answered last; empty if none has.
func (r *remote) at() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.answered {
		return ""
	}
	return r.addresses[r.last]
}

func (r *remote) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	r.mu.Lock()
	first := r.last
	r.mu.Unlock()
	bound := nextAfter
	if len(r.addresses) == 1 {
		bound = dialTimeout
	}
	var failures []error
	for n := range r.addresses {
		i := (first + n) % len(r.addresses)
		conn, err := r.dialOne(ctx, network, r.addresses[i], bound)
		if err == nil {
			r.mu.Lock()
			r.last, r.answered = i, true
			r.mu.Unlock()
			return conn, nil
		}
		if failures = append(failures, err); ctx.Err() != nil {
			break
		}
	}
	if len(failures) == 1 {
		return nil, failures[0]
	}
	return nil, &UnreachableError{At: strings.Join(r.addresses, ", "), Err: oneLine(failures)}
}

// dialOne also shakes hands: a host that is frozen takes connections and says
// nothing.
func (r *remote) dialOne(ctx context.Context, network, address string, bound time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, &UnreachableError{At: address, Err: err}
	}
	conn := tls.Client(raw, r.config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		if errors.Is(err, context.DeadlineExceeded) {
			return nil, &UnreachableError{At: address, Err: err}
		}
		return nil, fmt.Errorf("server %s: %w", address, err)
	}
	return conn, nil
}

// manyErrors says several errors in one line.
type manyErrors []error

func oneLine(errs []error) error { return manyErrors(errs) }

func (m manyErrors) Error() string {
	var all []string
	for _, err := range m {
		var unreachable *UnreachableError
		if errors.As(err, &unreachable) {
			err = unreachable.Err
		}
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

func (m manyErrors) Unwrap() []error { return m }
