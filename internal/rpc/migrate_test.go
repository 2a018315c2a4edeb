package rpc

import (
	"sync"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// runs records a machine that runs on server a, and changes it.
func (w *world) runs(name string, change ...func(*argonv1.Machine)) *argonv1.Machine {
	w.t.Helper()
	m := &argonv1.Machine{
		Meta: &argonv1.Meta{Id: catalog.NewID(), Name: name}, Cpus: 1, MemoryBytes: 4 << 30,
		Wanted: argonv1.Wanted_WANTED_RUNNING, ServerId: "A", Placement: 3,
		Status: &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_RUNNING, ServerId: "A", Placement: 3, Acceleration: "tcg"},
	}
	for _, c := range change {
		c(m)
	}
	w.must(w.store.Machines.Create(w.t.Context(), m))
	return m
}

func TestMigrate(t *testing.T) {
	w := newWorld(t)
	w.runs("web")
	res, err := call(t, w.machines.MigrateMachine, &argonv1.MigrateMachineRequest{Name: "web", TimeoutSeconds: 7})
	w.must(err)
	mig := res.GetMachine().GetMachine().GetMigration()
	if mig.GetToServerId() != "B" || mig.GetPlacement() != 4 || mig.GetDeadline().AsTime().Sub(mig.GetSince().AsTime()).Seconds() != 7 {
		t.Errorf("the order is %v", mig)
	}
	cancelled, err := call(t, w.machines.CancelMigration, &argonv1.CancelMigrationRequest{Name: "web"})
	if err != nil || !cancelled.GetMachine().GetMachine().GetMigration().GetCancel() {
		t.Errorf("cancelled: %v, %v", cancelled, err)
	}
}

// A machine that can't leave, or can't go there, stays, and whoever asked is told
// why.
func TestMigrationIsRefused(t *testing.T) {
	w := newWorld(t)
	w.must(w.store.Servers.Create(t.Context(), &argonv1.Server{
		Meta: &argonv1.Meta{Id: "D", Name: "down"}, Capacity: &argonv1.Resources{Cpus: 4, MemoryBytes: 8 << 30, DiskBytes: 1 << 40},
	}))
	for name, c := range map[string]struct {
		to     string
		change func(*argonv1.Machine)
		server func(*argonv1.Server) // b
		code   connect.Code
		says   string
	}{
		"an unknown machine":                 {change: func(m *argonv1.Machine) { m.Meta.Name = "other" }, code: connect.CodeNotFound, says: `"web"`},
		"an unknown server":                  {to: "z", code: connect.CodeNotFound, says: `"z"`},
		"the same server":                    {to: "a", code: connect.CodeFailedPrecondition, says: "it runs there already"},
		"a server that is down":              {to: "down", code: connect.CodeFailedPrecondition, says: "it is down"},
		"a witness":                          {to: "b", server: func(s *argonv1.Server) { s.Witness = true }, code: connect.CodeFailedPrecondition, says: "is a witness"},
		"a drained server":                   {to: "b", server: func(s *argonv1.Server) { s.Drain = &argonv1.Drain{} }, code: connect.CodeFailedPrecondition, says: "it is drained"},
		"none but a drained one":             {server: func(s *argonv1.Server) { s.Drain = &argonv1.Drain{} }, code: connect.CodeResourceExhausted, says: "it can go nowhere"},
		"a full server":                      {to: "b", server: func(s *argonv1.Server) { s.Capacity.MemoryBytes = 2 << 30 }, code: connect.CodeFailedPrecondition, says: "of memory free"},
		"full but for what running it takes": {to: "b", server: func(s *argonv1.Server) { s.Capacity.MemoryBytes = 41 << 30 / 9 }, code: connect.CodeFailedPrecondition, says: "what running it takes"},
		"none but a full one":                {server: func(s *argonv1.Server) { s.Capacity.MemoryBytes = 2 << 30 }, code: connect.CodeResourceExhausted, says: "memory free"},
		"too few processors":                 {to: "b", change: func(m *argonv1.Machine) { m.Cpus = 17 }, code: connect.CodeFailedPrecondition, says: "16 CPUs free"},
		"without KVM":                        {to: "b", change: func(m *argonv1.Machine) { m.Status.Acceleration = "kvm" }, code: connect.CodeFailedPrecondition, says: "runs on KVM"},
		"a stopped machine":                  {change: func(m *argonv1.Machine) { m.Wanted = argonv1.Wanted_WANTED_STOPPED }, code: connect.CodeFailedPrecondition, says: "does not run"},
		"a suspended machine":                {change: func(m *argonv1.Machine) { m.Wanted = argonv1.Wanted_WANTED_SUSPENDED }, code: connect.CodeFailedPrecondition, says: "does not run"},
		"one that is being removed":          {change: func(m *argonv1.Machine) { m.Wanted = argonv1.Wanted_WANTED_REMOVED }, code: connect.CodeFailedPrecondition, says: "being removed"},
		"one that starts":                    {change: func(m *argonv1.Machine) { m.Status.State = argonv1.MachineState_MACHINE_STATE_STARTING }, code: connect.CodeFailedPrecondition, says: "is starting now"},
		"one that was just placed anew":      {change: func(m *argonv1.Machine) { m.Placement = 4 }, code: connect.CodeFailedPrecondition, says: "only be migrated while it runs"},
		"one that leaves a drained one":      {change: func(m *argonv1.Machine) { m.Move = &argonv1.Move{FromServerId: "A", Placement: 3} }, code: connect.CodeFailedPrecondition, says: "leaving its server already"},
		"one whose server is down":           {change: func(m *argonv1.Machine) { m.ServerId = "D" }, code: connect.CodeFailedPrecondition, says: "is down"},
	} {
		t.Run(name, func(t *testing.T) {
			w.change("B", func(s *argonv1.Server) {
				s.Witness, s.Drain, s.Capacity.MemoryBytes = false, nil, 8<<30
				if c.server != nil {
					c.server(s)
				}
			})
			m := w.runs("web", func(m *argonv1.Machine) {
				if c.change != nil {
					c.change(m)
				}
			})
			_, err := call(t, w.machines.MigrateMachine, &argonv1.MigrateMachineRequest{Name: "web", ToServer: c.to})
			wantError(t, err, c.code, c.says)
			now, err := w.store.Machines.Get(t.Context(), m.GetMeta().GetId())
			w.must(err)
			if now.GetMigration() != nil || now.GetLastPlacement() != 0 {
				t.Errorf("the machine is now %v", now)
			}
			w.must(w.store.Machines.Delete(t.Context(), now))
		})
	}
}

func (w *world) change(serverID string, change func(*argonv1.Server)) {
	w.t.Helper()
	_, err := w.store.Servers.Update(w.t.Context(), serverID, func(s *argonv1.Server) error {
		change(s)
		return nil
	})
	w.must(err)
}

// A checkpoint is being taken of it: its memory can't go elsewhere meanwhile.
func TestMigrationWaitsForCheckpoint(t *testing.T) {
	w := newWorld(t)
	m := w.runs("web")
	w.must(w.store.Checkpoints.Create(t.Context(), &argonv1.Checkpoint{
		Meta: &argonv1.Meta{Id: catalog.NewID(), Name: "c"}, MachineId: m.GetMeta().GetId(), State: argonv1.CheckpointState_CHECKPOINT_STATE_TAKING,
	}))
	_, err := call(t, w.machines.MigrateMachine, &argonv1.MigrateMachineRequest{Name: "web"})
	wantError(t, err, connect.CodeFailedPrecondition, "a checkpoint of it is being taken")
}

// Several operators give orders at once. One wins, and the others are told.
func TestTwoMigrateAtOnce(t *testing.T) {
	w := newWorld(t)
	w.addServer("c")
	w.runs("web")
	failed := w.migrateAll([]*argonv1.MigrateMachineRequest{
		{Name: "web", ToServer: "b"}, {Name: "web", ToServer: "c"}, {Name: "web"}, {Name: "web", ToServer: "b"},
	})
	if len(failed) != 3 {
		t.Fatalf("%d of 4 orders were refused", len(failed))
	}
	for _, err := range failed {
		wantError(t, err, connect.CodeFailedPrecondition, "being migrated to server")
	}
	// The end of one that is under way, twice: that is what both want.
	for range 2 {
		_, err := call(t, w.machines.CancelMigration, &argonv1.CancelMigrationRequest{Name: "web"})
		wantError(t, err, 0, "")
	}
	w.runs("still")
	_, err := call(t, w.machines.CancelMigration, &argonv1.CancelMigrationRequest{Name: "still"})
	wantError(t, err, connect.CodeFailedPrecondition, "is not being migrated")
}

// Two machines are sent at once to a server that has room for one.
func TestTwoMigrateToOnePlace(t *testing.T) {
	w := newWorld(t)
	w.runs("web")
	w.runs("mail")
	failed := w.migrateAll([]*argonv1.MigrateMachineRequest{{Name: "web", ToServer: "b"}, {Name: "mail", ToServer: "b"}})
	if len(failed) != 1 {
		t.Fatalf("%d of 2 orders were refused", len(failed))
	}
	wantError(t, failed[0], connect.CodeFailedPrecondition, "of memory free")
}

// migrateAll gives orders at once, and returns why some were refused.
func (w *world) migrateAll(orders []*argonv1.MigrateMachineRequest) (failed []error) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, o := range orders {
		wg.Go(func() {
			if _, err := call(w.t, w.machines.MigrateMachine, o); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, err)
			}
		})
	}
	wg.Wait()
	return failed
}
