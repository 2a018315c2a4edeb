// Package nbdtest is an NBD client for tests and benchmarks.
//
// What lives here: the client side of the NBD protocol, pipelined, over a unix
// socket. What must not: anything that the server imports, so that the two
// only agree where both follow the protocol's document.
package nbdtest

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// Options say how to connect.
type Options struct {
	// Export is the name to ask for; the empty one is the server's default.
	Export string
	// Simple does without structured replies, and thus without Status.
	Simple bool
	// OldHandshake uses NBD_OPT_EXPORT_NAME alone, which implies Simple.
	OldHandshake bool
}

// Client is a connection. Safe for concurrent use.
type Client struct {
	// Size of the export in bytes, and what else the server announced.
	Size       int64
	Flags      uint16
	MinBlock   uint32
	MaxPayload uint32
	// Contexts tells whether Status can be used.
	Contexts bool

	nc         net.Conn
	r          *bufio.Reader
	structured bool
	received   sync.WaitGroup

	sendMu sync.Mutex
	header []byte
	out    net.Buffers

	mu      sync.Mutex
	cookie  uint64
	pending map[uint64]*Call
	err     error // why no more calls are possible
}

// Call is a request under way.
type Call struct {
	Command proto.Command
	Flags   proto.CommandFlags
	Off     int64
	// Len in bytes; of a read or write it is that of Data.
	Len int64
	// Data is what is written, or where a read puts what it read. It must not
	// be touched until the call is done.
	Data []byte
	// Extents are what a block status request found.
	Extents []Extent
	// Err is set when the call is done.
	Err error
	// Done gets the call when it is done; it needs room for it. Nil: nobody
	// wants to know.
	Done chan *Call
}

// Extent is a part of the answer to a block status request.
type Extent struct {
	Len   int64
	Flags uint32
}

// Error is an error that the server answered with.
type Error struct {
	Errno   proto.Errno
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("NBD error %d: %s", e.Errno, e.Message) }

// Errno is the error number of an *Error, 0 of any other error.
func Errno(err error) proto.Errno {
	var e *Error
	if errors.As(err, &e) {
		return e.Errno
	}
	return 0
}

// ErrClosed says that Close or Abort was called.
var ErrClosed = errors.New("the NBD client was closed")

// Dial connects to the unix socket at path and chooses an export.
func Dial(ctx context.Context, path string, opts Options) (*Client, error) {
	nc, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to NBD server: %w", err)
	}
	c := &Client{nc: nc, r: bufio.NewReaderSize(nc, 64<<10), pending: make(map[uint64]*Call)}
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	err = c.handshake(opts)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("NBD handshake: %w", err)
	}
	c.received.Go(c.receive)
	return c, nil
}

// Go starts a call; any number may be under way.
func (c *Client) Go(call *Call) {
	if call.Command == proto.CmdRead || call.Command == proto.CmdWrite {
		call.Len = int64(len(call.Data))
	}
	call.Err, call.Extents = nil, nil
	c.mu.Lock()
	c.cookie++
	cookie := c.cookie
	err := c.err
	if err == nil {
		c.pending[cookie] = call
	}
	c.mu.Unlock()
	if err != nil {
		call.finish(err)
		return
	}
	if err := c.send(call, cookie); err != nil {
		// The receiver fails the call.
		c.refuse(fmt.Errorf("send NBD request: %w", err))
		_ = c.nc.Close()
	}
}

func (c *Client) send(call *Call, cookie uint64) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	c.header = proto.Request{
		Flags: call.Flags, Command: call.Command, Cookie: cookie,
		Off: uint64(call.Off), Len: uint32(call.Len),
	}.Append(c.header[:0])
	c.out = append(c.out[:0], c.header)
	if call.Command == proto.CmdWrite {
		c.out = append(c.out, call.Data)
	}
	rest := c.out
	_, err := rest.WriteTo(c.nc)
	return err
}

// Do starts a call and waits until it is done.
func (c *Client) Do(call *Call) error {
	call.Done = make(chan *Call, 1)
	c.Go(call)
	return (<-call.Done).Err
}

// ReadAt implements io.ReaderAt, but knows no short reads.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if err := c.Do(&Call{Command: proto.CmdRead, Data: p, Off: off}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteAt implements io.WriterAt.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	if err := c.Do(&Call{Command: proto.CmdWrite, Data: p, Off: off}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush makes what was written before durable.
func (c *Client) Flush() error { return c.Do(&Call{Command: proto.CmdFlush}) }

// Trim gives a range up.
func (c *Client) Trim(off, length int64) error {
	return c.Do(&Call{Command: proto.CmdTrim, Off: off, Len: length})
}

// Zero fills a range with zeros.
func (c *Client) Zero(off, length int64) error {
	return c.Do(&Call{Command: proto.CmdWriteZeroes, Off: off, Len: length})
}

// Status asks what is allocated in a range.
func (c *Client) Status(off, length int64) ([]Extent, error) {
	call := &Call{Command: proto.CmdBlockStatus, Off: off, Len: length}
	err := c.Do(call)
	return call.Extents, err
}

// Close says goodbye and waits until the server has answered what it was asked
// and hung up. What it does not answer fails with ErrClosed.
func (c *Client) Close() error {
	c.refuse(ErrClosed)
	if err := c.send(&Call{Command: proto.CmdDisc}, 0); err != nil {
		_ = c.nc.Close()
	}
	c.received.Wait()
	return nil
}

// Abort hangs up at once. Calls under way fail with ErrClosed.
func (c *Client) Abort() {
	c.refuse(ErrClosed)
	_ = c.nc.Close()
	c.received.Wait()
}

// refuse fails all calls from now on. Only the first reason counts.
func (c *Client) refuse(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

func (call *Call) finish(err error) {
	call.Err = err
	if call.Done != nil {
		call.Done <- call
	}
}

// receive completes calls until the connection ends, then fails the rest.
func (c *Client) receive() {
	var err error
	for err == nil {
		err = c.receiveReply()
	}
	_ = c.nc.Close()
	c.refuse(fmt.Errorf("receive NBD reply: %w", err))
	c.mu.Lock()
	err = c.err
	calls := c.pending
	c.pending = nil
	c.mu.Unlock()
	for _, call := range calls {
		call.finish(err)
	}
}

func (c *Client) lookup(cookie uint64) (*Call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.pending[cookie]
	if call == nil {
		return nil, fmt.Errorf("reply to unknown cookie %d", cookie)
	}
	return call, nil
}

func (c *Client) done(cookie uint64, call *Call, err error) {
	c.mu.Lock()
	delete(c.pending, cookie)
	c.mu.Unlock()
	call.finish(err)
}

func (c *Client) receiveReply() error {
	b, err := c.r.Peek(proto.SimpleReplySize)
	if err != nil {
		return err
	}
	switch magic := binary.BigEndian.Uint32(b); {
	case magic == proto.SimpleReplyMagic:
		errno, cookie := proto.Errno(binary.BigEndian.Uint32(b[4:])), binary.BigEndian.Uint64(b[8:])
		_, _ = c.r.Discard(proto.SimpleReplySize)
		return c.simpleReply(errno, cookie)
	case magic == proto.StructuredReplyMagic && c.structured:
		b, err := c.r.Peek(proto.StructuredReplySize)
		if err != nil {
			return err
		}
		chunk := chunk{
			flags: binary.BigEndian.Uint16(b[4:]), typ: binary.BigEndian.Uint16(b[6:]),
			cookie: binary.BigEndian.Uint64(b[8:]), length: int64(binary.BigEndian.Uint32(b[16:])),
		}
		_, _ = c.r.Discard(proto.StructuredReplySize)
		return c.structuredReply(chunk)
	default:
		return fmt.Errorf("reply begins with %#x", magic)
	}
}

func (c *Client) simpleReply(errno proto.Errno, cookie uint64) error {
	call, err := c.lookup(cookie)
	if err != nil {
		return err
	}
	if call.Command == proto.CmdRead && c.structured {
		return errors.New("a read got a simple reply, but structured ones were agreed on")
	}
	if errno != 0 {
		c.done(cookie, call, &Error{Errno: errno})
		return nil
	}
	if call.Command == proto.CmdRead {
		if _, err := io.ReadFull(c.r, call.Data); err != nil {
			return err
		}
	}
	c.done(cookie, call, nil)
	return nil
}

type chunk struct {
	flags, typ uint16
	cookie     uint64
	length     int64
}

func (c *Client) structuredReply(ch chunk) error {
	call, err := c.lookup(ch.cookie)
	if err != nil {
		return err
	}
	switch ch.typ {
	case proto.ReplyNone:
		if ch.length != 0 {
			return fmt.Errorf("empty chunk of %d bytes", ch.length)
		}
	case proto.ReplyOffsetData:
		err = c.dataChunk(call, ch.length)
	case proto.ReplyBlockStatus:
		err = c.statusChunk(call, ch.length)
	case proto.ReplyError:
		err = c.errorChunk(call, ch.length)
	default:
		err = fmt.Errorf("chunk of type %d", ch.typ)
	}
	if err != nil {
		return err
	}
	if ch.flags&proto.ReplyFlagDone != 0 {
		c.done(ch.cookie, call, call.Err)
	}
	return nil
}

func (c *Client) dataChunk(call *Call, length int64) error {
	var b [8]byte
	if length < int64(len(b))+1 {
		return fmt.Errorf("data chunk of %d bytes", length)
	}
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return err
	}
	off, n := int64(binary.BigEndian.Uint64(b[:]))-call.Off, length-int64(len(b))
	if off < 0 || off+n > int64(len(call.Data)) {
		return fmt.Errorf("data chunk outside of what was asked for")
	}
	_, err := io.ReadFull(c.r, call.Data[off:off+n])
	return err
}

func (c *Client) statusChunk(call *Call, length int64) error {
	if length < 12 || (length-4)%8 != 0 || length > 1<<20 {
		return fmt.Errorf("block status chunk of %d bytes", length)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(c.r, b); err != nil {
		return err
	}
	for b = b[4:]; len(b) > 0; b = b[8:] {
		call.Extents = append(call.Extents, Extent{
			Len: int64(binary.BigEndian.Uint32(b)), Flags: binary.BigEndian.Uint32(b[4:]),
		})
	}
	return nil
}

func (c *Client) errorChunk(call *Call, length int64) error {
	if length < 6 || length > 6+proto.MaxString {
		return fmt.Errorf("error chunk of %d bytes", length)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(c.r, b); err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint16(b[4:]))
	if n > length-6 {
		return fmt.Errorf("error message of %d bytes in a chunk of %d", n, length)
	}
	call.Err = &Error{Errno: proto.Errno(binary.BigEndian.Uint32(b)), Message: string(b[6 : 6+n])}
	return nil
}
