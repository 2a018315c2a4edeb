package network

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
)

// Splice carries bytes both ways until both directions have ended, one broke, or
// ctx ended. It closes both connections. What broke on one side breaks on the
// other: a cut stream must not look like a complete one.
func Splice(ctx context.Context, a, b net.Conn) { spliceUntil(ctx, a, b) }

// splice carries bytes both ways until both directions have ended, or one
// broke, or the connections were closed. It closes both. What broke on one side
// breaks on the other: a cut stream must not look like a complete one.
func splice(a, b net.Conn) {
	var wg sync.WaitGroup
	for _, d := range [2][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			if err := carry(d[0], d[1]); err != nil {
				reset(a)
				reset(b)
			}
		})
	}
	wg.Wait()
	_ = a.Close()
	_ = b.Close()
}

// carry copies one direction, and hands on its end: the other direction may go
// on after that.
func carry(to, from net.Conn) error {
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	half, ok := to.(interface{ CloseWrite() error })
	if !ok {
		return errors.New("the connection cannot be closed in one direction")
	}
	return half.CloseWrite()
}

// reset closes a connection so that the other side sees an error and not an
// end.
func reset(conn net.Conn) {
	if slow, ok := conn.(*paced); ok {
		slow.cancel() // whoever waits for his turn need not
		conn = slow.Conn
	}
	if inner, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = inner.NetConn() // of a TLS connection
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
