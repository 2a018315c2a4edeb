package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/features"
	"go.uber.org/zap"
)

// This file: an etcd that listens nowhere and is alone, to read and write a catalog
// whose cluster does not run.

const (
	// loneStart bounds how long it takes to read its log and to elect itself.
	loneStart = time.Minute
	// What etcd's own configuration has by default.
	loneTickMs, loneElectionTicks = 50, 10
	loneRequestBytes              = 1 << 20
	loneFiles                     = 5
	// revisionBump is how much higher the revision is after a recovery: nobody
	// may take the new catalog for an older state of the one that was lost.
	revisionBump = 1_000_000
)

// loneEtcd is the only member of its etcd.
type loneEtcd struct {
	server *etcdserver.EtcdServer
	client *clientv3.Client
}

// startLoneEtcd starts it with the data in dir. forced: whoever else is a member
// there is forgotten, and what is not known to be agreed on is dropped.
func startLoneEtcd(ctx context.Context, dir, name, peer string, forced bool) (*loneEtcd, error) {
	peers, err := types.NewURLsMap(name + "=" + peer)
	if err != nil {
		return nil, fmt.Errorf("etcd's own address: %w", err)
	}
	s, err := etcdserver.NewServer(config.ServerConfig{
		Name: name, DataDir: dir, PeerURLs: peers[name], ClientURLs: peers[name],
		InitialPeerURLsMap: peers, NewCluster: true, ForceNewCluster: forced,
		TickMs: loneTickMs, ElectionTicks: loneElectionTicks, InitialElectionTickAdvance: true,
		SnapshotCount: etcdSnapshotEntries, SnapshotCatchUpEntries: etcdCatchUpEntries,
		MaxSnapFiles: loneFiles, MaxWALFiles: loneFiles,
		MaxTxnOps: etcdOps, MaxRequestBytes: loneRequestBytes, MaxLearners: maxLearners,
		// Recovery needs room where the cluster had used up its own.
		QuotaBackendBytes:   2 * hardQuota(catalogQuota),
		BackendFreelistType: bbolt.FreelistMapType,
		ServerFeatureGate:   features.NewDefaultServerFeatureGate(name, zap.NewNop()),
		Logger:              zap.NewNop(),
	})
	if err != nil {
		return nil, fmt.Errorf("start etcd with the data in %s: %w", dir, err)
	}
	s.Start()
	ctx, cancel := context.WithTimeout(ctx, loneStart)
	defer cancel()
	select {
	case <-s.ReadyNotify():
		return &loneEtcd{server: s, client: v3client.New(s)}, nil
	case <-ctx.Done():
		s.HardStop()
		return nil, fmt.Errorf("start etcd with the data in %s: %w", dir, ctx.Err())
	}
}

func (e *loneEtcd) close() error {
	err := e.client.Close()
	e.server.Stop()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// saveSnapshot writes what one etcd holds into a new file. etcd puts a checksum of
// its own at the end.
func saveSnapshot(ctx context.Context, cli *clientv3.Client, path string) error {
	r, err := cli.Snapshot(ctx)
	if err != nil {
		return fmt.Errorf("copy the catalog: %w", err)
	}
	defer r.Close()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("copy the catalog: %w", err)
	}
	_, err = io.Copy(f, r)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("copy the catalog: %w", err)
	}
	return nil
}

// restoreSnapshot makes the data of a lone etcd of a snapshot, with a member that
// no earlier one can be taken for.
func restoreSnapshot(file, dir, name, peer, incarnation string) error {
	err := snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
		SnapshotPath: file, Name: name, OutputDataDir: dir,
		PeerURLs: []string{peer}, InitialCluster: name + "=" + peer, InitialClusterToken: incarnation,
		RevisionBump: revisionBump, MarkCompacted: true,
	})
	if err != nil {
		return fmt.Errorf("make etcd's data of the copy of the catalog: %w", err)
	}
	return nil
}
