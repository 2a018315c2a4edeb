package rpc

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/logfile"
)

func (w *world) log(req *argonv1.ReadLogRequest) ([]string, error) {
	w.t.Helper()
	stream, err := w.servers.ReadLog(w.t.Context(), connect.NewRequest(req))
	w.must(err)
	defer stream.Close()
	var lines []string
	for stream.Receive() {
		lines = append(lines, stream.Msg().GetLines()...)
	}
	return lines, stream.Err()
}

// keep gives a server a log of some lines.
func (l *fakeLocal) keep(t *testing.T, lines ...string) {
	l.logs = t.TempDir()
	out := logfile.New(l.logs, io.Discard)
	for _, line := range lines {
		fmt.Fprintln(out, line)
	}
	out.Close()
}

// The log of the server that is asked, and of another one, which is asked in turn.
func TestReadLog(t *testing.T) {
	w := newWorld(t)
	there := *w.parts
	there.ServerID = "B"
	b := &world{t: t, local: &fakeLocal{parts: &there}}
	b.serve(ForSocket(New(b.local, w.parts.Log).Handler()))
	w.parts.Peers = onePeer{servers: b.servers}
	w.local.keep(t, "a0", "a1", "a2")
	b.local.keep(t, "b0", "b1", "b2")
	for _, c := range []struct {
		server string
		want   []string
	}{{"", []string{"a1", "a2"}}, {"a", []string{"a1", "a2"}}, {"b", []string{"b1", "b2"}}} {
		if got, err := w.log(&argonv1.ReadLogRequest{Lines: 2, Server: c.server}); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, %v", c.server, got, err)
		}
	}
	_, err := w.log(&argonv1.ReadLogRequest{Server: "z"})
	wantError(t, err, connect.CodeNotFound, "argon server ls")
	there.ServerID = "C" // who is handed it hands it on to nobody
	_, err = w.log(&argonv1.ReadLogRequest{Server: "b"})
	wantError(t, err, connect.CodeFailedPrecondition, "server b is another one")
	w.parts.Peers = noPeer{}
	_, err = w.log(&argonv1.ReadLogRequest{Server: "b"})
	wantError(t, err, connect.CodeUnavailable, "server b does not answer (connection refused): read its log there")
}

// noPeer is a server that can't be reached.
type noPeer struct{ Peers }

func (noPeer) Servers(string) (argonv1connect.ServerServiceClient, error) {
	return nil, connect.NewError(connect.CodeUnavailable, errors.New("connection refused"))
}
