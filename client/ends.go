package client

import (
	"context"
	"io"
	"net/http"
)

// EndWithContext has every call over a transport end when its context ends. Over
// HTTP/2 the transport alone does not for a stream that goes both ways: while it
// waits for more to send, only closing the response ends it.
func EndWithContext(t *http.Transport) http.RoundTripper { return endsWithContext{t} }

type endsWithContext struct{ *http.Transport }

// RoundTrip implements http.RoundTripper.
func (t endsWithContext) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := t.Transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	body := &endingBody{ReadCloser: res.Body, ctx: req.Context()}
	body.stop = context.AfterFunc(req.Context(), func() { _ = body.ReadCloser.Close() })
	res.Body = body
	return res, nil
}

// endingBody is the answer of a call, closed when its context ends.
type endingBody struct {
	io.ReadCloser
	ctx  context.Context
	stop func() bool
}

// Read implements io.Reader. After the context ended, that is the error: that
// the body was closed tells nobody why.
func (b *endingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF && b.ctx.Err() != nil {
		err = b.ctx.Err()
	}
	return n, err
}

// Close implements io.Closer.
func (b *endingBody) Close() error {
	b.stop()
	return b.ReadCloser.Close()
}
