package catalog

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const (
	prefix        = "/argon/"
	schemaKey     = prefix + "schema"
	statePrefix   = prefix + "state/"
	clusterKey    = statePrefix + "cluster"
	leasePrefix   = statePrefix + "lease/"
	namesPrefix   = prefix + "names/"
	tokensPrefix  = prefix + "tokens/"
	eventsPrefix  = prefix + "events/"
	secretsPrefix = prefix + "secrets/"
	// fullKey is there while the catalog is full.
	fullKey = statePrefix + "full"
	// contentPrefix and contentOfPrefix: see content.go.
	contentPrefix   = prefix + "content/"
	contentOfPrefix = prefix + "content-of/"
)

// SchemaVersion is the layout that this program writes and understands.
const SchemaVersion = 1

// Errors of Open and Create, and of writing when the catalog has changed
// hands since.
var (
	// ErrSchema: the catalog's layout is one this program does not know.
	ErrSchema = errors.New("the catalog's layout is not known to this argon")
	// ErrNoCluster: etcd has no catalog.
	ErrNoCluster = errors.New("there is no cluster here")
)

// Store is the catalog of one cluster. Safe for concurrent use.
type Store struct {
	etcd etcd

	Servers  *Table[*argonv1.Server]
	Images   *Table[*argonv1.Image]
	Volumes  *Table[*argonv1.Volume]
	Machines *Table[*argonv1.Machine]
	Tokens   *Table[*argonv1.Token]
	Events   *Events

	Checkpoints *Table[*argonv1.Checkpoint]
	Clients     *Table[*argonv1.ClientCertificate]

	status traits[*argonv1.VolumeStatus]
	usage  traits[*argonv1.Usage]
}

// Create writes the catalog of a new cluster, and the layout's version into
// c. ErrExists if there is one.
func Create(ctx context.Context, cli *clientv3.Client, c *argonv1.Cluster) (*Store, error) {
	c.SchemaVersion = SchemaVersion
	value, err := proto.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("catalog: encode the cluster record: %w", err)
	}
	res, err := etcd{cli}.Txn(ctx, []clientv3.Cmp{absent(schemaKey)}, []clientv3.Op{
		clientv3.OpPut(schemaKey, strconv.Itoa(SchemaVersion)),
		clientv3.OpPut(clusterKey, string(value)),
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("catalog: create: %w", err)
	}
	if !res.Succeeded {
		return nil, fmt.Errorf("catalog: a cluster %w", ErrExists)
	}
	return newStore(cli), nil
}

// Open opens a cluster's catalog. ErrNoCluster, ErrSchema.
func Open(ctx context.Context, cli *clientv3.Client) (*Store, error) {
	res, err := etcd{cli}.Get(ctx, schemaKey)
	if err != nil {
		return nil, fmt.Errorf("catalog: open: %w", err)
	}
	if len(res.Kvs) == 0 {
		return nil, errNoCluster()
	}
	if err := checkSchema(string(res.Kvs[0].Value)); err != nil {
		return nil, err
	}
	return newStore(cli), nil
}

func errNoCluster() error {
	return fmt.Errorf("catalog: %w: etcd is empty, or of something else; look at --dir, and see `argon init` and `argon join`", ErrNoCluster)
}

// checkSchema refuses a layout that this program does not know.
func checkSchema(version string) error {
	v, err := strconv.Atoi(version)
	switch {
	case err != nil:
		return fmt.Errorf("catalog: %w: its version is %q, which is none; restore a backup", ErrSchema, version)
	case v > SchemaVersion:
		return fmt.Errorf("catalog: %w: it has version %d and this program knows up to %d; install the newer argon on this server", ErrSchema, v, SchemaVersion)
	case v < SchemaVersion:
		return fmt.Errorf("catalog: %w: it has version %d and this program needs %d; install the older argon on this server", ErrSchema, v, SchemaVersion)
	}
	return nil
}

func newStore(cli *clientv3.Client) *Store {
	e := etcd{cli}
	return &Store{
		etcd: e,
		Servers: &Table[*argonv1.Server]{e, named("server",
			func() *argonv1.Server { return &argonv1.Server{} },
			func(r *argonv1.Server) **argonv1.Meta { return &r.Meta })},
		Images: &Table[*argonv1.Image]{e, named("image",
			func() *argonv1.Image { return &argonv1.Image{} },
			func(r *argonv1.Image) **argonv1.Meta { return &r.Meta })},
		Volumes: &Table[*argonv1.Volume]{e, named("volume",
			func() *argonv1.Volume { return &argonv1.Volume{} },
			func(r *argonv1.Volume) **argonv1.Meta { return &r.Meta })},
		Machines: &Table[*argonv1.Machine]{e, named("machine",
			func() *argonv1.Machine { return &argonv1.Machine{} },
			func(r *argonv1.Machine) **argonv1.Meta { return &r.Meta }).booting((*argonv1.Machine).GetFirstBoot)},
		Checkpoints: &Table[*argonv1.Checkpoint]{e, named("checkpoint",
			func() *argonv1.Checkpoint { return &argonv1.Checkpoint{} },
			func(r *argonv1.Checkpoint) **argonv1.Meta { return &r.Meta }).booting(
			func(r *argonv1.Checkpoint) *argonv1.FirstBoot { return r.GetMachine().GetFirstBoot() })},
		Clients: &Table[*argonv1.ClientCertificate]{e, clients()},
		Tokens:  &Table[*argonv1.Token]{e, tokens()},
		Events:  &Events{etcd: e, now: time.Now},
		status:  volumeStatus(),
		usage:   usage(),
	}
}

// tokens have no names, and ids that are made by those who issue them.
func tokens() traits[*argonv1.Token] {
	return traits[*argonv1.Token]{
		kind:         "token",
		prefix:       tokensPrefix,
		fresh:        func() *argonv1.Token { return &argonv1.Token{} },
		id:           (*argonv1.Token).GetId,
		prepare:      func(*argonv1.Token) {},
		revision:     (*argonv1.Token).GetRevision,
		created:      func(*argonv1.Token) int64 { return 0 },
		setRevisions: func(r *argonv1.Token, changed, _ int64) { r.Revision = changed },
	}
}

// clients are certificates: two of one client have one name.
func clients() traits[*argonv1.ClientCertificate] {
	return traits[*argonv1.ClientCertificate]{
		kind:         "client",
		prefix:       statePrefix + "client/",
		fresh:        func() *argonv1.ClientCertificate { return &argonv1.ClientCertificate{} },
		id:           (*argonv1.ClientCertificate).GetSerial,
		prepare:      func(*argonv1.ClientCertificate) {},
		revision:     (*argonv1.ClientCertificate).GetRevision,
		created:      func(*argonv1.ClientCertificate) int64 { return 0 },
		setRevisions: func(r *argonv1.ClientCertificate, changed, _ int64) { r.Revision = changed },
	}
}

// volumeStatus has no revision: only a volume's holder writes it.
func volumeStatus() traits[*argonv1.VolumeStatus] {
	return traits[*argonv1.VolumeStatus]{
		kind:         "volume-status",
		prefix:       statePrefix + "volume-status/",
		fresh:        func() *argonv1.VolumeStatus { return &argonv1.VolumeStatus{} },
		id:           (*argonv1.VolumeStatus).GetVolumeId,
		setRevisions: func(*argonv1.VolumeStatus, int64, int64) {},
	}
}

// usage has no revision: only the server that it is of writes it.
func usage() traits[*argonv1.Usage] {
	return traits[*argonv1.Usage]{
		kind:         "usage",
		prefix:       statePrefix + "usage/",
		fresh:        func() *argonv1.Usage { return &argonv1.Usage{} },
		id:           (*argonv1.Usage).GetServerId,
		setRevisions: func(*argonv1.Usage, int64, int64) {},
	}
}

// Client is the etcd client that the store uses.
func (s *Store) Client() *clientv3.Client { return s.etcd.Client }

// Cluster reads the record about the whole.
func (s *Store) Cluster(ctx context.Context) (*argonv1.Cluster, error) {
	c, _, err := s.readCluster(ctx)
	return c, err
}

func (s *Store) readCluster(ctx context.Context) (c *argonv1.Cluster, revision int64, err error) {
	res, err := s.etcd.Get(ctx, clusterKey)
	if err != nil {
		return nil, 0, fmt.Errorf("catalog: read the cluster record: %w", err)
	}
	if len(res.Kvs) == 0 {
		return nil, 0, errNoCluster()
	}
	c = &argonv1.Cluster{}
	if err := proto.Unmarshal(res.Kvs[0].Value, c); err != nil {
		return nil, 0, fmt.Errorf("catalog: the cluster record is damaged: %w", err)
	}
	return c, res.Kvs[0].ModRevision, nil
}

// ChangeCluster changes the record about the whole, and begins anew when somebody
// else did so in between. It returns what was written.
func (s *Store) ChangeCluster(ctx context.Context, alter func(*argonv1.Cluster)) (*argonv1.Cluster, error) {
	for {
		c, revision, err := s.readCluster(ctx)
		if err != nil {
			return nil, err
		}
		alter(c)
		value, err := proto.Marshal(c)
		if err != nil {
			return nil, fmt.Errorf("catalog: encode the cluster record: %w", err)
		}
		_, err = commit(ctx, s.etcd, []change{{
			what: "the cluster record", key: clusterKey,
			guards: []guard{{key: clusterKey, revision: revision, refused: changed}},
			ops:    []clientv3.Op{clientv3.OpPut(clusterKey, string(value))},
		}})
		if !errors.Is(err, ErrConflict) {
			return c, err
		}
	}
}

// PutLease says that a server is alive, for as long as the etcd lease lasts:
// the lease's end deletes it. A newer run of the server takes it over.
func (s *Store) PutLease(ctx context.Context, id clientv3.LeaseID, l *argonv1.Lease) error {
	value, err := proto.Marshal(l)
	if err != nil {
		return fmt.Errorf("catalog: encode a lease: %w", err)
	}
	if err := s.etcd.Put(ctx, leasePrefix+l.GetServerId(), string(value), clientv3.WithLease(id)); err != nil {
		return fmt.Errorf("catalog: write the lease of server %s: %w", l.GetServerId(), err)
	}
	return nil
}

// PutVolumeStatus tells what a volume's holder sees. The last one wins.
func (s *Store) PutVolumeStatus(ctx context.Context, st *argonv1.VolumeStatus) error {
	return putPlain(ctx, s.etcd, s.status, st)
}

// DeleteVolumeStatus forgets it.
func (s *Store) DeleteVolumeStatus(ctx context.Context, volumeID string) error {
	return deletePlain(ctx, s.etcd, s.status, volumeID)
}

// PutUsage tells what is on a server's disk. The last one wins.
func (s *Store) PutUsage(ctx context.Context, u *argonv1.Usage) error {
	return putPlain(ctx, s.etcd, s.usage, u)
}

// DeleteUsage forgets it.
func (s *Store) DeleteUsage(ctx context.Context, serverID string) error {
	return deletePlain(ctx, s.etcd, s.usage, serverID)
}

// putPlain writes a record that only one writes, whatever was there.
func putPlain[T Record](ctx context.Context, e etcd, t traits[T], r T) error {
	if err := t.check(r); err != nil {
		return err
	}
	value, _, err := t.encode(r)
	if err != nil {
		return err
	}
	if err := e.Put(ctx, t.key(t.id(r)), value); err != nil {
		return fmt.Errorf("catalog: write %s: %w", t.describe(r), err)
	}
	return nil
}

func deletePlain[T Record](ctx context.Context, e etcd, t traits[T], id string) error {
	if err := e.Delete(ctx, t.key(id)); err != nil {
		return fmt.Errorf("catalog: delete %s %s: %w", t.kind, id, err)
	}
	return nil
}

// PutSecret writes a secret, once: ErrExists if there is one of this name.
func (s *Store) PutSecret(ctx context.Context, name string, value []byte) error {
	key := secretsPrefix + name
	res, err := s.etcd.Txn(ctx, []clientv3.Cmp{absent(key)}, []clientv3.Op{clientv3.OpPut(key, string(value))}, nil)
	if err != nil {
		return fmt.Errorf("catalog: write secret %s: %w", name, err)
	}
	if !res.Succeeded {
		return fmt.Errorf("secret %s: %w", name, ErrExists)
	}
	return nil
}

// GetSecret reads a secret.
func (s *Store) GetSecret(ctx context.Context, name string) ([]byte, error) {
	res, err := s.etcd.Get(ctx, secretsPrefix+name)
	if err != nil {
		return nil, fmt.Errorf("catalog: read secret %s: %w", name, err)
	}
	if len(res.Kvs) == 0 {
		return nil, fmt.Errorf("secret %s: %w", name, ErrNotFound)
	}
	return res.Kvs[0].Value, nil
}

// Unavailable tells whether an error means that no majority of the voters
// answers, so that the same may succeed later.
func Unavailable(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus().Code() == codes.Unavailable
	}
	var e interface{ Code() codes.Code } // etcd's own
	return errors.As(err, &e) && e.Code() == codes.Unavailable
}
