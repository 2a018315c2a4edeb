package cluster

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/boottime"
	"github.com/argon-cluster/argon/internal/catalog"
)

// Errors that callers decide by.
var (
	// ErrConfigured: the directory belongs to a cluster already.
	ErrConfigured = errors.New("this server is part of a cluster already")
	// ErrUnconfigured: init or join comes first.
	ErrUnconfigured = errors.New("this server is not part of a cluster: run `argon init` or `argon join`")
	// ErrRemoved: the cluster does not know this server any more.
	ErrRemoved = errors.New("this server was removed from its cluster")
	// ErrLayout: another version of argon has to be installed.
	ErrLayout = errors.New("is not for this version of argon")
	// ErrNotRunning: Start comes first, or Stop came.
	ErrNotRunning = errors.New("this server has not started")
)

// Ports are those of a server, on its one address.
type Ports struct {
	API  int `json:"api"`
	Data int `json:"data"`
	Peer int `json:"peer"`
	Etcd int `json:"etcd"`
}

// Options are what a Member is made with.
type Options struct {
	// Dir is the server's directory.
	Dir string
	// Address is what other servers reach this one at: an IP address or a name,
	// without a port. Empty: what it was last, for a member of a cluster; what
	// init or join is told, for one that may become one. A member with another
	// address than before says so to the cluster.
	Address string
	// Ports cannot be changed once the server is part of a cluster; zero then
	// means what it was made with.
	Ports Ports
	// Capacity and Version go into the server's record at init and join.
	Capacity *argonv1.Resources
	Version  string
	Log      *slog.Logger
	// Heartbeat and Election are etcd's times; 0: 100 ms and 500 ms. A lost
	// leader of etcd is replaced in one to two Elections, and leases are
	// prolonged by one; an Election is at least five Heartbeats.
	Heartbeat, Election time.Duration
	// CatalogQuota is how large the catalog may become, in bytes, the same on
	// all servers; 0: 1 GiB.
	CatalogQuota int64
	// NoRoom reports whether the directory's file system is full; nil: it never is.
	NoRoom func() bool
	// Now is the wall clock, for certificates and tokens; nil: the real one.
	Now func() time.Time
	// Boottime is the clock that leases are counted on; nil: CLOCK_BOOTTIME.
	Boottime func() time.Duration
}

// Member is this server as a part of its cluster, or as one that may become
// one. Safe for concurrent use.
type Member struct {
	opts  Options
	dir   directory
	lease leaseState

	// setup is held during init, join, Start and Stop.
	setup sync.Mutex

	mu       sync.Mutex
	identity *identity
	creds    *credentials
	parts    *parts
	// learnedNews is closed when another server is found elsewhere.
	learnedNews chan struct{}

	// etcd is nil where none runs. etcdID is the member whose data the directory
	// has, 0 if that is not known. Their own lock, since stopping takes time.
	etcdMu sync.Mutex
	etcd   *etcdServer
	etcdID uint64
}

// parts are what there is between Start and Stop.
type parts struct {
	id     *identity
	creds  *credentials
	client *clientv3.Client
	store  *catalog.Store
	// cluster is as it was at the start.
	cluster *argonv1.Cluster
}

// Open reads who the server is. It starts nothing. It fails if the directory
// was made by a newer version, is damaged, or was made with other ports.
func Open(opts Options) (*Member, error) {
	if opts.Heartbeat == 0 {
		opts.Heartbeat = 100 * time.Millisecond
	}
	if opts.Election == 0 {
		opts.Election = 500 * time.Millisecond
	}
	if opts.CatalogQuota == 0 {
		opts.CatalogQuota = catalogQuota
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.NoRoom == nil {
		opts.NoRoom = func() bool { return false }
	}
	if opts.Boottime == nil {
		opts.Boottime = boottime.Now
	}
	m := &Member{opts: opts, dir: directory(opts.Dir)}
	if err := errors.Join(m.dir.settleStaged(), m.dir.clearCopying()); err != nil {
		return nil, err
	}
	id, creds, err := m.dir.load()
	if err != nil {
		return nil, err
	}
	if id != nil {
		if err := m.dir.checkSuperseded(id); err != nil {
			return nil, err
		}
		if err := checkPorts(id, opts.Ports); err != nil {
			return nil, err
		}
		id.Address = cmp.Or(opts.Address, id.Address)
	}
	m.identity, m.creds = id, creds
	return m, nil
}

// checkPorts refuses a change of what others know.
func checkPorts(id *identity, ports Ports) error {
	for _, p := range []struct {
		flag      string
		now, made int
	}{
		{"api", ports.API, id.Ports.API},
		{"data", ports.Data, id.Ports.Data},
		{"peer", ports.Peer, id.Ports.Peer},
		{"etcd", ports.Etcd, id.Ports.Etcd},
	} {
		if p.now != 0 && p.now != p.made {
			return fmt.Errorf("this server was made with %s port %d, which cannot be changed to %d: start it with --%s-port %d; for other ports remove it from the cluster and join it anew", p.flag, p.made, p.now, p.flag, p.made)
		}
	}
	return nil
}

// Configured tells whether the server is part of a cluster.
func (m *Member) Configured() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.identity != nil
}

// ID is the server's id; empty while it is unconfigured.
func (m *Member) ID() string { return m.about().ServerID }

// Name is the server's name; empty while it is unconfigured.
func (m *Member) Name() string { return m.about().ServerName }

// Address is the server's address and ports; those of the options while it is
// unconfigured.
func (m *Member) Address() (string, Ports) {
	if !m.Configured() {
		return m.opts.Address, m.opts.Ports
	}
	id := m.about()
	return id.Address, id.Ports
}

// Readdress keeps another address for the next start.
func (m *Member) Readdress(address string) error {
	if !reachable(address) {
		return fmt.Errorf("address %q: others cannot reach this server there", address)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.identity == nil {
		return ErrUnconfigured
	}
	changed := *m.identity
	changed.Address = address
	if err := m.dir.saveIdentity(&changed); err != nil {
		return err
	}
	m.identity = &changed
	return nil
}

func (m *Member) about() identity {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.identity == nil {
		return identity{}
	}
	return *m.identity
}

// Start starts etcd if this server votes, and opens the catalog; it waits for
// a majority until ctx ends. ErrUnconfigured, ErrRemoved, catalog.ErrSchema. It
// does nothing if the member runs, as it does after Init and Join.
func (m *Member) Start(ctx context.Context) error {
	m.setup.Lock()
	defer m.setup.Unlock()
	return m.start(ctx)
}

// start needs setup held.
func (m *Member) start(ctx context.Context) (err error) {
	m.mu.Lock()
	id, creds, running := m.identity, m.creds, m.parts != nil
	m.mu.Unlock()
	if running {
		return nil
	}
	if id == nil {
		return ErrUnconfigured
	}
	// Only now: what listens before has found that the address is this host's.
	if err := m.dir.saveIdentity(id); err != nil {
		return err
	}
	whole, err := m.dir.hasEtcd()
	if err != nil {
		return err
	}
	if whole {
		if err := m.startKnownEtcd(ctx); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				m.stopEtcd()
			}
		}()
	}
	m.mu.Lock()
	endpoints := m.endpointsLocked()
	m.mu.Unlock()
	cli, err := newEtcdClient(creds, endpoints)
	if err != nil {
		return err
	}
	p := &parts{id: id, creds: creds, client: cli}
	if err := m.open(ctx, p); err != nil {
		return errors.Join(err, cli.Close())
	}
	m.mu.Lock()
	m.parts = p
	m.mu.Unlock()
	return nil
}

// startKnownEtcd starts the etcd that this server has the data of, with what is
// known of where the others are.
func (m *Member) startKnownEtcd(ctx context.Context) error {
	id := m.about()
	if err := m.dir.readdressMembers(append(slices.Clone(id.Servers), id.self())); err != nil {
		return err
	}
	return m.startEtcd(ctx, m.etcdConfig(&id))
}

const (
	openAttempt = 5 * time.Second
	openPause   = 100 * time.Millisecond
)

// open opens the catalog as soon as a majority answers, and checks that this
// server belongs to it. Meanwhile it looks for the others, which may have moved.
func (m *Member) open(ctx context.Context, p *parts) error {
	seeking, found := context.WithCancel(ctx)
	var seeker sync.WaitGroup
	seeker.Go(func() { m.seek(seeking) })
	defer seeker.Wait()
	defer found()
	for {
		news := m.whenLearned()
		err := p.tryOpenUntil(ctx, news)
		if isClosed(p.creds.superseded.told) {
			return m.noteSuperseded()
		}
		if err == nil || !catalog.Unavailable(err) && !errors.Is(err, context.DeadlineExceeded) && !isClosed(news) || ctx.Err() != nil {
			return err
		}
		if isClosed(news) {
			// Not sooner: an attempt has made the client ready for it.
			m.mu.Lock()
			p.client.SetEndpoints(m.endpointsLocked()...)
			m.mu.Unlock()
			if err := m.restartLoneEtcd(ctx); err != nil {
				return err
			}
		}
		if err := sleep(ctx, openPause); err != nil {
			return err
		}
	}
}

// restartLoneEtcd starts an etcd that has no leader anew, so that it looks for the
// others where they are now.
func (m *Member) restartLoneEtcd(ctx context.Context) error {
	m.etcdMu.Lock()
	alone := m.etcd != nil && m.etcd.etcd.Server.Leader() == 0
	m.etcdMu.Unlock()
	if !alone {
		return nil
	}
	m.stopEtcd()
	return m.startKnownEtcd(ctx)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// tryOpenUntil is an attempt that ends early when stop is closed.
func (p *parts) tryOpenUntil(ctx context.Context, stop <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, openAttempt)
	defer cancel()
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case <-stop:
			cancel()
		case <-ctx.Done():
		}
	})
	err := p.tryOpen(ctx)
	cancel()
	watching.Wait()
	return err
}

func (p *parts) tryOpen(ctx context.Context) error {
	store, err := catalog.Open(ctx, p.client)
	if err != nil {
		return err
	}
	c, err := store.Cluster(ctx)
	if err != nil {
		return err
	}
	if c.GetId() != p.id.ClusterID {
		return fmt.Errorf("this server belongs to cluster %s, but its etcd holds cluster %s: restore its directory, or choose another with --dir", p.id.ClusterID, c.GetId())
	}
	s, err := store.Servers.Get(ctx, p.id.ServerID)
	if err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return err
	}
	if err := p.belongs(s); err != nil {
		return err
	}
	p.store, p.cluster = store, c
	return nil
}

// belongs is ErrRemoved unless the record, which is nil if there is none, is
// that of this server as it joined.
func (p *parts) belongs(s *argonv1.Server) error {
	if s.GetCertificateSerial() == serialOf(p.creds.own.Leaf) {
		return nil
	}
	return fmt.Errorf("%w %s: empty its directory and run `argon join` to add it again", ErrRemoved, p.id.ClusterName)
}

// Stop closes the catalog and stops etcd. It does not give the lease up:
// guests may outlive the daemon. Whoever uses Store, Client or the loops must
// have ended.
func (m *Member) Stop() error {
	m.setup.Lock()
	defer m.setup.Unlock()
	m.mu.Lock()
	p := m.parts
	m.parts = nil
	m.mu.Unlock()
	var err error
	if p != nil {
		err = p.client.Close()
	}
	m.stopEtcd()
	return err
}

// running is what there is between Start and Stop. ErrNotRunning.
func (m *Member) running() (*parts, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.parts == nil {
		return nil, ErrNotRunning
	}
	return m.parts, nil
}

// Store is the catalog; nil unless the member runs.
func (m *Member) Store() *catalog.Store {
	if p, err := m.running(); err == nil {
		return p.store
	}
	return nil
}

// Client is the client of etcd; nil unless the member runs.
func (m *Member) Client() *clientv3.Client {
	if p, err := m.running(); err == nil {
		return p.client
	}
	return nil
}

// Server reads this server's record.
func (m *Member) Server(ctx context.Context) (*argonv1.Server, error) {
	p, err := m.running()
	if err != nil {
		return nil, err
	}
	return p.store.Servers.Get(ctx, p.id.ServerID)
}

// ServerTLS is for this server's listeners: TLS 1.3, client certificates of
// this cluster only. Call it after the server was configured; nil before.
func (m *Member) ServerTLS(clients tls.ClientAuthType, protocols ...string) *tls.Config {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.creds == nil {
		return nil
	}
	return m.creds.server(clients, protocols)
}

// KeyPin is the SHA-256 of this server's public key, in base64: what tools that
// know no authority can check a server by (RFC 7469, section 2.4). Empty before
// the server was configured.
func (m *Member) KeyPin() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.creds == nil {
		return ""
	}
	sum := sha256.Sum256(m.creds.own.Leaf.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// ClientTLS is for connections to one server of the cluster: it accepts no
// other at that address. nil before the server was configured.
func (m *Member) ClientTLS(serverID string, protocols ...string) *tls.Config {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.creds == nil {
		return nil
	}
	return m.creds.client(serverID, protocols)
}

func (m *Member) etcdConfig(id *identity) etcdConfig {
	return etcdConfig{
		dir: m.dir, clusterID: id.ClusterID, serverID: id.ServerID,
		address: id.Address, ports: id.Ports,
		peers:     id.ServerID + "=" + urlString(id.Address, id.Ports.Peer),
		heartbeat: m.opts.Heartbeat, election: m.opts.Election, quota: m.opts.CatalogQuota,
	}
}

func (m *Member) startEtcd(ctx context.Context, c etcdConfig) error {
	m.etcdMu.Lock()
	defer m.etcdMu.Unlock()
	s, err := startEtcd(ctx, c, m.opts.Log)
	if err != nil {
		return err
	}
	m.etcd, m.etcdID = s, s.id()
	return nil
}

func (m *Member) stopEtcd() {
	m.etcdMu.Lock()
	defer m.etcdMu.Unlock()
	m.endEtcd()
}

// endEtcd needs etcdMu held.
func (m *Member) endEtcd() {
	if m.etcd != nil {
		m.etcd.close()
		m.etcd = nil
	}
}

// forgetEtcd stops etcd and removes its data.
func (m *Member) forgetEtcd() error {
	m.etcdMu.Lock()
	defer m.etcdMu.Unlock()
	m.endEtcd()
	m.etcdID = 0
	return m.dir.removeEtcd()
}

func (m *Member) runsEtcd() bool {
	m.etcdMu.Lock()
	defer m.etcdMu.Unlock()
	return m.etcd != nil
}

// sleep waits; it returns early, with an error, when ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
