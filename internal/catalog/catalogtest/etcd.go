// Package catalogtest starts a real etcd for the tests of packages that use
// the catalog.
//
// What lives here: the etcd, its client, and the faults that tests make. What
// must not: anything of what is stored.
package catalogtest

import (
	"context"
	"net"
	"net/url"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// Etcd is an embedded etcd that a test can stop and start again. Its methods
// are for the test's own goroutine.
type Etcd struct {
	t   testing.TB
	cfg embed.Config
	srv *embed.Etcd

	mu sync.Mutex
	// at is the address that clients reach it at; empty while it is stopped.
	at    string
	cut   map[string]bool
	conns map[string][]*conn // by the name it was dialled by
}

// Start starts an etcd that ends with the test, and a client of it.
func Start(t testing.TB) *clientv3.Client {
	t.Helper()
	_, cli := StartEtcd(t)
	return cli
}

// StartEtcd is Start for tests that make faults.
func StartEtcd(t testing.TB) (*Etcd, *clientv3.Client) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true
	cfg.MaxTxnOps = 2048 // as internal/cluster has it
	cfg.TickMs, cfg.ElectionMs = 20, 200
	anyPort := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = anyPort, anyPort
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = anyPort, anyPort
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e := &Etcd{t: t, cfg: *cfg, cut: map[string]bool{}, conns: map[string][]*conn{}}
	e.Start()
	t.Cleanup(e.Stop)
	return e, e.Client("etcd")
}

// Client makes a client that ends with the test. Each name is one address of
// the etcd to it, as each voter of a cluster is.
func (e *Etcd) Client(names ...string) *clientv3.Client {
	e.t.Helper()
	var endpoints []string
	for _, name := range names {
		endpoints = append(endpoints, "http://"+name+":1")
	}
	cli, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(e.dial),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
				BaseDelay: 10 * time.Millisecond, Multiplier: 1.6, MaxDelay: 100 * time.Millisecond,
			}}),
		},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = cli.Close() })
	return cli
}

// Start starts it again, with what it had, after Stop.
func (e *Etcd) Start() {
	e.t.Helper()
	cfg := e.cfg
	srv, err := embed.StartEtcd(&cfg)
	if err != nil {
		e.t.Fatalf("start etcd: %v", err)
	}
	<-srv.Server.ReadyNotify()
	e.srv = srv
	e.mu.Lock()
	defer e.mu.Unlock()
	e.at = srv.Clients[0].Addr().String()
}

// Stop stops it; its directory stays.
func (e *Etcd) Stop() {
	if e.srv == nil {
		return
	}
	e.mu.Lock()
	e.at = ""
	for name := range e.conns {
		e.hangUp(name)
	}
	e.mu.Unlock()
	e.srv.Close()
	e.srv = nil
}

// Cut breaks the connections to a name and lets no new ones through.
func (e *Etcd) Cut(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cut[name] = true
	e.hangUp(name)
}

// Heal ends Cut.
func (e *Etcd) Heal(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.cut, name)
}

// hangUp needs mu.
func (e *Etcd) hangUp(name string) {
	for _, c := range e.conns[name] {
		_ = c.Close()
	}
	delete(e.conns, name)
}

// Freeze lets connections to a name live and pass nothing on, as when a host
// loses its power.
func (e *Etcd) Freeze(name string) { e.each(name, (*conn).freeze) }

// Thaw ends Freeze: what was held up goes on.
func (e *Etcd) Thaw(name string) { e.each(name, (*conn).thaw) }

func (e *Etcd) each(name string, do func(*conn)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.conns[name] {
		do(c)
	}
}

// dial reaches the etcd wherever it listens now: a port that it had before may
// be somebody else's.
func (e *Etcd) dial(ctx context.Context, address string) (net.Conn, error) {
	name, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	at := e.at
	if e.cut[name] {
		at = ""
	}
	e.mu.Unlock()
	if at == "" {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	mine := &conn{Conn: c, closed: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.conns[name] = append(e.conns[name], mine)
	if e.cut[name] || e.at != at { // since it was asked
		e.hangUp(name)
	}
	return mine, nil
}

// conn can be frozen.
type conn struct {
	net.Conn
	once   sync.Once
	closed chan struct{}

	mu sync.Mutex
	// frozen is closed by thaw; nil while the connection is not frozen.
	frozen chan struct{}
}

func (c *conn) freeze() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen == nil {
		c.frozen = make(chan struct{})
	}
}

func (c *conn) thaw() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen != nil {
		close(c.frozen)
		c.frozen = nil
	}
}

// pass waits while the connection is frozen.
func (c *conn) pass() {
	for {
		c.mu.Lock()
		frozen := c.frozen
		c.mu.Unlock()
		if frozen == nil {
			return
		}
		select {
		case <-frozen:
		case <-c.closed:
			return
		}
	}
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.pass()
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	c.pass()
	return c.Conn.Write(b)
}

func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// Compact drops all history up to now.
func Compact(t testing.TB, cli *clientv3.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	res, err := cli.Get(ctx, "any", clientv3.WithCountOnly())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Compact(ctx, res.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
}
