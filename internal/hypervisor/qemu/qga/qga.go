// Package qga is a client of the QEMU guest agent's protocol.
//
// What lives here: the protocol as QEMU's docs/interop/qemu-ga-ref describes it:
// finding a common beginning, commands and their answers. What must not: any
// command's meaning (qemu/), and trust: whatever answers is in the guest, which
// may send anything, for ever, or nothing.
package qga

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

const (
	// maxAnswer bounds one answer, in bytes; those of a guest with hundreds of
	// interfaces have tens of thousands.
	maxAnswer = 256 << 10
	// maxNoise bounds what is skipped before the beginning: answers to those
	// who asked before.
	maxNoise = 1 << 20
	// delimiter comes before the answer to guest-sync-delimited, and never in
	// JSON.
	delimiter = 0xff
)

// ErrBabble: what came is no answer.
var ErrBabble = errors.New("the guest agent does not keep to its protocol")

// Error is the agent's refusal of a command.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Desc }

// Client talks with one agent, one command after the other.
type Client struct {
	conn net.Conn
	in   *bufio.Reader
}

// New finds a common beginning over a connection, which it owns from now on. It waits
// until the agent answers; the ctx's deadline bounds that.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{conn: conn, in: bufio.NewReader(conn)}
	err := c.bounded(ctx, func() error { return c.sync(rand.Int64N(1 << 53)) })
	if err != nil {
		return nil, errors.Join(fmt.Errorf("waiting for the guest agent: %w", err), conn.Close())
	}
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Execute runs a command. args, if not nil, are its arguments; its result goes
// to result, if that is not nil. An *Error is the agent's refusal. After any
// other error the connection is of no more use.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	err := c.bounded(ctx, func() error {
		if err := c.send(command, args); err != nil {
			return err
		}
		line, err := c.line()
		if err != nil {
			return err
		}
		return parse(line, result)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// bounded ends what do waits for when ctx ends.
func (c *Client) bounded(ctx context.Context, do func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := do(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	return nil
}

// sync makes both sides begin anew: what is still on its way from before is
// skipped. The first byte ends what the agent may have read half of.
func (c *Client) sync(id int64) error {
	if _, err := c.conn.Write([]byte{delimiter}); err != nil {
		return err
	}
	if err := c.send("guest-sync-delimited", map[string]int64{"id": id}); err != nil {
		return err
	}
	for skipped := 0; skipped < maxNoise; {
		b, err := c.in.ReadByte()
		if err != nil {
			return err
		}
		if skipped++; b != delimiter {
			continue
		}
		line, err := c.line()
		if err != nil {
			return err
		}
		skipped += len(line)
		var got int64
		if parse(line, &got) == nil && got == id {
			return nil
		}
	}
	return ErrBabble
}

func (c *Client) send(command string, args any) error {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	_, err = c.conn.Write(append(line, '\n'))
	return err
}

// line reads one answer, without delimiters before it.
func (c *Client) line() ([]byte, error) {
	var line []byte
	for {
		part, err := c.in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxAnswer:
			return nil, ErrBabble
		case err == nil:
			return bytes.TrimLeft(line, "\xff"), nil
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// parse reads an answer.
func parse(line []byte, result any) error {
	var m struct {
		Return json.RawMessage `json:"return"`
		Error  *Error          `json:"error"`
	}
	switch err := json.Unmarshal(line, &m); {
	case err != nil || m.Error == nil && m.Return == nil:
		return ErrBabble
	case m.Error != nil:
		return m.Error
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("%w: %w", ErrBabble, err)
	}
	return nil
}
