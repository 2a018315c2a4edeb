package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/agent"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/network"
)

// stateProtocol names, on the data port, a connection that carries a guest's
// state: the id of the guest that waits for it, after one byte for its length;
// one byte as an answer; then what the machine monitors say to each other.
const stateProtocol = "argon-state/1"

const (
	stateReady   byte = 1
	stateRefused byte = 2
	// maxGuestID bounds the id, in bytes.
	maxGuestID = 64
)

// carrier leads guests' states to other servers, and to the guests here that
// wait for one; see agent.Carrier.
type carrier struct {
	serverID string
	view     *catalog.View
	paths    paths
	dial     func(ctx context.Context, serverID string) (net.Conn, error)
	log      *slog.Logger

	// ctx ends with close; wg has what carries.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// newCarrier makes the one of a server.
func newCarrier(serverID string, view *catalog.View, p paths, peers *peers, log *slog.Logger) *carrier {
	c := &carrier{
		serverID: serverID, view: view, paths: p, log: log,
		dial: func(ctx context.Context, to string) (net.Conn, error) { return peers.dialData(ctx, to, stateProtocol) },
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// Open implements agent.Carrier. QEMU gets one end of a pair of sockets; the
// other one's bytes go through TLS.
func (c *carrier) Open(ctx context.Context, serverID, guestID string) (net.Conn, error) {
	there, err := c.dial(ctx, serverID)
	if err != nil {
		return nil, err
	}
	if err := askForState(ctx, there, guestID); err != nil {
		return nil, errors.Join(err, there.Close())
	}
	ours, theirs, err := connectedSockets()
	if err != nil {
		return nil, errors.Join(err, there.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(c.ctx, cancel)
	c.wg.Go(func() {
		defer cancel()
		defer stop()
		network.Splice(ctx, ours, there)
	})
	return theirs, nil
}

// close ends all that is carried from here; nobody opens any more.
func (c *carrier) close() {
	c.cancel()
	c.wg.Wait()
}

// connectedSockets are two ends of one connection.
func connectedSockets() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a pair of sockets: %w", err)
	}
	ends := [2]net.Conn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "state")
		conn, cerr := net.FileConn(f)
		err = errors.Join(err, cerr, f.Close())
		ends[i] = conn
	}
	if err != nil {
		return nil, nil, fmt.Errorf("making a pair of sockets: %w", err)
	}
	return ends[0], ends[1], nil
}

// askForState says for which guest the state is.
func askForState(ctx context.Context, conn net.Conn, guestID string) error {
	if guestID == "" || len(guestID) > maxGuestID {
		return fmt.Errorf("guest id %q is too long", guestID)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write(append([]byte{byte(len(guestID))}, guestID...)); err != nil {
		return fmt.Errorf("asking for the guest that waits: %w", err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return fmt.Errorf("asking for the guest that waits: %w", err)
	}
	if answer[0] != stateReady {
		return errors.New("the other server has no guest that waits for this machine's state")
	}
	if !stop() {
		return ctx.Err()
	}
	return conn.SetDeadline(time.Time{})
}

// serve leads a state that another server sends to the guest here that waits for
// it.
func (c *carrier) serve(ctx context.Context, conn *tls.Conn, serverID string) {
	guest, err := c.accept(ctx, conn, serverID)
	if err != nil {
		c.log.Warn("a guest's state was refused", "server", serverID, "err", err)
		_ = conn.Close()
		return
	}
	network.Splice(ctx, conn, guest)
}

func (c *carrier) accept(ctx context.Context, conn net.Conn, serverID string) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return nil, err
	}
	guestID, err := readGuestID(conn)
	if err != nil {
		return nil, err
	}
	refuse := func(err error) (net.Conn, error) {
		_, werr := conn.Write([]byte{stateRefused})
		return nil, errors.Join(err, werr)
	}
	if err := c.awaits(ctx, serverID, guestID); err != nil {
		return refuse(err)
	}
	guest, err := new(net.Dialer).DialContext(ctx, "unix", hypervisor.IncomingSocket(c.paths.machine(guestID)))
	if err != nil {
		return refuse(err)
	}
	if _, err := conn.Write([]byte{stateReady}); err != nil {
		return nil, errors.Join(err, guest.Close())
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, errors.Join(err, guest.Close())
	}
	return guest, nil
}

func readGuestID(r io.Reader) (string, error) {
	var buf [1 + maxGuestID]byte
	if _, err := io.ReadFull(r, buf[:1]); err != nil {
		return "", fmt.Errorf("reading which guest it is for: %w", err)
	}
	n := int(buf[0])
	if n == 0 || n > maxGuestID {
		return "", fmt.Errorf("reading which guest it is for: an id of %d bytes", n)
	}
	if _, err := io.ReadFull(r, buf[1:1+n]); err != nil {
		return "", fmt.Errorf("reading which guest it is for: %w", err)
	}
	return string(buf[1 : 1+n]), nil
}

// awaits looks whether a guest here waits for what a server sends. That server may
// have seen sooner than this one that it does.
func (c *carrier) awaits(ctx context.Context, from, guestID string) error {
	if awaits(c.view.State(), c.serverID, from, guestID) == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout/2)
	defer cancel()
	if err := c.view.Sync(ctx); err != nil {
		return fmt.Errorf("looking whether guest %q is awaited here: %w", guestID, err)
	}
	return awaits(c.view.State(), c.serverID, from, guestID)
}

// awaits tells whether a guest here waits for what a server sends: the machine
// is that server's, and on its way here.
func awaits(st *catalog.State, serverID, from, guestID string) error {
	if st != nil {
		for id, m := range st.Machines {
			mig := m.GetMigration()
			if mig.GetToServerId() == serverID && m.GetServerId() == from && agent.GuestID(id, mig.GetPlacement()) == guestID &&
				mig.GetPhase() == argonv1.MigrationPhase_MIGRATION_PHASE_COPYING {
				return nil
			}
		}
	}
	return fmt.Errorf("no guest %q is awaited here from server %s", guestID, from)
}
