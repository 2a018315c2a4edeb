package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

const (
	// etcdOps bounds a transaction: 1,000 records, each of which has a guard for
	// itself and one for its name. An image may have that many clones.
	etcdOps = 2048
	// etcdHistory is how long old revisions are kept for watches that lag.
	etcdHistory = "10m"
	// etcdSnapshotEntries and etcdCatchUpEntries bound the part of the log
	// that etcd keeps in memory.
	etcdSnapshotEntries = 5000
	etcdCatchUpEntries  = 1000
)

// etcdConfig is one etcd member.
type etcdConfig struct {
	dir       directory
	clusterID string
	serverID  string
	address   string
	ports     Ports
	// peers are all members by name, with this one: "name=url,name=url". They
	// are used only while etcd has no data yet.
	peers string
	// joining: the members run already.
	joining             bool
	heartbeat, election time.Duration
	// quota is the catalog's, in bytes.
	quota int64
}

// etcdServer is the etcd in this process.
type etcdServer struct {
	etcd *embed.Etcd
	// stopping ends the streams of clients.
	stopping context.CancelFunc
	// failed is closed when etcd ended by itself: it was removed from its
	// cluster, or cannot go on.
	failed chan struct{}
	done   chan struct{}
}

// startEtcd starts etcd with what its directory holds, or from nothing. It
// does not wait for a majority.
func startEtcd(ctx context.Context, c etcdConfig, log *slog.Logger) (*etcdServer, error) {
	cfg, err := c.embed(ctx, log)
	if err != nil {
		return nil, err
	}
	streams, stopping := context.WithCancel(context.WithoutCancel(ctx))
	cfg.GRPCAdditionalServerOptions = []grpc.ServerOption{grpc.ChainStreamInterceptor(endStreams(streams))}
	e, err := embed.StartEtcd(cfg)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		stopping()
		return nil, fmt.Errorf("port %d or %d of %s is in use: stop what uses it, or choose others with --peer-port and --etcd-port", c.ports.Peer, c.ports.Etcd, c.address)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		stopping()
		return nil, fmt.Errorf("%s is not an address of this host: choose one with --address", c.address)
	case err != nil:
		stopping()
		return nil, fmt.Errorf("start etcd in %s: %w", c.dir.etcd(), err)
	}
	s := &etcdServer{etcd: e, stopping: stopping, failed: make(chan struct{}), done: make(chan struct{})}
	go s.watch(log)
	return s, nil
}

// watch notices when etcd ends by itself.
func (s *etcdServer) watch(log *slog.Logger) {
	defer close(s.done)
	for {
		select {
		case <-s.etcd.Server.StopNotify():
			close(s.failed)
			return
		case err, ok := <-s.etcd.Err():
			if !ok {
				close(s.failed)
				return
			}
			log.Warn("etcd has trouble", "err", err)
		}
	}
}

// id is the member's id in etcd.
func (s *etcdServer) id() uint64 { return uint64(s.etcd.Server.MemberID()) }

// close stops etcd; its leadership goes to another member if there is one.
func (s *etcdServer) close() {
	s.stopping()
	select {
	case <-s.etcd.Server.ReadyNotify():
	default:
		// Close waits until clients are served, which without a majority is
		// never; and only then it stops the server.
		s.etcd.Server.HardStop()
	}
	s.etcd.Close()
	<-s.done
}

// endStreams lets etcd's clients go when it stops: their watches would keep
// it for seconds.
func endStreams(until context.Context) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, cancel := context.WithCancel(ss.Context())
		defer cancel()
		defer context.AfterFunc(until, cancel)()
		return handler(srv, endingStream{ss, ctx})
	}
}

type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }

// embed is the configuration: mutual TLS 1.3 for servers of the cluster only,
// and as little memory and noise as possible.
func (c etcdConfig) embed(ctx context.Context, log *slog.Logger) (*embed.Config, error) {
	listen, err := listenIP(ctx, c.address)
	if err != nil {
		return nil, err
	}
	cfg := embed.NewConfig()
	cfg.Name = c.serverID
	cfg.Dir = c.dir.etcd()
	cfg.ListenPeerUrls = []url.URL{httpsURL(listen, c.ports.Peer)}
	cfg.ListenClientUrls = []url.URL{httpsURL(listen, c.ports.Etcd)}
	cfg.AdvertisePeerUrls = []url.URL{httpsURL(c.address, c.ports.Peer)}
	cfg.AdvertiseClientUrls = []url.URL{httpsURL(c.address, c.ports.Etcd)}
	cfg.InitialCluster = c.peers
	cfg.InitialClusterToken = c.clusterID
	if c.joining {
		cfg.ClusterState = embed.ClusterStateFlagExisting
	}
	tls := transport.TLSInfo{
		CertFile:       c.dir.certFile(),
		KeyFile:        c.dir.keyFile(),
		TrustedCAFile:  c.dir.caFile(),
		ClientCertAuth: true,
		// Not a remote administrator, though the same authority signed.
		AllowedHostnames: []string{serverHostname},
		// A server that has another address than its certificate says is still
		// one: raft's messages say which member they are for.
		ServerName: serverHostname,
		// Which of its addresses a server comes from says nothing.
		SkipClientSANVerify: true,
	}
	cfg.PeerTLSInfo, cfg.ClientTLSInfo = tls, tls
	cfg.TlsMinVersion = "TLS1.3"
	cfg.TickMs, cfg.ElectionMs = uint(c.heartbeat.Milliseconds()), uint(c.election.Milliseconds())
	cfg.QuotaBackendBytes = hardQuota(c.quota)
	cfg.BootstrapDefragThresholdMegabytes = startGain >> 20
	cfg.MaxTxnOps = etcdOps
	cfg.MaxLearners = maxLearners
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = etcdSnapshotEntries, etcdCatchUpEntries
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, etcdHistory
	cfg.EnableGRPCGateway = false
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(zapToSlog{log.With("part", "etcd")}))
	return cfg, nil
}

// listenIP is the address to listen on: etcd takes no names.
func listenIP(ctx context.Context, address string) (string, error) {
	if net.ParseIP(address) != nil {
		return address, nil
	}
	ips, err := net.DefaultResolver.LookupIP(ctx, "ip", address)
	if err != nil {
		return "", fmt.Errorf("find the address of this server: %w", err)
	}
	return ips[0].String(), nil
}

func httpsURL(host string, port int) url.URL {
	return url.URL{Scheme: "https", Host: net.JoinHostPort(host, strconv.Itoa(port))}
}

func urlString(host string, port int) string {
	u := httpsURL(host, port)
	return u.String()
}

const (
	// pingAfter: gRPC pings a silent connection no earlier.
	pingAfter   = 10 * time.Second
	pingTimeout = 3 * time.Second
)

// newEtcdClient makes a client of etcd that survives the loss of servers.
func newEtcdClient(creds *credentials, endpoints []string) (*clientv3.Client, error) {
	config := creds.client("", nil)
	silence := &silenceWatch{config: config, silent: silentFor, answers: answersWithin}
	cli, err := clientv3.New(clientv3.Config{
		Endpoints:            endpoints,
		TLS:                  config,
		DialTimeout:          pingTimeout,
		DialKeepAliveTime:    pingAfter,
		DialKeepAliveTimeout: pingTimeout,
		Logger:               zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			// A server that returns is used again soon.
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: pingTimeout,
		}), grpc.WithChainUnaryInterceptor(withLeader), grpc.WithContextDialer(silence.dial)},
	})
	if err != nil {
		return nil, fmt.Errorf("make a client of etcd: %w", err)
	}
	return cli, nil
}
