package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"
)

// This file is what all imports share: sending data while the server says how
// far it is.

// importChunk is how much data one message carries.
const importChunk = 256 << 10

// importStream is the stream of an import.
type importStream[Req, Res any] = *connect.BidiStreamForClient[Req, Res]

// upload sends what send gives to a stream, and returns the first answer that
// is the result. When both ends fail, the reason on this side is told: the
// server can only say that it was left.
//
// A sender that waits for data, such as from standard input, is not waited for
// when the import fails: nothing ends such a wait before the process.
func upload[Req, Res any](
	ctx context.Context, what string, open func(context.Context) importStream[Req, Res],
	send func(importStream[Req, Res]) error, isResult func(*Res) bool,
) (*Res, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := open(ctx)
	// Over HTTP/2 a call whose context ends goes on for as long as it waits for
	// more to send. That its response is closed ends it.
	stop := context.AfterFunc(ctx, func() { _ = stream.CloseResponse() })
	defer stop()

	sent := make(chan error, 1)
	go func() {
		err := send(stream)
		switch {
		case errors.Is(err, io.EOF):
			err = nil // the server ended the stream: receiving tells why
		case err == nil:
			err = stream.CloseRequest()
		}
		sent <- err
		if err != nil {
			cancel() // else the server would wait for more
		}
	}()
	res, err := receiveResult(what, stream, isResult)
	if err == nil {
		stop()
		return res, errors.Join(<-sent, stream.CloseResponse())
	}
	select {
	case sendErr := <-sent:
		if refused := new(connect.Error); sendErr != nil && !errors.As(sendErr, &refused) {
			return nil, fmt.Errorf("%s: %w", what, sendErr)
		}
	default:
	}
	return nil, err
}

func receiveResult[Req, Res any](what string, stream importStream[Req, Res], isResult func(*Res) bool) (*Res, error) {
	for {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s: the server ended without a result: see its log, then try again", what)
		}
		if err != nil || isResult(res) {
			return res, err
		}
	}
}

// sendData sends all that a reader has, in pieces.
func sendData(data io.Reader, send func(piece []byte) error) error {
	buf := make([]byte, importChunk)
	for {
		n, readErr := io.ReadFull(data, buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(readErr, io.EOF), errors.Is(readErr, io.ErrUnexpectedEOF):
			return nil
		case readErr != nil:
			return fmt.Errorf("reading what is to be sent: %w", readErr)
		}
	}
}
