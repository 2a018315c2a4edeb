package daemon

import (
	"context"
	"fmt"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/cluster"
	"github.com/argon-cluster/argon/internal/rpc"
)

// Introduce implements rpc.Local.
func (s *server) Introduce(who rpc.Caller, req *argonv1.IntroduceRequest) (*argonv1.IntroduceResponse, error) {
	if who.Kind != rpc.Server {
		return nil, fmt.Errorf("%s is no server", who.ID)
	}
	return s.member.Introduce(cluster.Identity{Kind: cluster.KindServer, ID: who.ID, Serial: who.Serial}, req)
}

// Meet implements rpc.Local.
func (s *server) Meet(ctx context.Context, addresses []string) ([]*argonv1.Whereabouts, error) {
	return s.member.Meet(ctx, addresses)
}

// Readdress implements rpc.Local: the next daemon, which follows at once, serves at
// the new address and tells the cluster.
func (s *server) Readdress(ctx context.Context, address string) error {
	switch {
	case address == s.Address:
		return nil
	case s.started != "":
		return fmt.Errorf("this server was started with --address %s, which counts: start it with --address %s, or without", s.started, address)
	}
	// Tried before anything is given up.
	ports, err := s.listenAt(ctx, address)
	if err != nil {
		return err
	}
	ports.close()
	if err := s.member.Readdress(address); err != nil {
		return err
	}
	s.Log.Info("this daemon ends for one at another address", "address", address)
	s.restart() // calls under way, this one too, are let finish
	return nil
}
