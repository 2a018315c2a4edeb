package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/cork"
)

// peers reaches the other servers, with this server's certificate. Safe for
// concurrent use.
type peers struct {
	// server finds a server's record; nil when there is none.
	server func(id string) *argonv1.Server
	// config is for connections to one server: it accepts only that server's
	// certificate.
	config func(serverID string, protocols ...string) *tls.Config

	mu      sync.Mutex
	clients map[string]*peerClient
}

// peerClient is a server's API.
type peerClient struct {
	url  string
	http *http.Client
}

// api finds or makes the client of a server's API.
func (p *peers) api(serverID string) (*peerClient, error) {
	s := p.server(serverID)
	if s == nil {
		return nil, fmt.Errorf("server %s is not part of the cluster", serverID)
	}
	url := "https://" + net.JoinHostPort(s.GetAddress(), strconv.Itoa(int(s.GetApiPort())))
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.clients[serverID]; c != nil && c.url == url {
		return c, nil
	}
	var protocols http.Protocols
	protocols.SetHTTP2(true)
	dialer := net.Dialer{Timeout: handshakeTimeout}
	c := &peerClient{url: url, http: &http.Client{Transport: client.EndWithContext(&http.Transport{
		DialContext:         dialer.DialContext,
		TLSClientConfig:     p.config(serverID),
		TLSHandshakeTimeout: handshakeTimeout,
		IdleConnTimeout:     idleTimeout,
		Protocols:           &protocols,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
	})}}
	if p.clients == nil {
		p.clients = map[string]*peerClient{}
	}
	p.clients[serverID] = c
	return c, nil
}

// Machines implements rpc.Peers.
func (p *peers) Machines(serverID string) (argonv1connect.MachineServiceClient, error) {
	c, err := p.api(serverID)
	if err != nil {
		return nil, err
	}
	return argonv1connect.NewMachineServiceClient(c.http, c.url), nil
}

// Volumes implements rpc.Peers.
func (p *peers) Volumes(serverID string) (argonv1connect.VolumeServiceClient, error) {
	c, err := p.api(serverID)
	if err != nil {
		return nil, err
	}
	return argonv1connect.NewVolumeServiceClient(c.http, c.url), nil
}

// Servers implements rpc.Peers.
func (p *peers) Servers(serverID string) (argonv1connect.ServerServiceClient, error) {
	c, err := p.api(serverID)
	if err != nil {
		return nil, err
	}
	return argonv1connect.NewServerServiceClient(c.http, c.url), nil
}

func (p *peers) images(serverID string) (argonv1connect.ImageServiceClient, error) {
	c, err := p.api(serverID)
	if err != nil {
		return nil, err
	}
	return argonv1connect.NewImageServiceClient(c.http, c.url), nil
}

// dialData connects to a server's data port for one of the protocols, the first
// that the server knows.
func (p *peers) dialData(ctx context.Context, serverID string, protocols ...string) (*tls.Conn, error) {
	s := p.server(serverID)
	if s == nil {
		return nil, fmt.Errorf("server %s is not part of the cluster", serverID)
	}
	dialer := net.Dialer{Timeout: handshakeTimeout}
	nc, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(s.GetAddress(), strconv.Itoa(int(s.GetDataPort()))))
	if err != nil {
		return nil, fmt.Errorf("connecting to the data port of server %s: %w", s.GetMeta().GetName(), err)
	}
	conn := tls.Client(cork.New(nc), p.config(serverID, protocols...))
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("connecting to the data port of server %s: %w", s.GetMeta().GetName(), err), conn.Close())
	}
	return conn, nil
}

// close ends idle connections.
func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.clients {
		c.http.CloseIdleConnections()
	}
}
