package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/argon-cluster/argon/internal/volume/nbd"
)

// keeper keeps files while no daemon runs; see guard.Client.
type keeper interface {
	Keep(ctx context.Context, name string, f *os.File) error
	Kept(name string) *os.File
	Drop(ctx context.Context, name string) error
}

// sockets are those that guests reach their disks at. The guard keeps them: while
// the daemon is restarted a guest that connects waits, and is not turned away, or
// it would try again only after pauses that grow to many seconds.
type sockets struct {
	keeper keeper // nil: they end with the daemon
	// owner is whom a machine's sockets belong to; 0: the daemon's user.
	owner func(machineID string) uint32
	log   *slog.Logger
}

// listen takes up the socket of that path, or makes it.
func (s *sockets) listen(ctx context.Context, path, machineID string) (net.Listener, error) {
	ln, err := s.again(path)
	if ln == nil && err == nil {
		ln, err = s.anew(ctx, path)
	}
	if err != nil {
		return nil, err
	}
	owner := int(s.owner(machineID))
	if owner == 0 {
		owner = os.Geteuid()
	}
	if err := os.Lchown(path, owner, -1); err != nil {
		return nil, errors.Join(fmt.Errorf("giving a disk's socket to its machine: %w", err), ln.Close())
	}
	return ln, nil
}

// again is the socket that was kept; nil if none was, or its path is gone.
func (s *sockets) again(path string) (net.Listener, error) {
	if s.keeper == nil {
		return nil, nil
	}
	f := s.keeper.Kept(path)
	if f == nil {
		return nil, nil
	}
	defer f.Close()
	if st, err := os.Lstat(path); err != nil || st.Mode().Type() != os.ModeSocket {
		return nil, nil
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("taking up the socket %s: %w", path, err)
	}
	return ln, nil
}

func (s *sockets) anew(ctx context.Context, path string) (net.Listener, error) {
	ln, err := nbd.Listen(ctx, path)
	if err != nil || s.keeper == nil {
		return ln, err
	}
	f, err := ln.File()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("having the socket %s kept: %w", path, err), ln.Close())
	}
	defer f.Close()
	if err := s.keeper.Keep(ctx, path, f); err != nil {
		// It works all the same, as long as the daemon does.
		s.log.Warn("a socket is not kept for the next daemon", "path", path, "err", err)
		return ln, nil
	}
	ln.SetUnlinkOnClose(false)
	return ln, nil
}

// drop forgets a socket that nobody is to connect to any more.
func (s *sockets) drop(ctx context.Context, path string) {
	if s.keeper == nil {
		return
	}
	if err := s.keeper.Drop(ctx, path); err != nil {
		s.log.Warn("a socket is kept that nobody needs", "path", path, "err", err)
	}
	_ = os.Remove(path)
}
