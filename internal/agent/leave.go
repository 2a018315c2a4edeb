package agent

import (
	"context"
	"maps"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// This file shuts down what runs here when the server stops.

// shutDownPoll is how often it is looked whether guests have ended.
const shutDownPoll = 50 * time.Millisecond

// ShutDown stops every guest here through the guest, as an order to stop its
// machine would, and starts none any more. It returns when none is left, or with
// ctx. What is wanted of the machines does not change: they start again, here or
// elsewhere. Run must be running; there is no way back.
func (a *Agent) ShutDown(ctx context.Context) {
	a.mu.Lock()
	a.leaving = true
	a.mu.Unlock()
	tick := time.NewTicker(shutDownPoll)
	defer tick.Stop()
	for {
		a.nudge()
		guests, err := a.Monitor.List(ctx)
		if err == nil && len(guests) == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// withNobodyHere is the catalog as if each machine here had the order to leave:
// its guest is stopped, and none is started.
func withNobodyHere(st *catalog.State, serverID string) *catalog.State {
	next := *st
	next.Machines = maps.Clone(st.Machines)
	for id, m := range st.Machines {
		if m.GetServerId() == serverID && m.GetMigration() == nil {
			m = proto.CloneOf(m)
			m.Move = &argonv1.Move{FromServerId: serverID, Placement: m.GetPlacement()}
			next.Machines[id] = m
		}
	}
	return &next
}
