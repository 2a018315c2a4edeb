package rpc

import (
	"context"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// BackupCluster sends a copy of the catalog.
func (s clusterService) BackupCluster(ctx context.Context, _ *connect.Request[argonv1.BackupClusterRequest], to *connect.ServerStream[argonv1.BackupClusterResponse]) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	return p.Members.Backup(ctx, func(b []byte) error {
		return to.Send(&argonv1.BackupClusterResponse{Data: b})
	})
}
