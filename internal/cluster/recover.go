package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// RecoverOptions say of which directory a cluster is made anew, and from what.
type RecoverOptions struct {
	// Dir is the directory of a server that does not run; the caller has its lock.
	Dir string
	// File is a backup; empty: the newest of what the directory has.
	File string
	// ServerName, Address and Ports are for a directory of no server yet.
	ServerName, Address string
	Ports               Ports
	Version             string
	// Now is the wall clock; nil: the real one.
	Now func() time.Time
}

// Recovery is a recovery in the making. Nothing has changed before Carry.
type Recovery struct {
	opts RecoverOptions
	dir  directory
	work string
	// id is who the server is; nil: it is none yet.
	id  *identity
	raw string

	// Source says what the records are from. State are the records, LastEvent when
	// the newest event that they know of was.
	Source    string
	State     *catalog.State
	LastEvent time.Time
	// Skipped are sources that could not be used.
	Skipped []error
}

func (d directory) recovering() string { return d.path("recovering") }

// PrepareRecovery reads the records. Close it.
func PrepareRecovery(ctx context.Context, opts RecoverOptions) (_ *Recovery, err error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	d := directory(opts.Dir)
	if err := d.settleStaged(); err != nil {
		return nil, err
	}
	r := &Recovery{opts: opts, dir: d, work: d.recovering()}
	if r.id, _, err = d.load(); err != nil {
		return nil, err
	}
	if r.id == nil && opts.File == "" {
		return nil, fmt.Errorf("directory %s is not that of a server of a cluster: choose that with --dir, or restore a backup with `argon cluster restore`", d)
	}
	if err := os.RemoveAll(r.work); err != nil {
		return nil, fmt.Errorf("clear the directory of an earlier recovery: %w", err)
	}
	if err := os.Mkdir(r.work, 0o700); err != nil {
		return nil, fmt.Errorf("make a directory for the recovery: %w", err)
	}
	if err := r.read(ctx); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// Close removes what is left of the recovery's work.
func (r *Recovery) Close() error {
	if err := os.RemoveAll(r.work); err != nil {
		return fmt.Errorf("clear the directory of the recovery: %w", err)
	}
	return nil
}

// read chooses the records.
func (r *Recovery) read(ctx context.Context) error {
	if r.opts.File != "" {
		raw := filepath.Join(r.work, "backup")
		head, err := unpackCopy(r.opts.File, raw)
		if err != nil {
			return err
		}
		if r.id != nil && head.ClusterID != r.id.ClusterID {
			return fmt.Errorf("%s is of cluster %s (%s), and directory %s of cluster %s (%s): choose another directory with --dir",
				r.opts.File, head.ClusterName, head.ClusterID, r.dir, r.id.ClusterName, r.id.ClusterID)
		}
		return r.take(raw, "the backup of "+head.Taken.Format(time.RFC3339))
	}
	if err := r.readOwn(ctx); err != nil {
		r.Skipped = append(r.Skipped, err)
	}
	copies, err := r.dir.listCopies()
	if err != nil {
		return err
	}
	for i, c := range copies {
		if r.State != nil && c.head.compare(CopyHead{Incarnation: r.State.Cluster.GetIncarnation(), Revision: r.State.Revision}) <= 0 {
			break
		}
		raw := filepath.Join(r.work, fmt.Sprintf("copy-%d", i))
		head, err := unpackCopy(c.path, raw)
		if err == nil && head.ClusterID != r.id.ClusterID {
			err = fmt.Errorf("copy of the catalog %s: it is of another cluster", c.path)
		}
		if err == nil {
			err = r.take(raw, "this server's copy of "+head.Taken.Format(time.RFC3339))
		}
		if err == nil {
			return nil
		}
		r.Skipped = append(r.Skipped, err)
	}
	if r.State == nil {
		return errors.Join(fmt.Errorf("directory %s holds no records that can be used: try another server, or `argon cluster restore` with a backup", r.dir), errors.Join(r.Skipped...))
	}
	return nil
}

// readOwn reads etcd's data here, if this server voted. It works on a copy.
func (r *Recovery) readOwn(ctx context.Context) error {
	if whole, err := r.dir.hasEtcd(); err != nil || !whole {
		return err
	}
	data := filepath.Join(r.work, "own")
	if err := os.CopyFS(data, os.DirFS(r.dir.etcd())); err != nil {
		return fmt.Errorf("copy etcd's data: %w", err)
	}
	e, err := startLoneEtcd(ctx, data, r.id.ServerID, r.peer(), true)
	if err != nil {
		return err
	}
	raw := filepath.Join(r.work, "own-snapshot")
	err = saveSnapshot(ctx, e.client, raw)
	if err := errors.Join(err, e.close()); err != nil {
		return err
	}
	return r.take(raw, "this server's own etcd")
}

func (r *Recovery) peer() string { return urlString(r.id.Address, r.id.Ports.Peer) }

// take makes a snapshot the one to go on with.
func (r *Recovery) take(raw, source string) error {
	st, last, err := catalog.ReadFile(raw)
	if err != nil {
		return err
	}
	if r.id != nil && st.Cluster.GetId() != r.id.ClusterID {
		return fmt.Errorf("%s is of cluster %s, this server of %s", source, st.Cluster.GetId(), r.id.ClusterID)
	}
	r.raw, r.Source, r.State, r.LastEvent = raw, source, st, last
	return nil
}

// Carry makes the server of the directory the only voter of a new incarnation. It
// changes the directory in one step, at its end; what was there is kept in the
// directory that it names.
func (r *Recovery) Carry(ctx context.Context) (kept string, err error) {
	own, err := r.own()
	if err != nil {
		return "", err
	}
	staged := directory(filepath.Join(r.work, "staged"))
	if err := os.Mkdir(string(staged), 0o700); err != nil {
		return "", fmt.Errorf("make a directory for the recovery: %w", err)
	}
	c, ca, err := r.succeed(staged)
	if err != nil {
		return "", err
	}
	if _, err := certify(staged, ca, own, r.opts.Now()); err != nil {
		return "", err
	}
	id := newIdentity(c, own)
	id.Endpoints = []string{urlString(own.GetAddress(), int(own.GetEtcdPort()))}
	if err := r.fill(ctx, staged, c, ca, own); err != nil {
		return "", err
	}
	if err := staged.saveIdentity(id); err != nil {
		return "", err
	}
	return r.dir.settle(staged, r.opts.Now())
}

// own is the record that this server will have.
func (r *Recovery) own() (*argonv1.Server, error) {
	if r.id != nil {
		s := proto.CloneOf(r.State.Servers[r.id.ServerID])
		if s == nil {
			s = &argonv1.Server{Meta: &argonv1.Meta{Id: r.id.ServerID, Name: r.id.ServerName}, Version: r.opts.Version}
		}
		place(s, r.id.Address, r.id.Ports)
		return s, r.free(s)
	}
	if !reachable(r.opts.Address) {
		return nil, fmt.Errorf("address %q: others cannot reach this server there: give another --address", r.opts.Address)
	}
	s := &argonv1.Server{Meta: &argonv1.Meta{Id: catalog.NewID(), Name: r.opts.ServerName}, Version: r.opts.Version}
	for _, known := range r.State.Servers {
		if known.GetMeta().GetName() == r.opts.ServerName {
			s = proto.CloneOf(known) // it takes that one's place
		}
	}
	place(s, r.opts.Address, r.opts.Ports)
	return s, r.free(s)
}

func place(s *argonv1.Server, address string, ports Ports) {
	s.Address = address
	s.ApiPort, s.DataPort, s.PeerPort, s.EtcdPort = uint32(ports.API), uint32(ports.Data), uint32(ports.Peer), uint32(ports.Etcd)
}

// free refuses a server where the records have another.
func (r *Recovery) free(s *argonv1.Server) error {
	for id, other := range r.State.Servers {
		if id == s.GetMeta().GetId() {
			continue
		}
		if other.GetMeta().GetName() == s.GetMeta().GetName() {
			return fmt.Errorf("the records have another server of the name %s: this directory is not that one's", s.GetMeta().GetName())
		}
		if err := checkFree(s, []*argonv1.Server{other}); err != nil {
			return fmt.Errorf("the records have server %s at %s: take its place with --name %s, or give another --address", other.GetMeta().GetName(), s.GetAddress(), other.GetMeta().GetName())
		}
	}
	return nil
}

// succeed makes the next incarnation's authority, and has the last one certify it.
func (r *Recovery) succeed(staged directory) (*argonv1.Cluster, *authority, error) {
	former, err := r.formerAuthority()
	if err != nil {
		return nil, nil, err
	}
	c := proto.CloneOf(r.State.Cluster)
	c.Incarnation++
	ca, err := newAuthority(c.GetId(), r.opts.Now())
	if err != nil {
		return nil, nil, err
	}
	succession, err := former.certifySuccession(ca, c.GetId(), c.GetIncarnation(), r.opts.Now())
	if err != nil {
		return nil, nil, err
	}
	c.FormerCaCertificatesPem = append(c.GetFormerCaCertificatesPem(), c.GetCaCertificatePem())
	c.CaCertificatePem = string(encodeCertificate(ca.cert))
	c.SuccessionCertificatesPem = append(c.GetSuccessionCertificatesPem(), string(encodeCertificate(succession)))
	return c, ca, staged.saveSuccessions(c)
}

// formerAuthority is the one in the records.
func (r *Recovery) formerAuthority() (*authority, error) {
	key, err := catalog.ReadSecret(r.raw, authoritySecret)
	if err != nil {
		return nil, err
	}
	return parseAuthority([]byte(r.State.Cluster.GetCaCertificatePem()), key)
}

// certify gives a server a key and its certificate by an authority, in a directory.
func certify(d directory, ca *authority, s *argonv1.Server, now time.Time) (*credentials, error) {
	key, request, err := newRequest()
	if err != nil {
		return nil, err
	}
	cert, err := ca.issueServer(request, s, now)
	if err != nil {
		return nil, err
	}
	s.CertificateSerial, s.CertificateExpires = serialOf(cert), timestamppb.New(cert.NotAfter)
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return d.saveCredentials(encodeCertificate(ca.cert), encodeCertificate(cert), keyPEM)
}

// fill makes etcd's data.
func (r *Recovery) fill(ctx context.Context, staged directory, c *argonv1.Cluster, ca *authority, own *argonv1.Server) (err error) {
	name, peer := own.GetMeta().GetId(), urlString(own.GetAddress(), int(own.GetPeerPort()))
	if err := restoreSnapshot(r.raw, staged.etcd(), name, peer, fmt.Sprintf("%s-%d-%s", c.GetId(), c.GetIncarnation(), catalog.NewID())); err != nil {
		return err
	}
	e, err := startLoneEtcd(ctx, staged.etcd(), name, peer, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	// Of members that are gone. While one stands, nothing is written.
	if _, err := e.client.AlarmDisarm(ctx, &clientv3.AlarmMember{}); err != nil {
		return fmt.Errorf("end the old members' alarms: %w", err)
	}
	store, err := catalog.Open(ctx, e.client)
	if err != nil {
		return err
	}
	own.VoterRole, own.MemberId = argonv1.VoterRole_VOTER_ROLE_VOTER, uint64(e.server.MemberID())
	keyPEM, err := encodeKey(ca.key)
	if err != nil {
		return err
	}
	if err := store.Succeed(ctx, c, authoritySecret, keyPEM, own); err != nil {
		return err
	}
	if _, err := e.client.Delete(ctx, leaderKey); err != nil {
		return fmt.Errorf("end the old leadership: %w", err)
	}
	return store.Events.Append(ctx, &argonv1.Event{
		Severity: argonv1.Severity_SEVERITY_WARNING, Kind: "cluster", SubjectId: c.GetId(), SubjectName: c.GetName(),
		ServerId: own.GetMeta().GetId(), Reason: "cluster-recovered",
		Message: fmt.Sprintf("it is incarnation %d, made by server %s from %s", c.GetIncarnation(), own.GetMeta().GetName(), r.Source),
	})
}

// Losses are what may be lost, in lines.
func (r *Recovery) Losses() []string {
	lines := []string{"what was changed after these records; " + cmp.Or(lastEvent(r.LastEvent), "they have no event that says when that is")}
	if r.id == nil {
		return append(lines, "whatever is only on servers that do not come back")
	}
	for _, name := range r.without() {
		lines = append(lines, fmt.Sprintf("volume %s: no replica that was in sync is on this server", name))
	}
	for _, m := range byName(r.State.Machines) {
		if at := m.GetServerId(); at != "" && at != r.id.ServerID {
			lines = append(lines, fmt.Sprintf("machine %s was on server %s: what its guest had not written yet",
				m.GetMeta().GetName(), cmp.Or(r.State.Servers[at].GetMeta().GetName(), at)))
		}
	}
	return lines
}

func lastEvent(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return "their last event was at " + t.UTC().Format(time.RFC3339)
}

// without are the volumes of which this server has no replica in sync.
func (r *Recovery) without() []string {
	var names []string
	for _, v := range byName(r.State.Volumes) {
		has := slices.ContainsFunc(v.GetReplicas(), func(one *argonv1.Replica) bool {
			return one.GetServerId() == r.id.ServerID && one.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
		})
		if !has {
			names = append(names, v.GetMeta().GetName())
		}
	}
	return names
}

// byName sorts records.
func byName[T interface{ GetMeta() *argonv1.Meta }](records map[string]T) []T {
	var all []T
	for _, r := range records {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b T) int { return strings.Compare(a.GetMeta().GetName(), b.GetMeta().GetName()) })
	return all
}

// ServerNames are the servers that the records know.
func (r *Recovery) ServerNames() []string {
	var names []string
	for _, s := range byName(r.State.Servers) {
		names = append(names, s.GetMeta().GetName())
	}
	return names
}
