package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// errForeign: what answers on a guest's socket is not the guest's QEMU.
var errForeign = errors.New("another process answers there")

// dial connects to a socket in a guest's directory. That is the guest's, who may
// have put a link there that leads to another guest's monitor, or to this server's
// own socket: what answers must be the process that was started.
func dial(ctx context.Context, path string, pid int) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := isFrom(conn, pid); err != nil {
		return nil, errors.Join(fmt.Errorf("connecting to %s: %w", path, err), conn.Close())
	}
	return conn, nil
}

// isFrom looks whose process listens at the other end of a connection.
func isFrom(conn net.Conn, pid int) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var perr error
	if err := raw.Control(func(fd uintptr) {
		peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	switch {
	case perr != nil:
		return perr
	case int(peer.Pid) != pid:
		return errForeign
	}
	return nil
}
