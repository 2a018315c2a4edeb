package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/volume"
)

const (
	// maxConns is how many clients one server has at once. With maxBytes it
	// bounds the server's memory.
	maxConns = 64
	// handshakeTime is how long a client may take to choose the export.
	handshakeTime = 30 * time.Second
	// answerTime is how long a closing server waits for a client to take the
	// answers that it is owed.
	answerTime = time.Second
	// acceptPause is how long no connection is accepted after a failure, such
	// as too many open files.
	acceptPause = 100 * time.Millisecond
)

// Options are what a server needs.
type Options struct {
	// SocketPath is where the unix socket is made, for its owner only. A
	// socket that is there already is taken for a dead server's and replaced.
	// The kernel takes at most 107 bytes.
	SocketPath string
	// Listener takes the place of SocketPath; the server closes it.
	Listener net.Listener
	// Device is what is served. It may implement Extents. It must outlive the
	// server.
	Device volume.Device
	// Export is the name that clients ask for; the empty name works, too. At
	// most 4096 bytes.
	Export string
	Log    *slog.Logger
}

// Server serves one export on one socket.
type Server struct {
	opts     Options
	listener net.Listener
	log      *slog.Logger

	cancelStop func() bool
	stopOnce   sync.Once
	stopping   chan struct{} // closed: no new connections, no new requests
	wg         sync.WaitGroup
	buffers    buffers

	mu    sync.Mutex
	conns map[uint64]*conn
}

// Serve begins to serve and returns. The server stops when ctx ends or Close
// is called; Close must be called in any case.
func Serve(ctx context.Context, opts Options) (*Server, error) {
	l := opts.Listener
	if l == nil {
		var err error
		if l, err = Listen(ctx, opts.SocketPath); err != nil {
			return nil, err
		}
	}
	s := &Server{
		opts: opts, listener: l, log: opts.Log,
		stopping: make(chan struct{}), conns: make(map[uint64]*conn),
	}
	s.wg.Go(s.accept)
	s.cancelStop = context.AfterFunc(ctx, s.stop)
	return s, nil
}

// Listen makes a socket that only its owner may connect to. Linux gives it the
// mode that the descriptor has when it is bound, so there is no moment in which
// others may.
func Listen(ctx context.Context, path string) (*net.UnixListener, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace old socket: %w", err)
		}
	}
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	l, err := private.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for NBD clients: %w", err)
	}
	return l.(*net.UnixListener), nil
}

// Close stops taking requests, lets those in flight finish, answers them, and
// waits until nothing of the server is left. It waits for the device: if that
// may be stalled, make it give up its requests first. A client with requests
// that were not taken any more gets no answer to them and may repeat them on
// its next connection.
func (s *Server) Close() error {
	s.cancelStop()
	s.stop()
	s.wg.Wait()
	return nil
}

func (s *Server) stop() {
	s.stopOnce.Do(func() {
		close(s.stopping)
		if err := s.listener.Close(); err != nil {
			s.log.Warn("NBD socket was not closed cleanly", "err", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range s.conns {
			c.stop()
		}
	})
}

func (s *Server) isStopping() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

func (s *Server) accept() {
	for id := uint64(1); ; id++ {
		nc, err := s.listener.Accept()
		if err != nil {
			if s.isStopping() {
				return
			}
			s.log.Warn("cannot accept NBD clients", "err", err)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			select {
			case <-time.After(acceptPause):
			case <-s.stopping:
				return
			}
			continue
		}
		c := newConn(s, id, nc)
		if !s.add(c) {
			_ = nc.Close()
			continue
		}
		s.wg.Go(func() {
			c.serve()
			s.remove(c)
		})
	}
}

func (s *Server) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isStopping() {
		return false
	}
	if len(s.conns) == maxConns {
		s.log.Warn("NBD client refused: too many connections", "limit", maxConns)
		return false
	}
	s.conns[c.id] = c
	return true
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c.id)
}

// settle waits until every earlier connection whose client is gone has done
// all that the client ever sent. A client may be the successor of one that was
// killed, or the same one connecting again: what the old connection still
// carried must not be written over what the new one writes. It tells whether
// the server goes on.
func (s *Server) settle(c *conn) bool {
	for _, gone := range s.goneBefore(c.id) {
		select {
		case <-gone.done:
		case <-s.stopping:
			return false
		}
	}
	return true
}

// goneBefore lists only connections that were accepted earlier, so that no two
// ever wait for each other.
func (s *Server) goneBefore(id uint64) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var gone []*conn
	for _, c := range s.conns {
		if c.id < id && hungUp(c.nc) {
			gone = append(gone, c)
		}
	}
	return gone
}

// hungUp tells whether the client closed its end, or is dead. Data that it
// sent before may still be unread.
func hungUp(nc net.Conn) bool {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	hup := false
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		hup = err == nil && n == 1 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return hup || err != nil // an error: closed by us, still finishing
}
