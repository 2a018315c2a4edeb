package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/cork"
)

// handshakeTimeout bounds how long a new connection may take to say who it is.
const handshakeTimeout = 5 * time.Second

// dataPort is the listener for traffic between servers: each connection names
// its protocol by ALPN.
type dataPort struct {
	config *tls.Config
	// allow refuses who is not a server of this cluster any more. It returns
	// the peer's server id.
	allow func(context.Context, tls.ConnectionState) (serverID string, err error)
	// serve has one function per protocol. Each owns its connection, closes
	// it, and returns soon after ctx ended.
	serve map[string]func(ctx context.Context, conn *tls.Conn, serverID string)
	log   *slog.Logger
}

// run serves until ctx ends and all connections are closed.
func (d *dataPort) run(ctx context.Context, ln net.Listener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	for {
		conn, err := ln.Accept()
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			d.log.Warn("the data port accepts nothing for a moment", "err", err)
			select {
			case <-time.After(100 * time.Millisecond): // too many open files
			case <-ctx.Done():
			}
			continue
		}
		conns.Go(func() { d.dispatch(ctx, tls.Server(cork.New(conn), d.config)) })
	}
}

func (d *dataPort) dispatch(ctx context.Context, conn *tls.Conn) {
	bounded, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err := conn.HandshakeContext(bounded); err != nil {
		d.log.Debug("a connection to the data port failed", "peer", conn.RemoteAddr(), "err", err)
		_ = conn.Close()
		return
	}
	state := conn.ConnectionState()
	serverID, err := d.allow(bounded, state)
	if err != nil {
		d.log.Warn("a connection to the data port was refused", "peer", conn.RemoteAddr(), "err", err)
		_ = conn.Close()
		return
	}
	serve := d.serve[state.NegotiatedProtocol]
	if serve == nil {
		_ = conn.Close()
		return
	}
	serve(ctx, conn, serverID)
}
