package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/cluster"
)

// Stopped is the directory of a server that does not run, and can't be started
// before Close.
type Stopped struct {
	dir  string
	lock *os.File
}

// OpenStopped fails if a server uses the directory. makeIt: it may be a new one.
func OpenStopped(dir string, makeIt bool) (*Stopped, error) {
	if makeIt {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("making the server's directory: %w", err)
		}
	} else if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("directory %s: %w: choose that of a server with --dir", dir, err)
	}
	lock, err := paths{dir: dir}.lock()
	if err != nil {
		return nil, err
	}
	return &Stopped{dir: dir, lock: lock}, nil
}

// Close lets a server use it again.
func (s *Stopped) Close() error { return s.lock.Close() }

// PrepareRecovery reads what a cluster can be made of anew. name and address are
// for a directory of no server yet; without an address it is found.
func (s *Stopped) PrepareRecovery(ctx context.Context, file, name, address, version string) (*cluster.Recovery, error) {
	m, err := cluster.Open(cluster.Options{Dir: s.dir})
	if err != nil && !errors.Is(err, cluster.ErrSuperseded) {
		return nil, err
	}
	if fresh := m != nil && !m.Configured(); fresh && file != "" && address == "" {
		if address, err = cluster.FindAddress(ctx, ""); err != nil {
			return nil, err
		}
	}
	return cluster.PrepareRecovery(ctx, cluster.RecoverOptions{
		Dir: s.dir, File: file, ServerName: name, Address: address, Version: version,
		Ports: cluster.Ports{API: DefaultAPIPort, Data: DefaultDataPort, Peer: DefaultPeerPort, Etcd: DefaultEtcdPort},
	})
}

// Rejoin makes the server part of the present incarnation of its cluster.
func (s *Stopped) Rejoin(ctx context.Context, address, token, version string) (*argonv1.Server, string, error) {
	return cluster.Rejoin(ctx, s.dir, address, token, version, time.Now())
}
