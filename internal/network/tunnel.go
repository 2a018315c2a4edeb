package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// ALPN names the tunnel's protocol on a server's data port.
const ALPN = "argon-port/1"

// maxID bounds a machine's id in a header, in bytes.
const maxID = 64

// headerTimeout bounds how long the first bytes of a tunnel may take.
const headerTimeout = 5 * time.Second

// Target is a guest's port.
type Target struct {
	MachineID string
	GuestPort uint16
}

// The answers to a header.
const (
	tunnelReady byte = 1
	// tunnelNowhere: the machine does not run here, or not with that port.
	tunnelNowhere byte = 2
	tunnelBusy    byte = 3
)

// errHeader: the bytes are not a tunnel's header.
var errHeader = errors.New("not a tunnel header")

// appendHeader encodes a target: the id's length (1 byte), the id, the guest's
// port (2 bytes, big endian).
func appendHeader(b []byte, t Target) ([]byte, error) {
	if t.MachineID == "" || len(t.MachineID) > maxID || t.GuestPort == 0 {
		return nil, fmt.Errorf("%w: machine id %q, port %d", errHeader, t.MachineID, t.GuestPort)
	}
	b = append(b, byte(len(t.MachineID)))
	b = append(b, t.MachineID...)
	return binary.BigEndian.AppendUint16(b, t.GuestPort), nil
}

// readHeader reads just the bytes of a header.
func readHeader(r io.Reader) (Target, error) {
	var buf [1 + maxID + 2]byte
	if _, err := io.ReadFull(r, buf[:1]); err != nil {
		return Target{}, err
	}
	n := int(buf[0])
	if n == 0 || n > maxID {
		return Target{}, fmt.Errorf("%w: a machine id of %d bytes", errHeader, n)
	}
	if _, err := io.ReadFull(r, buf[1:1+n+2]); err != nil {
		return Target{}, err
	}
	for _, c := range buf[1 : 1+n] {
		if c <= ' ' || c > '~' {
			return Target{}, fmt.Errorf("%w: byte %#x in the machine id", errHeader, c)
		}
	}
	t := Target{MachineID: string(buf[1 : 1+n]), GuestPort: binary.BigEndian.Uint16(buf[1+n:])}
	if t.GuestPort == 0 {
		return Target{}, fmt.Errorf("%w: port 0", errHeader)
	}
	return t, nil
}

// openTunnel asks the server at the other end of conn for a target.
func openTunnel(ctx context.Context, conn net.Conn, t Target) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(headerTimeout)); err != nil {
		return err
	}
	header, err := appendHeader(nil, t)
	if err != nil {
		return err
	}
	if _, err := conn.Write(header); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return err
	}
	switch answer[0] {
	case tunnelReady:
		if !stop() {
			return ctx.Err()
		}
		return conn.SetDeadline(time.Time{})
	case tunnelBusy:
		return errors.New("the machine's server has too many connections")
	default:
		return errors.New("the machine does not run there")
	}
}
