package catalog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// fileLockTimeout bounds how long a snapshot's file is waited for; nobody else
// should have it.
const fileLockTimeout = 5 * time.Second

// revisionBytes is what etcd's keys in a file begin with: two numbers of 64 bits
// and what is between them.
const revisionBytes = 8 + 1 + 8

// ReadFile reads the records in a snapshot of etcd, without an etcd. last is the
// time of the newest event in it, by the clock of who told it; zero if there is
// none. ErrNoCluster, ErrSchema. It checks the file's structure, not that it is
// what was written: whoever keeps it does.
func ReadFile(path string) (st *State, last time.Time, err error) {
	kvs, revision, err := latest(path)
	if err != nil {
		return nil, last, fmt.Errorf("catalog: read the records in %s: %w", path, err)
	}
	version := kvs[schemaKey]
	if version == nil {
		return nil, last, errNoCluster()
	}
	if err := checkSchema(string(version.Value)); err != nil {
		return nil, last, err
	}
	store := newStore(nil)
	e := newState(revision).edit(store)
	newest := ""
	for key, kv := range kvs {
		switch {
		case strings.HasPrefix(key, statePrefix):
			if err := e.apply(true, kv); err != nil {
				return nil, last, err
			}
		case strings.HasPrefix(key, eventsPrefix):
			newest = max(newest, key)
		}
	}
	if e.Cluster == nil {
		return nil, last, errNoCluster()
	}
	if newest != "" {
		ev := &argonv1.Event{}
		if err := proto.Unmarshal(kvs[newest].Value, ev); err != nil {
			return nil, last, fmt.Errorf("catalog: event %s is damaged: %w", newest, err)
		}
		last = ev.GetTime().AsTime()
	}
	return e.State, last, nil
}

// ReadSecret reads a secret in a snapshot of etcd.
func ReadSecret(path, name string) ([]byte, error) {
	kvs, _, err := latest(path)
	if err != nil {
		return nil, fmt.Errorf("catalog: read the secrets in %s: %w", path, err)
	}
	kv := kvs[secretsPrefix+name]
	if kv == nil {
		return nil, fmt.Errorf("secret %s: %w", name, ErrNotFound)
	}
	return kv.Value, nil
}

// latest is the newest value of each key that was not deleted.
func latest(path string) (kvs map[string]*mvccpb.KeyValue, revision int64, err error) {
	if _, err := os.Stat(path); err != nil { // bbolt would make it
		return nil, 0, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: fileLockTimeout})
	if err != nil {
		return nil, 0, err
	}
	kvs = map[string]*mvccpb.KeyValue{}
	err = db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			return fmt.Errorf("its structure is damaged: %w", err)
		}
		b := tx.Bucket(schema.Key.Name())
		if b == nil {
			return fmt.Errorf("it holds no keys: %w", fs.ErrInvalid)
		}
		return b.ForEach(func(at, value []byte) error {
			if len(at) < revisionBytes {
				return errors.New("its structure is damaged: a revision is cut")
			}
			kv := &mvccpb.KeyValue{}
			if err := proto.Unmarshal(value, kv); err != nil {
				return fmt.Errorf("a key is damaged: %w", err)
			}
			revision = max(revision, mvcc.BytesToRev(at).Main)
			if mvcc.IsTombstone(at) {
				delete(kvs, string(kv.Key))
			} else {
				kvs[string(kv.Key)] = kv
			}
			return nil
		})
	})
	return kvs, revision, errors.Join(err, db.Close())
}

// Succeed makes the catalog that of a new incarnation, which begins with one
// server: c replaces the record about the whole, keyName and key the secret, and
// own is that server's record. Leases, tokens and certificates of clients, which
// another authority gave, go. The others keep their records, as lost ones.
func (s *Store) Succeed(ctx context.Context, c *argonv1.Cluster, keyName string, key []byte, own *argonv1.Server) error {
	value, err := proto.Marshal(c)
	if err != nil {
		return fmt.Errorf("catalog: encode the cluster record: %w", err)
	}
	err = errors.Join(
		s.etcd.Put(ctx, clusterKey, string(value)),
		s.etcd.Put(ctx, secretsPrefix+keyName, string(key)),
	)
	if err != nil {
		return fmt.Errorf("catalog: write the new incarnation: %w", err)
	}
	for _, gone := range []string{leasePrefix, tokensPrefix, s.Clients.prefix} {
		if err := s.etcd.Delete(ctx, gone, clientv3.WithPrefix()); err != nil {
			return fmt.Errorf("catalog: delete what belongs to the old incarnation: %w", err)
		}
	}
	servers, err := s.Servers.List(ctx)
	if err != nil {
		return err
	}
	known := false
	for _, old := range servers {
		if old.GetMeta().GetId() == own.GetMeta().GetId() {
			known = true
			own.Meta.Revision = old.GetMeta().GetRevision()
			err = s.Servers.Put(ctx, own)
		} else {
			old.VoterRole, old.MemberId = argonv1.VoterRole_VOTER_ROLE_CLIENT, 0
			err = s.Servers.Put(ctx, old)
		}
		if err != nil {
			return err
		}
	}
	if known {
		return nil
	}
	return s.Servers.Create(ctx, own)
}
