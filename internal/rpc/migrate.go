package rpc

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// MigrateMachine answers once the order is recorded: the two servers' agents
// carry it out.
func (s machineService) MigrateMachine(ctx context.Context, req *connect.Request[argonv1.MigrateMachineRequest]) (*connect.Response[argonv1.MigrateMachineResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	timeout := cmp.Or(time.Duration(req.Msg.GetTimeoutSeconds())*time.Second, placement.MigrationTime)
	view, err := s.wantWith(ctx, req.Msg.GetName(), func(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine) error {
		to, err := migrationTarget(st, m, req.Msg.GetToServer())
		if err != nil {
			return err
		}
		placement.Migrate(m, catalog.NewID(), to, p.Now(), timeout)
		// Two that go to one server at once meet at its record: there may be
		// room for one only.
		txn.Put(proto.CloneOf(st.Servers[to]))
		return nil
	})
	return answer(&argonv1.MigrateMachineResponse{Machine: view}, err)
}

// migrationTarget is the id of the server that a machine is to go to, or why it
// can't go.
func migrationTarget(st *catalog.State, m *argonv1.Machine, server string) (string, error) {
	name := m.GetMeta().GetName()
	if err := migratable(st, m); err != nil {
		return "", err
	}
	if server == "" {
		to, err := placement.PlaceElsewhere(st, m)
		if err != nil {
			return "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("machine %s: %w", name, err))
		}
		return to, nil
	}
	s, ok := byName(st.Servers, server)
	if !ok {
		return "", notFound("server", server)
	}
	if err := placement.CanReceive(st, m, s.GetMeta().GetId()); err != nil {
		return "", precondition("machine %s can't go to server %s: %v", name, server, err)
	}
	return s.GetMeta().GetId(), nil
}

// migratable refuses a machine that can't leave its server while it runs.
func migratable(st *catalog.State, m *argonv1.Machine) error {
	name, status := m.GetMeta().GetName(), m.GetStatus()
	switch mig := m.GetMigration(); {
	case mig != nil:
		return precondition("machine %s is being migrated to server %s already: wait, or end that with `argon machine migrate %s --cancel`",
			name, serverName(st, mig.GetToServerId()), name)
	case m.GetMove() != nil:
		return precondition("machine %s is leaving its server already", name)
	case m.GetWanted() != argonv1.Wanted_WANTED_RUNNING:
		return precondition("machine %s does not run: it goes to another server when it is started", name)
	case !placement.RunsNow(m):
		return precondition("machine %s is %s now, and can only be migrated while it runs", name, strings.ToLower(strings.TrimPrefix(status.GetState().String(), "MACHINE_STATE_")))
	case placement.BeingSaved(st, m) != nil:
		return precondition("machine %s: a checkpoint of it is being taken: wait until it is there", name)
	case !placement.Alive(st, m.GetServerId()):
		return precondition("machine %s: its server %s is down", name, serverName(st, m.GetServerId()))
	}
	return nil
}

// CancelMigration answers once it is recorded that a migration is to be given
// up. It may be over before that: then the machine has moved.
func (s machineService) CancelMigration(ctx context.Context, req *connect.Request[argonv1.CancelMigrationRequest]) (*connect.Response[argonv1.CancelMigrationResponse], error) {
	view, err := s.want(ctx, req.Msg.GetName(), func(st *catalog.State, m *argonv1.Machine) error {
		if m.GetMigration() == nil {
			return precondition("machine %s is not being migrated: it is on server %s", req.Msg.GetName(), serverName(st, m.GetServerId()))
		}
		m.Migration.Cancel = true
		return nil
	})
	return answer(&argonv1.CancelMigrationResponse{Machine: view}, err)
}
