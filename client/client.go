// Package client is the Go client of Argon's API.
//
// What lives here: how to reach a server (its local unix socket, or HTTPS with
// a client certificate) and the typed clients of every service. What must not:
// anything about how records are shown, and anything only servers may do.
package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
)

// DefaultDir is where a server keeps its data unless told otherwise, and
// DefaultPort is the TCP port of its API.
const (
	DefaultDir  = "/var/lib/argon"
	DefaultPort = "7440"
)

const (
	dialTimeout = 5 * time.Second
	// A server that answers no ping for this long is gone: streams end
	// instead of waiting for ever.
	pingAfter   = 10 * time.Second
	pingTimeout = 5 * time.Second
)

// Options say which server to talk to: Socket, or Address with Credentials.
type Options struct {
	// Socket is the path of a server's admin socket, see [SocketPath].
	Socket string
	// Address is "host" or "host:port" of any server of the cluster, or several,
	// separated by commas: the first that answers is used.
	Address string
	// Credentials are needed for Address.
	Credentials *Credentials
}

// Client holds the typed clients of one server's API. It connects when it is
// first used, and again after a lost connection. Safe for concurrent use.
type Client struct {
	Cluster   argonv1connect.ClusterServiceClient
	Servers   argonv1connect.ServerServiceClient
	Images    argonv1connect.ImageServiceClient
	Volumes   argonv1connect.VolumeServiceClient
	Snapshots argonv1connect.SnapshotServiceClient
	Machines  argonv1connect.MachineServiceClient
	Events    argonv1connect.EventServiceClient

	Checkpoints argonv1connect.CheckpointServiceClient

	transport *http.Transport
	remote    *remote // nil: by a socket
}

// Answered is the address of the server that answered last; empty if none has, and
// for a socket.
func (c *Client) Answered() string {
	if c.remote == nil {
		return ""
	}
	return c.remote.at()
}

// SocketPath is where the server with this data directory has its admin
// socket.
func SocketPath(dir string) string {
	if filepath.Clean(dir) == DefaultDir {
		return "/run/argon/admin.sock"
	}
	return filepath.Join(dir, "run", "admin.sock")
}

// Dial makes a client. It fails only if the options make no sense; whether the
// server answers shows at the first call, as an error that is or wraps an
// [UnreachableError].
func Dial(o Options) (*Client, error) {
	switch {
	case o.Socket != "" && o.Address != "":
		return nil, errors.New("client: both a socket and an address given: choose one")
	case o.Socket != "":
		return newClient(socketTransport(o.Socket), "http://argon"), nil
	case o.Address == "":
		return nil, errors.New("client: neither a socket nor an address given")
	case o.Credentials == nil:
		return nil, fmt.Errorf("client: server %s: a client certificate is needed: make one with `argon client create`", o.Address)
	}
	config, err := o.Credentials.tlsConfig()
	if err != nil {
		return nil, err
	}
	r := &remote{addresses: split(o.Address), config: config}
	if len(r.addresses) == 0 {
		return nil, fmt.Errorf("client: %q names no server", o.Address)
	}
	c := newClient(r.transport(), "https://"+serverName)
	c.remote = r
	return c, nil
}

func newClient(transport *http.Transport, url string) *Client {
	h := &http.Client{Transport: EndWithContext(transport)}
	return &Client{
		Cluster:     argonv1connect.NewClusterServiceClient(h, url),
		Servers:     argonv1connect.NewServerServiceClient(h, url),
		Images:      argonv1connect.NewImageServiceClient(h, url),
		Volumes:     argonv1connect.NewVolumeServiceClient(h, url),
		Snapshots:   argonv1connect.NewSnapshotServiceClient(h, url),
		Checkpoints: argonv1connect.NewCheckpointServiceClient(h, url),
		Machines:    argonv1connect.NewMachineServiceClient(h, url),
		Events:      argonv1connect.NewEventServiceClient(h, url),
		transport:   transport,
	}
}

// Close ends idle connections. Calls under way go on.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Call makes one unary call without the envelopes that carry headers:
//
//	res, err := client.Call(ctx, c.Cluster.Status, &argonv1.StatusRequest{})
func Call[Req, Res any](
	ctx context.Context,
	method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error),
	req *Req,
) (*Res, error) {
	res, err := method(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func http2Config() *http.HTTP2Config {
	return &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout}
}

// socketTransport speaks HTTP/2 without TLS, so that streams go both ways on a
// unix socket too.
func socketTransport(path string) *http.Transport {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	dialer := net.Dialer{Timeout: dialTimeout}
	return &http.Transport{
		Protocols: &protocols,
		HTTP2:     http2Config(),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, "unix", path)
			if err != nil {
				return nil, &UnreachableError{At: path, Local: true, Err: err}
			}
			return conn, nil
		},
	}
}

// UnreachableError says that no server could be connected to.
type UnreachableError struct {
	// At is the socket's path or the address.
	At string
	// Local: At is a socket.
	Local bool
	Err   error
}

func (e *UnreachableError) Error() string {
	switch {
	case !e.Local:
		return fmt.Sprintf("no argon server answers at %s (%v): check the address, or ask another server", e.At, e.Err)
	case errors.Is(e.Err, fs.ErrNotExist), errors.Is(e.Err, syscall.ECONNREFUSED):
		return fmt.Sprintf("no argon server answers at %s: start it with `argon server`", e.At)
	case errors.Is(e.Err, fs.ErrPermission):
		return fmt.Sprintf("no permission to use %s: run this as the user that runs the server", e.At)
	}
	return fmt.Sprintf("no argon server answers at %s (%v): check that `argon server` runs", e.At, e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }
