package daemon

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/cluster"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/rpc"
)

// Options are what a server is started with.
type Options struct {
	// Dir keeps what survives a reboot, RunDir the sockets.
	Dir, RunDir string
	// Address is the one that other servers reach this one at; empty: what it was
	// last, or what is found when the server becomes part of a cluster.
	Address string
	// The TCP ports; 0: 7440, 7441, 7442, 7443.
	APIPort, DataPort, PeerPort, EtcdPort int

	Version string
	// Monitor runs guests.
	Monitor hypervisor.Monitor
	// Guard ends the guests when the deadline passes.
	Guard Guard
	// StopTimeout is how long an orderly stop may wait for machines that move
	// away or shut down. 0: they are not waited for.
	StopTimeout time.Duration
	// Containment says what ends and limits guests here, Confinement what they
	// run as; for the server's record.
	Containment, Confinement string
	// ClosedNetwork says why guests open no connections of their own; empty: they
	// do.
	ClosedNetwork string
	// confinement is whom guests run as, and keeper keeps sockets; without them,
	// the daemon's user, and nobody.
	confinement confinement
	keeper      keeper
	Log         *slog.Logger
}

// ErrRestart ends a server whose place another one takes at once: its guests run
// on.
var ErrRestart = errors.New("the daemon is restarted")

// Final reports whether a server that ended with err would end so each time it is
// started, until somebody has done what err says.
func Final(err error) bool {
	return errors.Is(err, cluster.ErrRemoved) || errors.Is(err, cluster.ErrSuperseded) || errors.Is(err, cluster.ErrLayout) || errors.Is(err, catalog.ErrSchema)
}

// Guard is the parent process that outlives the daemon.
type Guard interface {
	// SetDeadline says until when, by CLOCK_BOOTTIME, guests may run.
	SetDeadline(ctx context.Context, until time.Duration) error
	// LimitDeadline moves it back if it is later.
	LimitDeadline(ctx context.Context, until time.Duration) error
	// Ready says that the daemon has started: a later end is a crash.
	Ready(ctx context.Context) error
	// Status tells the service manager in one line what the server does, or waits
	// for. serving: it has started.
	Status(ctx context.Context, serving bool, text string) error
}

// The ports of a server unless told otherwise.
const (
	DefaultAPIPort  = 7440
	DefaultDataPort = 7441
	DefaultPeerPort = 7442
	DefaultEtcdPort = 7443
)

// DefaultRunDir is where a server with this directory has its sockets.
func DefaultRunDir(dir string) string {
	if filepath.Clean(dir) == "/var/lib/argon" {
		return "/run/argon"
	}
	return filepath.Join(dir, "run")
}

func (o *Options) runDir() string { return cmp.Or(o.RunDir, DefaultRunDir(o.Dir)) }

// Run runs a server until ctx ends, or until it cannot go on. Guests go on
// running after it. What it needs and may come by itself it waits for (start.go).
// Errors at the start say what to do: a port in use, a directory of another cluster.
func Run(ctx context.Context, o Options) error {
	o.RunDir = o.runDir()
	g, err := stand(ctx, &o)
	defer func() { _ = g.lock.Close() }() // nil refuses it
	if ctx.Err() != nil {
		return nil // it was stopped while it waited
	}
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	s := &server{
		started: g.started, restart: func() { end(ErrRestart) },
		Options: o, paths: g.paths, member: g.member, resources: g.resources, disk: g.disk, ballast: g.ballast,
		listening: make(chan struct{}), configured: make(chan struct{}), ready: make(chan struct{}), stopped: make(chan struct{}),
	}
	if s.member.Configured() {
		close(s.configured)
	}
	return s.run(ctx)
}

// server is one running server.
type server struct {
	Options
	paths  paths
	member *cluster.Member
	resources
	disk    *disk
	ballast *ballast
	// listening is closed once the ports are there, configured once this server
	// is part of a cluster, ready once its parts are there, stopped once they are
	// not to come.
	listening, configured, ready, stopped chan struct{}
	ports                                 *listeners // see listening
	// started is the address that the server was started with; empty if it was
	// left open. restart ends this daemon, so that another one follows.
	started string
	restart func()

	// configuring lets one Init or Join at a time through.
	configuring sync.Mutex
	mu          sync.Mutex
	parts       *rpc.Parts
}

// run listens on every port first, so that one in use is told at the start;
// where the address is not known yet, Init and Join do.
func (s *server) run(ctx context.Context) error {
	admin, err := listenUnix(ctx, s.paths.adminSocket())
	if err != nil {
		return err
	}
	defer admin.Close()
	if s.Address != "" {
		ports, err := s.listenAt(ctx, s.Address)
		if err != nil {
			return err
		}
		s.use(ports)
	}
	defer func() {
		if isClosed(s.listening) {
			s.ports.close()
		}
	}()

	handler := rpc.New(s, s.Log).Handler()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.ballast.run(ctx) })
	g.Go(func() error { return serve(ctx, newHTTPServer(rpc.ForSocket(handler), s.Log), admin) })
	g.Go(func() error {
		select {
		case <-s.listening:
			s.Log.Info("serving", "address", s.ports.api.Addr().String())
			return serve(ctx, newHTTPServer(rpc.ForTLS(handler, s.identify), s.Log), tls.NewListener(s.ports.api, s.publicTLS()))
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error {
		select {
		case <-s.configured:
			defer close(s.stopped)
			return s.runMember(ctx, s.ports.data)
		case <-ctx.Done():
			return nil
		}
	})
	s.Log.Info("serving", "socket", s.paths.adminSocket(), "dir", s.Dir)
	g.Go(func() error { return s.tellCondition(ctx) })
	if !isClosed(s.configured) {
		if err := s.Guard.Ready(ctx); err != nil {
			s.Log.Error("the guard was not told of the start", "err", err)
		}
	}
	return g.Wait()
}

// publicTLS turns callers away while there is no certificate to show them.
func (s *server) publicTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2", "http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			select {
			case <-s.configured:
				return s.member.ServerTLS(tls.VerifyClientCertIfGiven, "h2", "http/1.1"), nil
			default:
				return nil, errors.New("this server is not part of a cluster yet")
			}
		},
	}
}

// identify says who a TLS connection is from.
func (s *server) identify(state tls.ConnectionState) (rpc.Caller, error) {
	id, err := cluster.PeerIdentity(state)
	if err != nil {
		return rpc.Caller{}, err
	}
	c := rpc.Caller{Kind: rpc.Client, ID: id.ID, Serial: id.Serial, Expires: id.Expires}
	if id.Kind == cluster.KindServer {
		c.Kind = rpc.Server
	}
	return c, nil
}

// Version implements rpc.Local.
func (s *server) Version() string { return s.Options.Version }

// LogDir implements rpc.Local.
func (s *server) LogDir() string { return LogDir(s.paths.dir) }

// Parts implements rpc.Local.
func (s *server) Parts() *rpc.Parts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.parts
}

const waitsForMajority = "waits for a majority of the cluster's voters: start the others"

// Condition implements rpc.Local.
func (s *server) Condition() (state, detail string) {
	switch {
	case !isClosed(s.configured):
		return "unconfigured", ""
	case !isClosed(s.ready):
		return "starting", "this server " + waitsForMajority
	}
	return "ready", ""
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// begin is configure's change; it needs configuring held. What it listens on is
// there before others are told of it.
func begin[R any](ctx context.Context, s *server, asked, towards string, do func(address string) (*R, error)) (*R, error) {
	if isClosed(s.listening) {
		res, err := do(asked)
		s.noteMember()
		return res, err
	}
	if asked == "" {
		var err error
		if asked, err = cluster.FindAddress(ctx, towards); err != nil {
			return nil, err
		}
	}
	ports, err := s.listenAt(ctx, asked)
	if err != nil {
		return nil, err
	}
	res, err := do(asked)
	if !s.member.Configured() {
		ports.close()
		return nil, err
	}
	s.Address = asked
	s.use(ports)
	s.noteMember()
	return res, err
}

// noteMember lets the rest start. A join may fail after this server was admitted:
// it is a member then, and goes on trying to be one that works.
func (s *server) noteMember() {
	if s.member.Configured() && !isClosed(s.configured) {
		close(s.configured)
	}
}

// Init implements rpc.Local.
func (s *server) Init(ctx context.Context, req *argonv1.InitRequest) (*argonv1.InitResponse, error) {
	return configure(ctx, s, req.GetAddress(), "", func(address string) (*argonv1.InitResponse, error) {
		req.Address = address
		return s.member.Init(ctx, req)
	})
}

// Join implements rpc.Local.
func (s *server) Join(ctx context.Context, req *argonv1.JoinRequest) (*argonv1.JoinResponse, error) {
	return configure(ctx, s, req.GetOwnAddress(), req.GetAddress(), func(address string) (*argonv1.JoinResponse, error) {
		req.OwnAddress = address
		return s.member.Join(ctx, req)
	})
}

// configure makes this server part of a cluster, at the address that was asked
// for or that is found on the way towards another server, and waits until it
// serves as one.
func configure[R any](ctx context.Context, s *server, asked, towards string, do func(address string) (*R, error)) (*R, error) {
	s.configuring.Lock()
	defer s.configuring.Unlock()
	res, err := begin(ctx, s, asked, towards, do)
	if err != nil {
		return nil, err
	}
	select {
	case <-s.ready:
		return res, nil
	case <-s.stopped:
		return nil, errors.New("this server is part of the cluster now, but has stopped: see its log, then start it again")
	case <-ctx.Done():
		return nil, fmt.Errorf("this server is part of the cluster now, and still starting: %w", ctx.Err())
	}
}
