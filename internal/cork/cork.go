// Package cork holds small writes of a connection back, so that several become
// one system call, and tells a connection that was cut from one that has ended.
//
// What lives here: the connection that lies between TCP and TLS. What must not:
// when to hold back; whoever writes several things at once knows (mirror/,
// replica/).
package cork

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"

	"github.com/argon-cluster/argon/internal/nonblock"
)

// size is how much a connection holds back, in bytes, and how much is
// read at once.
const size = 128 << 10

// Conn is a connection below TLS. TLS makes a system call for each record of
// 16 KiB that it writes, and two for each that it reads; here several become
// one. Reads are always read ahead. Writes pass through, unless Cork was called:
// then they are held back until Uncork.
type Conn struct {
	net.Conn
	in *bufio.Reader // one goroutine reads, as TLS sees to

	mu   sync.Mutex
	held []byte
	hold bool
}

// New makes a Conn, which owns the connection.
func New(nc net.Conn) *Conn {
	nc = nonblock.New(nc)
	return &Conn{Conn: nc, in: bufio.NewReaderSize(nc, size)}
}

// ErrCut: TCP has ended, and TLS had not: the process at the other end died, or
// gave the connection up.
var ErrCut = errors.New("the connection was cut")

// Read reads ahead. crypto/tls takes the end of TCP for that of the stream
// where it comes between two records; the stream's own end is TLS's
// close_notify, which TLS reads and this does not see.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	if errors.Is(err, io.EOF) {
		err = ErrCut
	}
	return n, err
}

// Buffered is how many bytes have arrived that were not read. Whoever reads may
// ask.
func (c *Conn) Buffered() int {
	if c == nil {
		return 0
	}
	return c.in.Buffered()
}

// Write writes, or holds back.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.hold {
		return c.Conn.Write(p)
	}
	c.held = append(c.held, p...)
	if len(c.held) >= size {
		if err := c.flush(); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// Of finds the Conn below a TLS connection; nil if there is none. Cork and Uncork
// of nil do nothing.
func Of(nc net.Conn) *Conn {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	c, _ := nc.(*Conn)
	return c
}

// Cork holds writes back.
func (c *Conn) Cork() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold = true
}

// Uncork writes what was held back.
func (c *Conn) Uncork() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold = false
	return c.flush()
}

func (c *Conn) flush() error {
	if len(c.held) == 0 {
		return nil
	}
	_, err := c.Conn.Write(c.held)
	c.held = c.held[:0]
	return err
}
