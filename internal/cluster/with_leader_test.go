package cluster

import (
	"context"
	"errors"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// A call that comes to members without a leader is made again, and no other.
func TestWithLeader(t *testing.T) {
	other := errors.New("other")
	for name, c := range map[string]struct {
		method  string
		answers []error
		want    error
		calls   int
	}{
		"the first one has a leader":   {"/etcdserverpb.KV/Txn", []error{nil}, nil, 1},
		"the third one has":            {"/etcdserverpb.KV/Range", []error{rpctypes.ErrGRPCNoLeader, rpctypes.ErrGRPCNoLeader, nil}, nil, 3},
		"none has":                     {"/etcdserverpb.KV/Range", nil, rpctypes.ErrGRPCNoLeader, leaderTries},
		"it may have been carried out": {"/etcdserverpb.KV/Txn", []error{rpctypes.ErrGRPCTimeoutDueToLeaderFail}, rpctypes.ErrGRPCTimeoutDueToLeaderFail, 1},
		"something else is wrong":      {"/etcdserverpb.KV/Txn", []error{other}, other, 1},
		"it asks the member itself":    {"/etcdserverpb.Maintenance/Status", []error{rpctypes.ErrGRPCNoLeader}, rpctypes.ErrGRPCNoLeader, 1},
	} {
		t.Run(name, func(t *testing.T) {
			calls := 0
			err := withLeader(t.Context(), c.method, nil, nil, nil, func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				calls++
				md, _ := metadata.FromOutgoingContext(ctx)
				if asked := len(md.Get(rpctypes.MetadataRequireLeaderKey)) > 0; asked != (c.method != "/etcdserverpb.Maintenance/Status") {
					t.Errorf("a leader is asked for: %v", asked)
				}
				if c.answers == nil {
					return rpctypes.ErrGRPCNoLeader
				}
				return c.answers[calls-1]
			})
			if !errors.Is(err, c.want) || calls != c.calls {
				t.Errorf("%v after %d calls, want %v after %d", err, calls, c.want, c.calls)
			}
		})
	}
}
