// Package qmp is a client of the QEMU Machine Protocol.
//
// What lives here: the protocol as QEMU's docs/interop/qmp-spec describes it:
// greeting, negotiation, commands and their answers, events. What must not: any
// command's meaning (qemu/).
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrClosed: the connection is over; QEMU has most likely ended.
var ErrClosed = errors.New("the connection to QEMU is closed")

// Error is QEMU's refusal of a command.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Desc }

// Event is something that happened in QEMU without being asked for.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// Client is a connection. Safe for concurrent use.
type Client struct {
	conn    io.ReadWriteCloser
	onEvent func(Event)
	reading sync.WaitGroup

	sending sync.Mutex

	mu      sync.Mutex
	seq     uint64
	waiting map[uint64]chan message
	done    chan struct{}
}

// message is anything that QEMU sends: a greeting, an answer or an event.
type message struct {
	Greeting *json.RawMessage `json:"QMP"`
	ID       *uint64          `json:"id"`
	Return   json.RawMessage  `json:"return"`
	Error    *Error           `json:"error"`
	Event
}

// maxLine bounds one message, in bytes. QEMU's longest answers (schemas) are
// not asked for.
const maxLine = 1 << 20

// New negotiates over a connection, which it owns from now on. onEvent is called for
// each event, in order, and must not wait; nil if events don't matter.
func New(ctx context.Context, conn io.ReadWriteCloser, onEvent func(Event)) (*Client, error) {
	if onEvent == nil {
		onEvent = func(Event) {}
	}
	c := &Client{conn: conn, onEvent: onEvent, waiting: map[uint64]chan message{}, done: make(chan struct{})}
	greeted := make(chan struct{})
	c.reading.Go(func() { c.read(greeted) })
	err := c.negotiate(ctx, greeted)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// negotiate leaves the mode in which only qmp_capabilities is allowed. QEMU
// serves one client at a time: the greeting comes when the one before is gone.
func (c *Client) negotiate(ctx context.Context, greeted <-chan struct{}) error {
	select {
	case <-greeted:
	case <-c.done:
		return fmt.Errorf("waiting for QEMU's greeting: %w", ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("waiting for QEMU's greeting: %w", ctx.Err())
	}
	return c.Execute(ctx, "qmp_capabilities", nil, nil)
}

// Close ends the connection.
func (c *Client) Close() error {
	err := c.conn.Close()
	c.reading.Wait()
	return err
}

// Done is closed when the connection is over.
func (c *Client) Done() <-chan struct{} { return c.done }

// Execute runs a command. args, if not nil, are its arguments; its result goes
// to result, if that is not nil. An *Error is QEMU's refusal.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	return c.ExecuteWith(ctx, nil, command, args, result)
}

// ExecuteWith is Execute of a command that takes a file, which stays the
// caller's; the connection must be a unix socket.
func (c *Client) ExecuteWith(ctx context.Context, f *os.File, command string, args, result any) error {
	m, err := c.call(ctx, f, command, args)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", command, err)
	case m.Error != nil:
		return fmt.Errorf("%s: %w", command, m.Error)
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("%s: reading the answer: %w", command, err)
	}
	return nil
}

func (c *Client) call(ctx context.Context, f *os.File, command string, args any) (message, error) {
	reply := make(chan message, 1)
	c.mu.Lock()
	c.seq++
	id := c.seq
	c.waiting[id] = reply
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiting, id)
	}()
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return message{}, err
	}
	if err := c.send(append(line, '\n'), f); err != nil {
		return message{}, fmt.Errorf("%w: %w", ErrClosed, err)
	}
	select {
	case m := <-reply:
		return m, nil
	case <-c.done:
		return message{}, ErrClosed
	case <-ctx.Done():
		return message{}, ctx.Err()
	}
}

// sendTimeout bounds how long QEMU may not take a command: one that hangs must not
// hold up all who have something to say to it.
const sendTimeout = 10 * time.Second

// send writes a line, and with its first byte a file, if there is one. After an
// error the connection is of no more use.
func (c *Client) send(line []byte, f *os.File) (err error) {
	c.sending.Lock()
	defer c.sending.Unlock()
	defer func() {
		if err != nil {
			_ = c.conn.Close()
		}
	}()
	if bounded, ok := c.conn.(interface{ SetWriteDeadline(time.Time) error }); ok {
		if err := bounded.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
			return err
		}
	}
	if f != nil {
		socket, ok := c.conn.(*net.UnixConn)
		if !ok {
			return errors.New("files go through unix sockets only")
		}
		n, _, err := socket.WriteMsgUnix(line, unix.UnixRights(int(f.Fd())), nil)
		if err != nil {
			return err
		}
		line = line[n:]
	}
	_, err = c.conn.Write(line)
	return err
}

// read takes what QEMU sends until the connection ends. What is not understood
// ends it.
func (c *Client) read(greeted chan<- struct{}) {
	defer close(c.done)
	in := bufio.NewScanner(c.conn)
	in.Buffer(make([]byte, 0, 4096), maxLine)
	for in.Scan() {
		var m message
		if err := json.Unmarshal(in.Bytes(), &m); err != nil {
			_ = c.conn.Close()
			return
		}
		switch {
		case m.Greeting != nil && greeted != nil:
			close(greeted)
			greeted = nil
		case m.ID != nil:
			c.answer(*m.ID, m)
		case m.Name != "":
			c.onEvent(m.Event)
		}
	}
}

func (c *Client) answer(id uint64, m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if reply := c.waiting[id]; reply != nil {
		reply <- m
		delete(c.waiting, id)
	}
}
