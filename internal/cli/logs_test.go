package cli

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

func (f *fakeAPI) ReadLog(_ context.Context, r *connect.Request[argonv1.ReadLogRequest], s *connect.ServerStream[argonv1.ReadLogResponse]) error {
	line := fmt.Sprintf("%q lines=%d since=%v follow=%v", r.Msg.GetServer(), r.Msg.GetLines(), r.Msg.GetSince() != nil, r.Msg.GetFollow())
	return s.Send(&argonv1.ReadLogResponse{Lines: []string{line}})
}

// A time says how much of a log is shown, unless a number of lines does as well.
func TestLogs(t *testing.T) {
	dir := serveFake(t, &fakeAPI{})
	for command, want := range map[string]string{
		"logs":                    `"" lines=100 since=false follow=false`,
		"logs s1 -n 0 -f":         `"s1" lines=0 since=false follow=true`,
		"logs s1 --since 1h":      `"s1" lines=0 since=true follow=false`,
		"logs s1 --since 1h -n 5": `"s1" lines=5 since=true follow=false`,
		"logs -o json":            `{"line":"\"\" lines=100 since=false follow=false"}`,
	} {
		if r := runArgon(dir, "", strings.Fields(command)...); r.code != 0 || r.out != want+"\n" {
			t.Errorf("%s: %+v", command, r)
		}
	}
}
