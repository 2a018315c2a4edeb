package cluster

import (
	"context"
	"errors"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

const (
	// leaderTries is how often a call is made that comes to members without a
	// leader: often enough to come to each of five, whose turn it may not be.
	leaderTries = 10
	// leaderPause is between two rounds of them: an election may be under way.
	leaderPause = 50 * time.Millisecond
)

// withLeader has reads and writes carried out by a member that has a leader. One
// whose link to the leader is cut would keep them until their time is over; it
// refuses them instead, having done nothing, and the next one is asked, to which
// the link may be whole.
func withLeader(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if !strings.HasPrefix(method, "/etcdserverpb.KV/") {
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	ctx = clientv3.WithRequireLeader(ctx)
	for try := 1; ; try++ {
		err := invoke(ctx, method, req, reply, cc, opts...)
		if err == nil || !errors.Is(rpctypes.Error(err), rpctypes.ErrNoLeader) || try == leaderTries {
			return err
		}
		if try%2 == 0 && sleep(ctx, leaderPause) != nil {
			return err
		}
	}
}
