package daemon

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// headerTimeout bounds how long the head of a request may take.
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	// closeTimeout bounds how long calls under way may go on when the server
	// stops.
	closeTimeout = 2 * time.Second
	// pingAfter is how long a connection may be silent before it is asked
	// whether it is still there; pingTimeout is how long the answer may take.
	pingAfter   = 10 * time.Second
	pingTimeout = 5 * time.Second
)

// listenTCP says what a port in use means.
func listenTCP(ctx context.Context, what, address string, port int) (net.Listener, error) {
	at := net.JoinHostPort(address, strconv.Itoa(port))
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", at)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s port %s is in use: stop what uses it, or choose another with --%s-port", what, at, what)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%s is not an address of this host: choose one with --address", address)
	case err != nil:
		return nil, fmt.Errorf("listening on %s port %s: %w", what, at, err)
	}
	return ln, nil
}

// listeners are what others reach a server at.
type listeners struct{ api, data net.Listener }

// listenAt opens the ports at an address.
func (s *server) listenAt(ctx context.Context, address string) (*listeners, error) {
	api, err := listenTCP(ctx, "api", address, s.APIPort)
	if err != nil {
		return nil, err
	}
	data, err := listenTCP(ctx, "data", address, s.DataPort)
	if err != nil {
		return nil, errors.Join(err, api.Close())
	}
	return &listeners{api, data}, nil
}

// use has the ports served. Only once.
func (s *server) use(l *listeners) {
	s.ports = l
	close(s.listening)
}

func (l *listeners) close() {
	_ = l.api.Close()
	_ = l.data.Close()
}

// listenUnix makes a socket that only its owner may use. Linux gives it the mode
// that the descriptor has when it is bound: others may go through the directory
// it is in (confine.go). The caller holds the directory's lock, so one that is
// there is a leftover.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the old socket: %w", err)
	}
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	ln, err := private.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening on the admin socket: %w", err)
	}
	return ln, nil
}

// newHTTPServer serves streams both ways: HTTP/2, also without TLS (on the
// unix socket), and HTTP/1.1 for simple callers.
func newHTTPServer(h http.Handler, logger *slog.Logger) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           h,
		Protocols:         &protocols,
		HTTP2:             &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          log.New(quiet{logger}, "", 0),
	}
}

// quiet: what goes wrong with a single connection is seldom news.
type quiet struct{ log *slog.Logger }

func (q quiet) Write(p []byte) (int, error) {
	q.log.Debug("a connection failed", "err", string(p))
	return len(p), nil
}

// serve serves until ctx ends; calls under way get a little time to finish.
func serve(ctx context.Context, s *http.Server, ln net.Listener) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		if s.Shutdown(bounded) != nil {
			_ = s.Close()
		}
	})
	err := s.Serve(ln)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
