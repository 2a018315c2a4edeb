package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

// forwarded marks a console call that a server hands on, so that two servers
// with different views of where a machine runs do not play ball with it.
const forwarded = "Argon-Forwarded"

// consolePiece is how much is read from a console at once, in bytes.
const consolePiece = 16 << 10

type consoleStream = connect.BidiStream[argonv1.ConsoleRequest, argonv1.ConsoleResponse]

// Console carries bytes between the caller and a guest's serial console. It
// ends when the guest does, or when the caller goes away.
func (s machineService) Console(ctx context.Context, stream *consoleStream) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	first, err := stream.Receive()
	if errors.Is(err, io.EOF) {
		return invalid("name the machine in the first message")
	}
	if err != nil {
		return err
	}
	m, here, err := p.findGuest(ctx, first.GetName(), stream.RequestHeader())
	if err != nil {
		return err
	}
	if !here {
		return p.forwardConsole(ctx, stream, first, m.GetServerId())
	}
	console, err := p.Consoles.Open(ctx, m.GetMeta().GetId())
	if err != nil {
		return p.guestError(m, "console", err)
	}
	return carry(ctx, behind(console, first.GetShown()), first.GetData(), func() ([]byte, error) {
		msg, err := stream.Receive()
		return msg.GetData(), err
	}, func(data []byte) error {
		return stream.Send(&argonv1.ConsoleResponse{Data: data})
	})
}

// findGuest finds the server of a machine that runs. A call that another server
// handed on is served here or not at all.
func (p *Parts) findGuest(ctx context.Context, name string, header http.Header) (m *argonv1.Machine, here bool, err error) {
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, false, err
	}
	m, ok := byName(st.Machines, name)
	if !ok {
		return nil, false, notFound("machine", name)
	}
	switch at := m.GetServerId(); {
	case at == "":
		return nil, false, precondition("machine %s does not run: start it with `argon machine start %s`", name, name)
	case at == p.ServerID || header.Get(forwarded) != "":
		return m, true, nil
	case !placement.Alive(st, at):
		return nil, false, connect.NewError(connect.CodeUnavailable, fmt.Errorf("machine %s: its server %s is down", name, serverName(st, at)))
	}
	return m, false, nil
}

// guestError says what can't be had of a guest here.
func (p *Parts) guestError(m *argonv1.Machine, what string, err error) error {
	name := m.GetMeta().GetName()
	if errors.Is(err, fs.ErrNotExist) {
		return precondition("machine %s does not run on server %s yet: %s", name, serverName(p.View.State(), m.GetServerId()), m.GetStatus().GetReason())
	}
	return fmt.Errorf("%s of machine %s: %w", what, name, err)
}

// behind is a console whose history begins behind what was shown already.
func behind(console io.ReadWriteCloser, shown []byte) io.ReadWriteCloser {
	if len(shown) == 0 {
		return console
	}
	return &resumed{ReadWriteCloser: console, shown: shown}
}

// resumed leaves out of the first read, which has the history, what was shown.
type resumed struct {
	io.ReadWriteCloser
	shown, rest []byte
}

// historySize is what a console tells of the past at most, in bytes.
const historySize = 64 << 10

func (r *resumed) Read(p []byte) (int, error) {
	for r.shown != nil {
		history := make([]byte, historySize)
		n, err := r.ReadWriteCloser.Read(history)
		r.rest = history[:n]
		if i := bytes.LastIndex(r.rest, r.shown); i >= 0 {
			r.rest = r.rest[i+len(r.shown):]
		}
		r.shown = nil
		if err != nil {
			return 0, err
		}
	}
	if len(r.rest) > 0 {
		n := copy(p, r.rest)
		r.rest = r.rest[n:]
		return n, nil
	}
	return r.ReadWriteCloser.Read(p)
}

// carry copies between a caller and something of a guest's, and ends when either
// side does. The goroutine that reads from the caller ends with the handler's
// stream.
func carry(ctx context.Context, guest io.ReadWriteCloser, first []byte, receive func() ([]byte, error), send func([]byte) error) error {
	stop := context.AfterFunc(ctx, func() { _ = guest.Close() })
	defer stop()
	go func() {
		// The stream ends when the handler returns, and with it this.
		data := first
		for {
			if len(data) > 0 {
				if _, err := guest.Write(data); err != nil {
					return
				}
			}
			var err error
			if data, err = receive(); err != nil {
				return // the caller sends no more, and may go on reading
			}
		}
	}()
	defer guest.Close()
	buf := make([]byte, consolePiece)
	for {
		n, err := guest.Read(buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
				return err
			}
		}
		var refused *connect.Error // by the machine's server
		if errors.As(err, &refused) && ctx.Err() == nil {
			return err
		}
		if err != nil {
			return nil // the guest ended, or the caller went away
		}
	}
}

// forwardConsole hands the call on to the machine's server.
func (p *Parts) forwardConsole(ctx context.Context, stream *consoleStream, first *argonv1.ConsoleRequest, serverID string) error {
	machines, err := p.Peers.Machines(serverID)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	there := machines.Console(ctx)
	there.RequestHeader().Set(forwarded, p.ServerID)
	if err := there.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	go func() {
		for {
			m, err := stream.Receive()
			if err != nil {
				_ = there.CloseRequest()
				return
			}
			if there.Send(m) != nil {
				return // Receive tells why
			}
		}
	}()
	defer there.CloseResponse()
	for {
		m, err := there.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
}
