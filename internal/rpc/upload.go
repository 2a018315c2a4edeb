package rpc

import (
	"errors"
	"io"
	"time"

	"github.com/argon-cluster/argon/internal/image"
)

// This file is what all imports share: reading data that a caller sends in
// messages, and telling him how far it is.

// upload is a message of an import's stream: a header, or data.
type upload[H any] interface {
	GetHeader() *H
	GetData() []byte
}

// uploadReader reads the data of an import's stream, after its header.
type uploadReader[H any, M upload[H]] struct {
	receive func() (M, error)
	rest    []byte
}

func (r *uploadReader[H, M]) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		m, err := r.receive()
		if err != nil {
			return 0, asReader(err)
		}
		if m.GetHeader() != nil {
			return 0, invalid("an import has only one header")
		}
		r.rest = m.GetData()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// asReader makes the error of a stream one of an io.Reader. Connect wraps the
// io.EOF at the caller's end, and those who read what is compressed compare.
func asReader(err error) error {
	if errors.Is(err, io.EOF) {
		return io.EOF
	}
	return err
}

// throttled tells the caller how far an import is, now and then. That he can't
// be told shows when the data is read.
func throttled(send func(image.Progress) error) func(image.Progress) {
	var last time.Time
	var phase string
	return func(g image.Progress) {
		if g.Phase == phase && time.Since(last) < progressEvery {
			return
		}
		last, phase = time.Now(), g.Phase
		_ = send(g)
	}
}
