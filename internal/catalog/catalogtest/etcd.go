// Package catalogtest starts a real etcd for the tests of packages that use
// the catalog.
package catalogtest

import (
	"net"
	"net/url"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// Etcd is an embedded etcd that a test can stop and start again.
type Etcd struct {
	t   testing.TB
	cfg *embed.Config
	srv *embed.Etcd
}

// Start starts an etcd that ends with the test, and a client of it.
func Start(t testing.TB) *clientv3.Client {
	t.Helper()
	_, cli := StartEtcd(t)
	return cli
}

// StartEtcd is Start for tests that stop the etcd in between.
func StartEtcd(t testing.TB) (*Etcd, *clientv3.Client) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true
	client, peer := freeURL(t), freeURL(t)
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.Name + "=" + peer.String()
	e := &Etcd{t: t, cfg: cfg}
	e.Start()
	t.Cleanup(e.Stop)
	cli, err := clientv3.New(clientv3.Config{
		Endpoints: []string{client.String()}, DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cli.Close() })
	return e, cli
}

// Start starts it again, with what it had.
func (e *Etcd) Start() {
	e.t.Helper()
	srv, err := embed.StartEtcd(e.cfg)
	if err != nil {
		e.t.Fatalf("start etcd: %v", err)
	}
	<-srv.Server.ReadyNotify()
	e.srv = srv
}

// Stop stops it; its directory stays.
func (e *Etcd) Stop() {
	if e.srv != nil {
		e.srv.Close()
		e.srv = nil
	}
}

func freeURL(t testing.TB) url.URL {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return url.URL{Scheme: "http", Host: l.Addr().String()}
}
