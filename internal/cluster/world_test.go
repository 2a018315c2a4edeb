package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestMain(m *testing.M) {
	// etcd asks its peers over HTTP with clients that it never closes, so that
	// both ends of an idle connection may outlive it.
	var options []goleak.Option
	for _, f := range []string{
		"net/http.(*persistConn).readLoop", "net/http.(*persistConn).writeLoop",
		"net/http.(*conn).serve", "net/http.(*connReader).backgroundRead",
	} {
		options = append(options, goleak.IgnoreAnyFunction(f))
	}
	goleak.VerifyTestMain(m, options...)
}

const patience = time.Minute // a hang, not a measure

// world is several servers in one process, each with real etcd and sockets.
type world struct {
	t      *testing.T
	prefix string // of the servers' addresses
	all    []*testServer
	quota  int64 // of the catalog; 0: the usual one
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, prefix: fmt.Sprintf("127.%d.%d.", 64+rand.IntN(128), rand.IntN(256))}
	// Directories are removed by a cleanup that the first of them registers: if
	// that came after ours it would run before it, while etcd still runs there,
	// which ends the whole process when etcd finds out.
	t.TempDir()
	t.Cleanup(func() {
		// All at once: the last ones would wait for a majority.
		var wg sync.WaitGroup
		for _, s := range w.all {
			wg.Go(s.down)
		}
		wg.Wait()
	})
	return w
}

// testServer is one server.
type testServer struct {
	w       *world
	options Options
	member  *Member

	ctx    context.Context
	cancel context.CancelFunc
	loops  sync.WaitGroup
	view   *catalog.View

	// wrong is how much the wall clock is, in nanoseconds.
	wrong atomic.Int64

	mu     sync.Mutex
	leases []time.Duration // until when, at each renewal
}

// server makes an unconfigured one.
func (w *world) server() *testServer {
	w.t.Helper()
	s := &testServer{w: w, options: Options{
		Dir: w.t.TempDir(), Address: fmt.Sprintf("%s%d", w.prefix, len(w.all)+1),
		Ports:    Ports{API: 7440, Data: 7441, Peer: 7442, Etcd: 7443},
		Capacity: &argonv1.Resources{Cpus: 1, MemoryBytes: 1 << 30, DiskBytes: 1 << 30},
		// Up to five etcds share a processor here, maybe with other tests: none may
		// lose its leader for being slow.
		Heartbeat: 150 * time.Millisecond, Election: 1500 * time.Millisecond,
		CatalogQuota: w.quota,
		Log:          slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	}}
	s.options.Now = func() time.Time { return time.Now().Add(time.Duration(s.wrong.Load())) }
	w.all = append(w.all, s)
	s.open()
	return s
}

func (s *testServer) open() {
	s.w.t.Helper()
	m, err := Open(s.options)
	if err != nil {
		s.w.t.Fatal(err)
	}
	s.member = m
}

// up runs what a daemon runs, from Start on.
func (s *testServer) up() {
	s.w.t.Helper()
	s.serve()
	s.join()
}

// serve runs what others reach before the member has found its cluster.
func (s *testServer) serve() {
	s.w.t.Helper()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	listener, err := net.Listen("tcp", net.JoinHostPort(s.options.Address, "7440"))
	if err != nil {
		s.w.t.Fatal(err)
	}
	api := s.api()
	s.loops.Go(func() {
		_ = api.Serve(tls.NewListener(listener, s.member.ServerTLS(tls.VerifyClientCertIfGiven, "h2")))
	})
	s.loops.Go(func() { <-s.ctx.Done(); _ = api.Close() })
}

// join runs the rest.
func (s *testServer) join() {
	s.w.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	if err := s.member.Start(ctx); err != nil {
		s.w.t.Error(err)
		return
	}
	s.view = catalog.NewView(s.member.Store(), s.options.Log)
	ctx = s.ctx
	for _, loop := range []func() error{
		func() error { return s.view.Run(ctx) },
		func() error { return s.member.KeepLease(ctx, nil, s.renewed) },
		func() error { return s.member.RunVoters(ctx, s.view) },
		func() error { return s.member.RunUpkeep(ctx, s.view) },
		func() error {
			return s.member.Lead(ctx, func(ctx context.Context) error {
				var all sync.WaitGroup
				defer all.Wait()
				all.Go(func() { _ = s.member.LeadIntroductions(ctx, s.view) })
				return s.member.LeadVoters(ctx, s.view)
			})
		},
	} {
		s.loops.Go(func() { _ = loop() })
	}
}

func (s *testServer) renewed(until time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leases = append(s.leases, until)
}

// admission is the part of the API that joining needs.
type admission struct {
	argonv1connect.UnimplementedClusterServiceHandler
	member *Member
}

func (a admission) Admit(ctx context.Context, req *connect.Request[argonv1.AdmitRequest]) (*connect.Response[argonv1.AdmitResponse], error) {
	res, err := a.member.Admit(ctx, req.Msg)
	if err != nil {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	return connect.NewResponse(res), nil
}

// introduction is the part of the API that servers meet by.
type introduction struct {
	argonv1connect.UnimplementedServerServiceHandler
	member *Member
}

type peerKey struct{}

func (i introduction) Introduce(ctx context.Context, req *connect.Request[argonv1.IntroduceRequest]) (*connect.Response[argonv1.IntroduceResponse], error) {
	who, err := PeerIdentity(*ctx.Value(peerKey{}).(*tls.ConnectionState))
	if err != nil {
		return nil, err
	}
	res, err := i.member.Introduce(who, req.Msg)
	if err != nil {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	return connect.NewResponse(res), nil
}

func (s *testServer) api() *http.Server {
	mux := http.NewServeMux()
	mux.Handle(argonv1connect.NewClusterServiceHandler(admission{member: s.member}))
	mux.Handle(argonv1connect.NewServerServiceHandler(introduction{member: s.member}))
	var protocols http.Protocols
	protocols.SetHTTP2(true)
	known := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), peerKey{}, r.TLS)))
	})
	return &http.Server{Handler: known, Protocols: &protocols, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
}

// down stops it, as the end of the process would.
func (s *testServer) down() {
	if s.cancel != nil {
		s.cancel()
		s.loops.Wait()
		s.cancel = nil
	}
	_ = s.member.Stop()
}

// first makes the world's cluster.
func (w *world) first() *testServer {
	w.t.Helper()
	s := w.server()
	_, err := s.member.Init(w.t.Context(), &argonv1.InitRequest{
		ServerName: "s1", ClusterName: "test", Settings: &argonv1.Settings{VoterGraceSeconds: 1},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	s.up()
	return s
}

// join adds a server.
func (w *world) join() *testServer {
	w.t.Helper()
	s := w.server()
	if err := s.joinWith(w.all[0].token(time.Hour), fmt.Sprintf("s%d", len(w.all))); err != nil {
		w.t.Fatal(err)
	}
	s.up()
	return s
}

func (s *testServer) token(ttl time.Duration) string {
	s.w.t.Helper()
	text, _, err := s.member.CreateToken(s.w.t.Context(), 1, ttl)
	if err != nil {
		s.w.t.Fatal(err)
	}
	return text
}

func (s *testServer) joinWith(token, name string) error {
	_, err := s.member.Join(s.w.t.Context(), &argonv1.JoinRequest{Address: s.w.all[0].options.Address, Token: token, ServerName: name})
	return err
}

func (w *world) until(what string, f func() error) {
	w.t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	w.t.Fatalf("%s: %v", what, err)
}

// votes waits until these servers vote, and no others, as the records say and
// as they run.
func (w *world) votes(asked *testServer, servers ...*testServer) {
	w.t.Helper()
	w.until("the voters", func() error {
		ctx := w.t.Context() // the store bounds each request
		list, err := asked.member.Store().Servers.List(ctx)
		if err != nil {
			return err
		}
		var voters []string
		for _, s := range list {
			if s.GetVoterRole() == argonv1.VoterRole_VOTER_ROLE_VOTER {
				voters = append(voters, s.GetMeta().GetName())
			}
		}
		if len(voters) != len(servers) {
			return fmt.Errorf("%v vote", voters)
		}
		for _, s := range servers {
			rec, err := s.member.Server(ctx)
			if err != nil {
				return err
			}
			if id, failed := s.member.ownEtcd(); rec.GetMemberId() != id || id == 0 || failed {
				return fmt.Errorf("%s is recorded as member %x and runs member %x", s.member.Name(), rec.GetMemberId(), id)
			}
		}
		return nil
	})
}

// works checks that a server can write to the catalog.
func (s *testServer) works() {
	s.w.t.Helper()
	s.w.until(s.member.Name()+" can write", func() error {
		_, err := s.member.Store().Servers.Update(s.w.t.Context(), s.member.ID(), func(r *argonv1.Server) error {
			r.Version += "."
			return nil
		})
		return err
	})
}

var errNotYet = errors.New("not yet")
