package nbd

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/nonblock"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

const (
	// maxBytes and maxRequests are what one connection has in flight.
	maxBytes    = volume.MaxRequest
	maxRequests = 512
	// readAhead is how much is read from a client at once; many small requests
	// come with one system call.
	readAhead = 64 << 10
)

// conn is one client. Its reader runs serve, its writer runs write.
type conn struct {
	server  *Server
	id      uint64
	nc      net.Conn
	r       *bufio.Reader
	device  volume.Device
	log     *slog.Logger
	session session
	done    chan struct{}  // closed when nothing is left of it
	tasks   sync.WaitGroup // of requests that are more than one to the device

	writing sync.Mutex // guards out and what is written
	out     net.Buffers
	now     *nonblock.Conn // nc; nil if answers cannot be written at once

	mu      sync.Mutex
	room    sync.Cond  // the reader waits for it
	work    sync.Cond  // the writer waits for it
	idle    []*request // to be used again
	ready   []*request // completed, to be answered
	rest    []byte     // of an answer, to be written before others
	flying  int        // requests between take and release
	bytes   int64      // of their buffers
	nothing bool       // the reader takes no more requests
}

// request is a client's request from the moment it was read until its answer
// was written.
type request struct {
	dev    volume.Request
	conn   *conn
	cmd    proto.Command
	cookie uint64
	buf    *[]byte // nil if it has no data
	err    error   // the device's
	errno  proto.Errno
	head   []byte
}

// refusals are what check found, for people.
var refusals = map[proto.Errno]string{
	proto.EINVAL:    "invalid request",
	proto.ENOSPC:    "request beyond the end of the volume",
	proto.EOVERFLOW: "request is too long",
	proto.ENOTSUP:   "this would not be fast",
}

func newConn(s *Server, id uint64, nc net.Conn) *conn {
	nc = nonblock.New(nc)
	c := &conn{
		server: s, id: id, nc: nc, device: s.opts.Device,
		r:    bufio.NewReaderSize(nc, readAhead),
		log:  s.log.With("client", id),
		done: make(chan struct{}),
	}
	c.room.L, c.work.L = &c.mu, &c.mu
	c.now, _ = nc.(*nonblock.Conn)
	return c
}

// stop makes the reader stop at once and the writer within answerTime.
func (c *conn) stop() {
	now := time.Now()
	_ = c.nc.SetReadDeadline(now)
	_ = c.nc.SetWriteDeadline(now.Add(answerTime))
}

// serve returns when the connection is over and none of its requests is in
// flight any more.
func (c *conn) serve() {
	defer close(c.done)
	err := c.handshake()
	if err == nil {
		err = c.transmit()
	}
	_ = c.nc.Close()
	c.log.Debug("NBD client is gone", "err", err)
}

// transmit is the transmission phase. It tells why the reader ended.
func (c *conn) transmit() error {
	var wg sync.WaitGroup
	wg.Go(c.write)
	err := c.read()
	c.finish()
	wg.Wait()
	c.tasks.Wait()
	return err
}

func (c *conn) handshake() error {
	if err := c.setDeadline(time.Now().Add(handshakeTime)); err != nil {
		return err
	}
	h := haggler{r: c.r, w: c.nc, export: c.server.opts.Export, device: c.device, stopping: c.server.isStopping}
	var err error
	if c.session, err = h.run(); err != nil {
		return err
	}
	if !c.server.settle(c) {
		return errStopping
	}
	return c.setDeadline(time.Time{})
}

// setDeadline never undoes the deadlines that stop sets.
func (c *conn) setDeadline(t time.Time) error {
	if err := c.nc.SetDeadline(t); err != nil {
		return err
	}
	if c.server.isStopping() {
		return errStopping
	}
	return nil
}

var (
	errDisconnect = errors.New("the client disconnected")
	errStopping   = errors.New("the server stops")
)

// read takes requests until the client or the server ends that.
func (c *conn) read() error {
	for {
		b, err := c.r.Peek(proto.RequestSize)
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		h, ok := proto.ParseRequest(b)
		if !ok {
			return fmt.Errorf("request begins with %x", b[:4])
		}
		if h.Command == proto.CmdDisc {
			return errDisconnect
		}
		if c.server.isStopping() {
			return errStopping
		}
		_, _ = c.r.Discard(proto.RequestSize)
		if err := c.handle(h); err != nil {
			return err
		}
	}
}

// handle starts a request. An error means that the stream is broken.
func (c *conn) handle(h proto.Request) error {
	errno := c.session.check(h, c.device.Size())
	size := 0
	if errno == 0 {
		size = bufferNeeded(h)
	}
	r := c.take(size)
	r.cmd, r.cookie, r.errno = h.Command, h.Cookie, errno
	if h.Command == proto.CmdWrite {
		if err := c.payload(r, h); err != nil {
			c.release(r)
			return err
		}
	}
	r.dev.Op, r.dev.Off, r.dev.Len = deviceOp(h.Command), int64(h.Off), int64(h.Len)
	r.dev.FUA = h.Flags&proto.CmdFlagFUA != 0 && r.dev.Op.Changes()
	switch {
	case errno != 0:
		r.complete(nil)
	case h.Command == proto.CmdBlockStatus:
		r.complete(c.status(r, h))
	case h.Len == 0 && h.Command != proto.CmdFlush:
		r.complete(nil) // not forbidden, only without effect
	case h.Flags&proto.CmdFlagNoHole != 0:
		c.tasks.Go(func() { r.complete(c.provision(r)) })
	default:
		if h.Command == proto.CmdRead {
			r.dev.Data = (*r.buf)[:h.Len]
		}
		c.device.Submit(&r.dev)
	}
	return nil
}

// bufferNeeded is the memory for a request's payload or its answer's.
func bufferNeeded(h proto.Request) int {
	switch {
	case h.Command == proto.CmdRead || h.Command == proto.CmdWrite:
		return int(h.Len)
	case h.Command == proto.CmdBlockStatus:
		return 4 + 8*maxExtents
	case h.Flags&proto.CmdFlagNoHole != 0:
		return int(min(h.Len, provisionPiece))
	}
	return 0
}

// payload reads the data of a write, or skips it if the write is refused.
func (c *conn) payload(r *request, h proto.Request) error {
	if r.errno != 0 {
		if _, err := io.CopyN(io.Discard, c.r, int64(h.Len)); err != nil {
			return fmt.Errorf("skip data of a refused write: %w", err)
		}
		return nil
	}
	if h.Len == 0 {
		return nil
	}
	r.dev.Data = (*r.buf)[:h.Len]
	if _, err := io.ReadFull(c.r, r.dev.Data); err != nil {
		return fmt.Errorf("read data of a write: %w", err)
	}
	return nil
}

// take waits until there is room for one more request, with a buffer of size
// bytes unless that is 0.
func (c *conn) take(size int) *request {
	var bytes int64
	if size > 0 {
		bytes = bufferSize(size)
	}
	c.mu.Lock()
	for c.flying == maxRequests || c.bytes+bytes > maxBytes {
		c.room.Wait()
	}
	c.flying++
	c.bytes += bytes
	var r *request
	if n := len(c.idle); n > 0 {
		r = c.idle[n-1]
		c.idle = c.idle[:n-1]
	}
	c.mu.Unlock()
	if r == nil {
		r = &request{conn: c}
		r.dev.Done = r.complete
	}
	if size > 0 {
		r.buf = c.server.buffers.get(size)
	}
	return r
}

// release ends requests whose answers were written or can't be.
func (c *conn) release(rs ...*request) {
	var bytes int64
	for _, r := range rs {
		if r.buf != nil {
			bytes += int64(len(*r.buf))
			c.server.buffers.put(r.buf)
			r.buf = nil
		}
		r.dev.Data, r.err = nil, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flying -= len(rs)
	c.bytes -= bytes
	c.idle = append(c.idle, rs...)
	c.room.Signal()
	if c.nothing && c.flying == 0 {
		c.work.Signal() // the writer may go
	}
}

// complete answers the request, or hands it to the writer. It is the device's
// Done.
func (r *request) complete(err error) {
	c := r.conn
	r.err = err
	if c.answerNow(r) {
		return
	}
	c.mu.Lock()
	c.ready = append(c.ready, r)
	c.mu.Unlock()
	c.work.Signal()
}

// finish tells the writer that no requests follow.
func (c *conn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nothing = true
	c.work.Signal()
}

// await waits until something is to be written and returns what was completed
// meanwhile. It tells when the connection is over.
func (c *conn) await(into []*request) (ready []*request, over bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.ready) == 0 && len(c.rest) == 0 && (!c.nothing || c.flying > 0) {
		c.work.Wait()
	}
	ready, c.ready = c.ready, into[:0]
	return ready, len(ready) == 0 && len(c.rest) == 0
}

// takeRest returns what is left of an answer. Only who owns writing may ask:
// else somebody could begin another one meanwhile.
func (c *conn) takeRest() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	rest := c.rest
	c.rest = nil
	return rest
}

// write answers requests until none can follow. Once the client takes no more
// answers it only lets the requests in flight finish.
func (c *conn) write() {
	var batch []*request
	broken := false
	for {
		var over bool
		if batch, over = c.await(batch); over {
			return
		}
		c.writing.Lock()
		if rest := c.takeRest(); !broken && c.writeAll(rest, batch) != nil {
			broken = true
			_ = c.nc.Close() // so that the reader ends, too
		}
		c.writing.Unlock()
		c.release(batch...)
	}
}

// writeAll writes what is left of an answer and then whole ones. It owns
// writing.
func (c *conn) writeAll(rest []byte, batch []*request) error {
	out := c.out[:0]
	if len(rest) > 0 {
		out = append(out, rest)
	}
	for _, r := range batch {
		out = r.appendAnswer(out)
	}
	c.out = out
	var err error
	if c.now != nil {
		_, err = c.now.WriteAll(out)
	} else {
		_, err = out.WriteTo(c.nc)
	}
	return err
}

// few is how many requests may be in flight for an answer to be written by
// whoever has it: that saves waking the writer. With more it is better to let
// the writer send several at once.
const few = 3

// maxNow bounds an answer that is written at once, in bytes.
const maxNow = 64 << 10

// answerNow writes an answer, or as much of it as the client's socket takes,
// unless somebody else writes or there is more to write. It never waits.
func (c *conn) answerNow(r *request) bool {
	if c.now == nil || len(r.dev.Data) > maxNow || !c.writing.TryLock() {
		return false
	}
	defer c.writing.Unlock()
	c.mu.Lock()
	ok := len(c.ready) == 0 && len(c.rest) == 0 && c.flying <= few
	c.mu.Unlock()
	if !ok {
		return false
	}
	c.out = r.appendAnswer(c.out[:0])
	written, err := c.now.WriteNow(c.out)
	if err != nil {
		return false // closed: the writer finds out
	}
	size := int64(0)
	for _, b := range c.out {
		size += int64(len(b))
	}
	if written < size {
		c.mu.Lock()
		c.rest = bytes.Join(c.out, nil)[written:]
		c.mu.Unlock()
		c.work.Signal()
	}
	c.release(r)
	return true
}

// appendAnswer appends the pieces of the answer.
func (r *request) appendAnswer(out net.Buffers) net.Buffers {
	a := reply{cookie: r.cookie, cmd: r.cmd, off: r.dev.Off, errno: r.errno}
	if a.errno != 0 {
		a.message = refusals[a.errno]
	} else if r.err != nil {
		a.errno, a.message = errnoOf(r.err), r.err.Error()
	}
	var payload []byte
	if a.errno == 0 && (a.cmd == proto.CmdRead || a.cmd == proto.CmdBlockStatus) {
		payload = r.dev.Data
	}
	a.payload = len(payload)
	r.head = appendReply(r.head[:0], r.conn.session.structured, a)
	out = append(out, r.head)
	if len(payload) > 0 {
		out = append(out, payload)
	}
	return out
}
