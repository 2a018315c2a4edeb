package rpc

import (
	"fmt"
	"io"
	"slices"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
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

func TestReadLog(t *testing.T) {
	w := newWorld(t)
	w.local.logs = t.TempDir()
	out := logfile.New(w.local.logs, io.Discard)
	for i := range 3 {
		fmt.Fprintf(out, "line %d\n", i)
	}
	out.Close()
	for _, req := range []*argonv1.ReadLogRequest{{Lines: 2}, {Lines: 2, Server: "a"}} {
		if got, err := w.log(req); err != nil || !slices.Equal(got, []string{"line 1", "line 2"}) {
			t.Errorf("%v: %q, %v", req, got, err)
		}
	}
	_, err := w.log(&argonv1.ReadLogRequest{Server: "z"})
	wantError(t, err, connect.CodeNotFound, "argon server ls")
	// What is handed on to a server that is not the one that is meant goes no further.
	w.parts.Peers = onePeer{servers: w.servers}
	_, err = w.log(&argonv1.ReadLogRequest{Server: "b"})
	wantError(t, err, connect.CodeUnavailable, "do not agree")
}
