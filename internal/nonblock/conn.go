// Package nonblock reads and writes sockets with as little of the Go scheduler as
// can be.
//
// What lives here: the system calls. What must not: protocols, and files: their
// system calls wait for disks.
package nonblock

import (
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVec is how many pieces the kernel takes in one call (IOV_MAX).
const maxVec = 1024

// Conn is a TCP or unix socket. Before each system call the scheduler usually
// prepares for a long one, and wakes a thread that watches it if all was quiet
// before: for a request that takes microseconds that costs more than the call.
// Sockets here are always non-blocking, so their calls are made without.
//
// One goroutine reads and one writes at a time.
type Conn struct {
	net.Conn
	raw syscall.RawConn
	in  transfer
	out transfer
}

// transfer is a system call and what came of it.
type transfer struct {
	call func(fd uintptr) bool // once made: a closure for each call would be garbage
	vec  []unix.Iovec
	now  bool // do not wait until the socket is ready
	n    int
	err  syscall.Errno
}

// New makes a Conn of a socket, which it owns. Anything else comes back as it
// is.
func New(nc net.Conn) net.Conn {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nc
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nc
	}
	c := &Conn{Conn: nc, raw: raw}
	c.in.call = func(fd uintptr) bool { return c.in.do(unix.SYS_READV, fd) }
	c.out.call = func(fd uintptr) bool { return c.out.do(unix.SYS_WRITEV, fd) }
	return c
}

// SyscallConn is the socket.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

// do makes the call; false to wait until the socket is ready and try again.
func (t *transfer) do(call, fd uintptr) bool {
	for {
		n, _, err := unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(&t.vec[0])), uintptr(min(len(t.vec), maxVec)))
		if err == unix.EINTR {
			continue
		}
		t.n, t.err = int(n), err
		if err != 0 {
			t.n = 0
		}
		return err != unix.EAGAIN || t.now
	}
}

// Read reads what is there, at least one byte.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	t := &c.in
	t.vec = append(t.vec[:0], vec(p))
	err := c.raw.Read(t.call)
	clear(t.vec) // it is not to keep p alive
	switch {
	case err != nil:
		return 0, err
	case t.err != 0:
		return 0, os.NewSyscallError("read", t.err)
	case t.n == 0:
		return 0, io.EOF
	}
	return t.n, nil
}

// Write writes all of p.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.WriteAll(net.Buffers{p})
	return int(n), err
}

// WriteAll writes all the pieces, with one system call if the socket takes them.
// The pieces stay as they are.
func (c *Conn) WriteAll(pieces net.Buffers) (int64, error) { return c.write(pieces, false) }

// WriteNow writes as much of the pieces as the socket takes without waiting.
func (c *Conn) WriteNow(pieces net.Buffers) (int64, error) { return c.write(pieces, true) }

func (c *Conn) write(pieces net.Buffers, now bool) (int64, error) {
	t := &c.out
	t.now = now
	t.vec = t.vec[:0]
	for _, p := range pieces {
		if len(p) > 0 {
			t.vec = append(t.vec, vec(p))
		}
	}
	all := t.vec
	defer clear(all)
	var done int64
	for len(t.vec) > 0 {
		if err := c.raw.Write(t.call); err != nil {
			return done, err
		}
		if t.err == unix.EAGAIN {
			break
		}
		if t.err != 0 {
			return done, os.NewSyscallError("write", t.err)
		}
		done += int64(t.n)
		t.advance()
	}
	t.vec = all
	return done, nil
}

// advance drops what was written.
func (t *transfer) advance() {
	n := uint64(t.n)
	for len(t.vec) > 0 && n >= t.vec[0].Len {
		n -= t.vec[0].Len
		t.vec = t.vec[1:]
	}
	if n > 0 {
		t.vec[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(t.vec[0].Base), n))
		t.vec[0].Len -= n
	}
}

func vec(p []byte) unix.Iovec { return unix.Iovec{Base: &p[0], Len: uint64(len(p))} }
