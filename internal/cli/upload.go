package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

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

// source is what an import reads.
type source struct {
	io.ReadCloser
	// name says what it is, for the record.
	name string
	// size in bytes; 0 if that is not known.
	size uint64
}

// openSource opens a file of this host; "-" is standard input.
func (a *app) openSource(path string) (*source, error) {
	switch {
	case path == "-" && isTerminal(a.in):
		return nil, errors.New("standard input is a terminal: name a file, or lead one in with <")
	case path == "-":
		return &source{ReadCloser: io.NopCloser(a.in), name: "standard input"}, nil
	case strings.Contains(path, "://"):
		return nil, fmt.Errorf("%s: only `argon image import` takes URLs: download it first", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a directory: name a file", path)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	s := &source{ReadCloser: file, name: filepath.Base(path)}
	if info.Mode().IsRegular() {
		s.size = uint64(info.Size())
	}
	return s, nil
}

// openSources opens several files, and none of them if it can't open all: what is
// wrong with the last one shows before the first one is sent.
func (a *app) openSources(paths []string) ([]*source, error) {
	var list []*source
	for _, path := range paths {
		s, err := a.openSource(path)
		if err != nil {
			closeSources(list)
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

func closeSources(list []*source) {
	for _, s := range list {
		_ = s.Close() // it was only read
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
