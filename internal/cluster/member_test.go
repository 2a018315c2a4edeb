package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/boottime"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestJoin(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	used := a.token(time.Hour)
	b := w.server()
	if err := b.joinWith(used, "s2"); err != nil {
		t.Fatal(err)
	}
	b.up()
	b.works()

	other := newWorld(t).first()
	foreign := other.token(time.Hour)
	expired := a.token(time.Nanosecond)
	damaged := a.token(time.Hour)
	damaged = damaged[:len(damaged)-3]
	stranger := newToken(sha256Of(t, a)).String()
	c := w.server()
	for _, tt := range []struct{ name, token, server, want string }{
		{"no token", "hello", "s3", "not a token"},
		{"damaged", damaged, "s3", "damaged"},
		{"used", used, "s3", "used already"},
		{"expired", expired, "s3", "expired"},
		{"of another cluster", foreign, "s3", "another cluster"},
		{"made up", stranger, "s3", "not one of this cluster"},
		{"a name twice", a.token(time.Hour), "s2", "exists"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := c.joinWith(tt.token, tt.server)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if left, _ := os.ReadDir(c.options.Dir); len(left) > 0 {
				t.Errorf("left in the directory: %v", left)
			}
		})
	}
	if list, err := a.member.Store().Servers.List(t.Context()); err != nil || len(list) != 2 {
		t.Errorf("%d servers, %v", len(list), err)
	}
	// And none of that stands in its way.
	if err := c.joinWith(a.token(time.Hour), "s3"); err != nil {
		t.Fatal(err)
	}
	if err := c.joinWith(a.token(time.Hour), "s4"); !errors.Is(err, ErrConfigured) {
		t.Errorf("a second join: %v", err)
	}
}

func sha256Of(t *testing.T, s *testServer) [32]byte {
	t.Helper()
	return fingerprintOf(s.member.creds.ca)
}

func TestDirectories(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	a.down()
	file := filepath.Join(a.options.Dir, "server.json")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		make func() error
		want string
	}{
		{"of a newer version", func() error {
			return os.WriteFile(file, []byte(strings.Replace(string(good), `"schema": 1`, `"schema": 99`, 1)), 0o600)
		}, "its layout is 99"},
		{"damaged", func() error { return os.WriteFile(file, good[:len(good)/2], 0o600) }, "is damaged"},
		{"without its identity", func() error { return os.Remove(file) }, "no server.json"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.make(); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(a.options); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	moved := a.options
	moved.Address = w.prefix + "200"
	if m, err := Open(moved); err != nil {
		t.Errorf("another address: %v", err)
	} else if address, _ := m.Address(); address != moved.Address {
		t.Errorf("it is at %s", address)
	}
	moved.Ports.Peer = 9999
	if _, err := Open(moved); err == nil || !strings.Contains(err.Error(), "--peer-port 7442") {
		t.Errorf("another port: %v", err)
	}
	// A catalog of a newer version is left alone.
	a.open()
	a.up()
	key := "/argon/schema"
	res, err := a.member.Client().Get(t.Context(), key)
	if err != nil || len(res.Kvs) != 1 {
		t.Fatalf("%d keys %s, %v", len(res.Kvs), key, err)
	}
	if _, err := a.member.Client().Put(t.Context(), key, "99"); err != nil {
		t.Fatal(err)
	}
	a.down()
	a.open()
	if err := a.member.Start(t.Context()); !errors.Is(err, catalog.ErrSchema) {
		t.Errorf("a newer catalog: %v", err)
	}
}

// Voters grow with the servers, a lost one is replaced, and the cluster works
// on through that.
func TestVotersFollowServers(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	w.votes(a, a)
	b := w.join()
	w.votes(a, a)
	c := w.join()
	w.votes(a, a, b, c)
	d := w.join()
	b.works()
	b.down()
	a.works()
	w.votes(a, a, c, d)

	// It comes back, and finds that it votes no more.
	b.open()
	b.up()
	b.works()
	w.votes(b, a, c, d)
	w.until("the old voter's data is gone", func() error {
		if id, _ := b.member.ownEtcd(); id != 0 || exists(b.member.dir.etcd()) {
			return errNotYet
		}
		return nil
	})
	e := w.join()
	w.votes(e, a, b, c, d, e)
	// The first server is no special one.
	a.down()
	for _, s := range []*testServer{b, c, d, e} {
		s.works()
	}
}

// All voters stop, and start again in another order.
func TestMajorityIsLostAndReturns(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.first(), w.join(), w.join()
	w.votes(a, a, b, c)
	for range 2 {
		a.down()
		c.down()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if _, err := b.member.Store().Servers.Get(ctx, b.member.ID()); err == nil {
			t.Error("one voter of three answers alone")
		}
		cancel()
		c.open()
		c.up()
		b.works()
		a.open()
		a.up()
		w.votes(a, a, b, c)
		a, b, c = b, c, a
	}
}

// A voter that waits for the others in vain can be stopped.
func TestStopWithoutAMajority(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.first(), w.join(), w.join()
	w.votes(a, a, b, c)
	for _, s := range []*testServer{a, b, c} {
		s.down()
	}
	a.open()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- a.member.Start(ctx) }()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("one voter of three starts alone")
		}
	case <-time.After(patience):
		t.Fatal("it does not stop")
	}
}

// A server that was killed while its etcd was about to join must not make a
// cluster of its own.
func TestHalfJoinedEtcd(t *testing.T) {
	w := newWorld(t)
	a, b := w.first(), w.join()
	b.down()
	if err := os.MkdirAll(filepath.Join(b.member.dir.etcd(), "member", "snap"), 0o700); err != nil {
		t.Fatal(err)
	}
	b.open()
	b.up()
	b.works()
	if id, _ := b.member.ownEtcd(); id != 0 {
		t.Errorf("it runs etcd member %x", id)
	}
	c := w.join()
	w.votes(a, a, b, c)
}

// A voter's etcd ends, and can't be started again at once. It comes back with
// what it had: one that forgot its votes could give them twice.
func TestVoterKeepsItsData(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.first(), w.join(), w.join()
	w.votes(a, a, b, c)
	b.cancel()
	b.loops.Wait()
	b.cancel = nil
	mark := filepath.Join(b.member.dir.etcd(), "member", "mark")
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	parts, err := b.member.running()
	if err != nil {
		t.Fatal(err)
	}
	b.member.stopEtcd()
	busy, err := net.Listen("tcp", net.JoinHostPort(b.options.Address, "7442"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := b.member.followRecord(t.Context(), parts, b.view.State()); err == nil {
			t.Error("it starts though its port is in use")
		}
	}
	_ = busy.Close()
	if err := b.member.followRecord(t.Context(), parts, b.view.State()); err != nil {
		t.Fatal(err)
	}
	if !exists(mark) {
		t.Error("it has lost its data")
	}
	w.votes(a, a, b, c)
}

// The only voter is removed while it runs: it goes on until another votes in its
// place.
func TestOnlyVoterIsRemoved(t *testing.T) {
	w := newWorld(t)
	a, b := w.first(), w.join()
	id, _ := a.member.ownEtcd()
	rec, err := a.member.Server(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.member.Store().Servers.Delete(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := a.view.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.member.RunVoters(ctx, a.view); !errors.Is(err, ErrRemoved) {
		t.Errorf("got %v", err)
	}
	a.down()
	w.votes(b, b)
	list, err := b.member.Client().MemberList(ctx)
	if err != nil || len(list.Members) != 1 || list.Members[0].ID == id {
		t.Errorf("members %v, %v", list, err)
	}
}

func TestRemovedServer(t *testing.T) {
	w := newWorld(t)
	a, b := w.first(), w.join()
	rec, err := b.member.Server(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.member.Store().Servers.Delete(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	// It finds out while it runs, and after.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := b.member.RunVoters(ctx, b.view); !errors.Is(err, ErrRemoved) {
		t.Errorf("got %v", err)
	}
	b.down()
	b.open()
	if err := b.member.Start(t.Context()); !errors.Is(err, ErrRemoved) {
		t.Errorf("got %v", err)
	}
}

// handshake connects and says what came of it.
func handshake(t *testing.T, server, client *tls.Config) error {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if conn.(*tls.Conn).Handshake() == nil {
			_, _ = conn.Write([]byte("x"))
		}
	}()
	defer func() { <-served }()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// In TLS 1.3 a refused client certificate shows at the first read.
	_, err = io.ReadFull(tls.Client(conn, client), make([]byte, 1))
	return err
}

func TestTLS(t *testing.T) {
	w := newWorld(t)
	a, b := w.first(), w.join()
	x := newWorld(t).first()
	clients := func(s *testServer) *tls.Config { return s.member.ServerTLS(tls.RequireAndVerifyClientCert) }
	nobody := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	old := b.member.ClientTLS(a.member.ID())
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for _, tt := range []struct {
		name           string
		server, client *tls.Config
		good           bool
	}{
		{"servers of one cluster", clients(a), b.member.ClientTLS(a.member.ID()), true},
		{"another server at the address", clients(a), b.member.ClientTLS(b.member.ID()), false},
		{"another cluster's server answers", clients(x), b.member.ClientTLS(x.member.ID()), false},
		{"another cluster's server calls", clients(a), x.member.ClientTLS(""), false},
		{"somebody without a certificate", clients(a), nobody, false},
		{"an old version of TLS", clients(a), old, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := handshake(t, tt.server, tt.client); (err == nil) != tt.good {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestClientCertificate(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	key, request, err := newRequest()
	if err != nil {
		t.Fatal(err)
	}
	certPEM, err := a.member.IssueClient(t.Context(), "alice", request, time.Hour, "server s1")
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	own, err := tls.X509KeyPair([]byte(certPEM), keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.member.creds.ca)
	var seen Identity
	server := a.member.ServerTLS(tls.RequireAndVerifyClientCert)
	server.VerifyConnection = func(state tls.ConnectionState) (err error) {
		seen, err = PeerIdentity(state)
		return err
	}
	if err := handshake(t, server, &tls.Config{Certificates: []tls.Certificate{own}, RootCAs: pool, ServerName: a.options.Address, MinVersion: tls.VersionTLS13}); err != nil {
		t.Fatal(err)
	}
	if seen.Kind != KindClient || seen.ID != "alice" {
		t.Errorf("seen as %+v", seen)
	}
	// An administrator is no server: not to etcd, either.
	creds := *a.member.creds
	creds.own = own
	cli, err := newEtcdClient(&creds, []string{urlString(a.options.Address, 7443)})
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := cli.Get(ctx, "/argon/schema"); err == nil {
		t.Error("an administrator's certificate reads the catalog's keys")
	}
}

// What an init or join that failed late has written goes again.
func TestClearedDirectory(t *testing.T) {
	d := directory(t.TempDir())
	if err := errors.Join(d.begin(), d.saveIdentity(&identity{Schema: identitySchema, ServerID: "S"}), d.clear()); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(string(d)); err != nil || len(left) > 0 {
		t.Errorf("left in the directory: %v, %v", left, err)
	}
}

// Exactly one server leads, and another one does when that one is gone.
func TestLead(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.first(), w.join(), w.join()
	w.votes(a, a, b, c)
	if id := leader(w, b); id != a.member.ID() {
		t.Errorf("%s leads", id)
	}
	a.down()
	w.until("another leads", func() error {
		if id := b.member.LeaderID(t.Context()); id == "" || id == a.member.ID() {
			return errNotYet
		}
		return nil
	})
	if x, y := leader(w, b), leader(w, c); x != y {
		t.Errorf("%s leads, and %s", x, y)
	}
}

func leader(w *world, s *testServer) (id string) {
	w.t.Helper()
	w.until("somebody leads", func() error {
		if id = s.member.LeaderID(w.t.Context()); id == "" {
			return errNotYet
		}
		return nil
	})
	return id
}

// The deadline never passes what others grant, and a lost lease is replaced.
func TestLease(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	renewed := func() int {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.leases)
	}
	w.until("three renewals", func() error {
		if renewed() < 3 {
			return errNotYet
		}
		return nil
	})
	a.mu.Lock()
	for i, until := range a.leases {
		if latest := boottime.Now() + 3*time.Second; until > latest {
			t.Errorf("renewal %d: until %v, now is %v", i, until, boottime.Now())
		}
		if i > 0 && until < a.leases[i-1] {
			t.Errorf("renewal %d moves the deadline back", i)
		}
	}
	a.mu.Unlock()

	id, _, _ := a.member.lease.get()
	if _, err := a.member.Client().Revoke(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	w.until("a new lease", func() error {
		now, _, _ := a.member.lease.get()
		list, err := a.member.Client().Leases(t.Context())
		if err != nil || now == id || now == 0 || len(list.Leases) != 1 {
			return errNotYet
		}
		return nil
	})
}

// A restart is announced: the lease lasts over it, and the guard is told of a
// shorter one before that takes its place. What the wall clock does meanwhile
// changes nothing.
func TestHoldLease(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	ttl := func() uint32 {
		if err := a.view.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		return a.view.State().Leases[a.member.ID()].GetTtlSeconds()
	}
	w.until("the usual lease", func() error {
		if ttl() != 3 {
			return errNotYet
		}
		return nil
	})
	a.wrong.Store(int64(-24 * time.Hour)) // somebody sets the clock
	var until time.Duration
	before := boottime.Now()
	if err := a.member.HoldLease(t.Context(), 15*time.Second, func(u time.Duration) { until = u }); err != nil {
		t.Fatal(err)
	}
	if early, late := before+14*time.Second, boottime.Now()+15*time.Second; until < early || until > late {
		t.Errorf("held until %v, want %v to %v", until, early, late)
	}
	if got := ttl(); got != 15 {
		t.Errorf("the others know of a lease of %d s", got)
	}
	// The next daemon.
	a.wrong.Store(int64(24 * time.Hour))
	ctx, cancel := context.WithCancel(t.Context())
	limited := errors.New("not limited")
	err := a.member.KeepLease(ctx, func(u time.Duration) error {
		limited = nil
		if latest := boottime.Now() + 3*time.Second; u > latest {
			limited = fmt.Errorf("limited to %v, want at most %v", u, latest)
		}
		if got := ttl(); got != 15 {
			limited = fmt.Errorf("the others know of a lease of %d s before the guard does", got)
		}
		return nil
	}, func(time.Duration) { cancel() })
	if err = errors.Join(err, limited); err != nil {
		t.Error(err)
	}
	if got := ttl(); got != 3 {
		t.Errorf("the others know of a lease of %d s at the end", got)
	}
}

// Not from when the answer came.
func TestDeadlineCountsFromSending(t *testing.T) {
	k := &leaseKeeper{member: &Member{}, times: timesOf(&argonv1.Settings{LeaseSeconds: 3})}
	var until time.Duration
	k.onRenewed = func(u time.Duration) { until = u }
	k.held(1, 10*time.Second)
	if want := 10*time.Second + 3*time.Second - 300*time.Millisecond; until != want {
		t.Errorf("until %v, want %v", until, want)
	}
}

// What an operator says is kept, what he leaves open has a default.
func TestSettings(t *testing.T) {
	said := &argonv1.Settings{LeaseSeconds: 5, ReplicaGraceSeconds: 6, VoterGraceSeconds: 7, ScrubIntervalHours: 8, ScrubOff: true, CpuOvercommit: 9}
	if got := withDefaults(said); !proto.Equal(got, said) {
		t.Errorf("%v became %v", said, got)
	}
	if got, want := withDefaults(nil), (&argonv1.Settings{LeaseSeconds: 3, ReplicaGraceSeconds: 600, VoterGraceSeconds: 60}); !proto.Equal(got, want) {
		t.Errorf("nothing became %v", got)
	}
}
