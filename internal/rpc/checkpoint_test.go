package rpc

import (
	"context"
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// withRunning is a world with machine web, of two disks, running on server a.
// Its agents make replicas and take snapshots; what becomes of checkpoints is
// each test's to say.
func withRunning(t *testing.T) *world {
	t.Helper()
	w := withVolume(t, "root")
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Volumes: []string{"root", "data"}, MemoryBytes: 1 << 30})
	w.must(err)
	w.machine(func(m *argonv1.Machine) {
		m.ServerId, m.Placement = "A", 1
		m.Status = &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_RUNNING, ServerId: "A", Placement: 1}
	})
	return w
}

// machine changes the record of machine web behind the API's back.
func (w *world) machine(change func(*argonv1.Machine)) {
	w.t.Helper()
	m, err := w.store.Machines.ByName(w.t.Context(), "web")
	w.must(err)
	_, err = w.store.Machines.Update(w.t.Context(), m.GetMeta().GetId(), func(m *argonv1.Machine) error {
		change(m)
		return nil
	})
	w.must(err)
}

// checkpoint changes a checkpoint's record behind the API's back.
func (w *world) checkpoint(name string, change func(*argonv1.Checkpoint)) {
	w.t.Helper()
	c, err := w.store.Checkpoints.ByName(w.t.Context(), name)
	w.must(err)
	_, err = w.store.Checkpoints.Update(w.t.Context(), c.GetMeta().GetId(), func(c *argonv1.Checkpoint) error {
		change(c)
		return nil
	})
	w.must(err)
}

// saves takes each checkpoint that is wanted, as the machine's agent and the
// leader would, until the test ends.
func (w *world) saves() {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		for ctx.Err() == nil {
			changed := w.view.Changed()
			st := w.view.State()
			for id, c := range st.Checkpoints {
				if c.GetState() == cpWanted && settled(st, st.Volumes[c.GetMemoryVolumeId()]) {
					w.save(ctx, st, id)
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
	})
	w.t.Cleanup(func() { cancel(); done.Wait() })
}

// save makes one checkpoint whole; a conflict is seen again.
func (w *world) save(ctx context.Context, st *catalog.State, id string) {
	c := proto.CloneOf(st.Checkpoints[id])
	m := proto.CloneOf(st.Machines[c.GetMachineId()])
	c.State, c.ServerId, c.Placement, c.Machine = cpReady, m.GetServerId(), m.GetPlacement(), proto.CloneOf(m)
	txn := w.store.Txn()
	if c.GetPurpose() == argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND {
		m.Wake, m.ServerId = &argonv1.Wake{CheckpointId: id}, ""
		m.Status = &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_SUSPENDED}
		_ = txn.Put(m).Put(c).Commit(ctx)
		return
	}
	c.Snapshots = map[string]uint32{}
	for _, volume := range m.GetVolumeIds() {
		v := proto.CloneOf(st.Volumes[volume])
		v.NextSnapshotId = max(v.GetNextSnapshotId(), 1)
		s := &argonv1.Snapshot{Id: v.GetNextSnapshotId(), Name: "checkpoint-" + id, State: taken, SizeBytes: v.GetSizeBytes()}
		for _, r := range v.GetReplicas() {
			s.ReplicaIds = append(s.ReplicaIds, r.GetId())
		}
		v.NextSnapshotId++
		v.Snapshots, c.Snapshots[volume] = append(v.Snapshots, s), s.GetId()
		txn.Put(v)
	}
	_ = txn.Put(c).Commit(ctx)
}

// checkpointed is a world whose machine web has checkpoint then, and has stopped.
func checkpointed(t *testing.T) *world {
	t.Helper()
	w := withRunning(t)
	w.saves()
	_, err := call(t, w.machines.CheckpointMachine, &argonv1.CheckpointMachineRequest{Name: "web", Checkpoint: "then"})
	w.must(err)
	w.rests()
	return w
}

// rests makes machine web stop.
func (w *world) rests() {
	w.t.Helper()
	_, err := call(w.t, w.machines.StopMachine, &argonv1.StopMachineRequest{Name: "web"})
	w.must(err)
	w.machine(func(m *argonv1.Machine) {
		m.ServerId, m.Status = "", &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_STOPPED}
	})
}

// server changes a server's record.
func (w *world) server(id string, change func(*argonv1.Server)) {
	w.t.Helper()
	_, err := w.store.Servers.Update(w.t.Context(), id, func(s *argonv1.Server) error {
		change(s)
		return nil
	})
	w.must(err)
}

// kept is what must not change when a call is refused.
func (w *world) kept() []proto.Message {
	w.t.Helper()
	w.must(w.view.Sync(w.t.Context()))
	st := w.view.State()
	var all []proto.Message
	for _, m := range sorted(st.Machines) {
		all = append(all, m)
	}
	for _, v := range sorted(st.Volumes) {
		all = append(all, v)
	}
	for _, c := range sorted(st.Checkpoints) {
		all = append(all, c)
	}
	return all
}

func sameRecords(a, b []proto.Message) bool {
	return slices.EqualFunc(a, b, func(x, y proto.Message) bool { return proto.Equal(x, y) })
}

func (w *world) resumeFrom(checkpoint, server string) error {
	_, err := call(w.t, w.machines.ResumeMachine, &argonv1.ResumeMachineRequest{Name: "web", Checkpoint: checkpoint, Server: server})
	return err
}

func (w *world) clone(name string) error {
	_, err := call(w.t, w.machines.CloneMachine, &argonv1.CloneMachineRequest{Name: "web", Clone: name, Checkpoint: "then"})
	return err
}

// What a checkpoint is made of has gone: nothing goes on from it, and nothing
// changes.
func TestCheckpointWithoutItsParts(t *testing.T) {
	snapshot := func(change func(*argonv1.Volume, *argonv1.Snapshot)) func(w *world) {
		return func(w *world) { w.record("data", func(v *argonv1.Volume) { change(v, v.GetSnapshots()[0]) }) }
	}
	memory := func(change func(*argonv1.Volume)) func(w *world) {
		return func(w *world) {
			c, err := w.store.Checkpoints.ByName(w.t.Context(), "then")
			w.must(err)
			_, err = w.store.Volumes.Update(w.t.Context(), c.GetMemoryVolumeId(), func(v *argonv1.Volume) error {
				change(v)
				return nil
			})
			w.must(err)
		}
	}
	for says, change := range map[string]func(w *world){
		"the snapshot of its disk data is gone": snapshot(func(v *argonv1.Volume, _ *argonv1.Snapshot) { v.Snapshots = nil }),
		"snapshot of its disk data is gone":     snapshot(func(_ *argonv1.Volume, s *argonv1.Snapshot) { s.Removing = true }),
		"its disk": func(w *world) {
			v, err := w.store.Volumes.ByName(w.t.Context(), "data")
			w.must(err)
			w.must(w.store.Volumes.Delete(w.t.Context(), v))
		},
		"the volume with its memory has no replica in sync": memory(func(v *argonv1.Volume) {
			for _, r := range v.GetReplicas() {
				r.State = outOfSync
			}
		}),
		"the volume with its memory is in sync only on servers that are down": memory(func(v *argonv1.Volume) {
			v.Replicas = v.GetReplicas()[:1]
			v.Replicas[0].ServerId = "Z"
		}),
		"the volume with its memory is gone": func(w *world) {
			c, err := w.store.Checkpoints.ByName(w.t.Context(), "then")
			w.must(err)
			v, err := w.store.Volumes.Get(w.t.Context(), c.GetMemoryVolumeId())
			w.must(err)
			w.must(w.store.Volumes.Delete(w.t.Context(), v))
		},
	} {
		t.Run(says, func(t *testing.T) {
			w := checkpointed(t)
			change(w)
			before := w.kept()
			wantError(t, w.resumeFrom("then", ""), connect.CodeFailedPrecondition, says)
			wantError(t, w.clone("twin"), connect.CodeFailedPrecondition, says)
			if !sameRecords(before, w.kept()) {
				t.Error("something has changed")
			}
			view, err := call(t, w.checks.GetCheckpoint, &argonv1.GetCheckpointRequest{Name: "then"})
			if err != nil || view.GetCheckpoint().GetUnusable() == "" {
				t.Errorf("it is listed as %v, %v", view, err)
			}
		})
	}
}

// Servers on which a machine can't go on, from a checkpoint or from where it was
// suspended.
func TestResumeWhereItCantBe(t *testing.T) {
	full := func(w *world) {
		w.server("B", func(s *argonv1.Server) { s.Capacity.MemoryBytes = 1 << 30 })
	}
	for name, c := range map[string]struct {
		server string
		change func(w *world)
		code   connect.Code
		says   string
	}{
		"unknown": {"z", func(*world) {}, connect.CodeNotFound, `server "z" does not exist`},
		"full":    {"b", full, connect.CodeResourceExhausted, "on server b"},
		"drained": {"b", func(w *world) {
			w.server("B", func(s *argonv1.Server) { s.Drain = &argonv1.Drain{} })
		}, connect.CodeFailedPrecondition, "server b is drained"},
		"a witness": {"b", func(w *world) {
			w.server("B", func(s *argonv1.Server) { s.Witness = true })
		}, connect.CodeFailedPrecondition, "server b is a witness"},
		"down": {"c", func(w *world) {
			w.must(w.store.Servers.Create(w.t.Context(), &argonv1.Server{Meta: &argonv1.Meta{Id: "C", Name: "c"}}))
		}, connect.CodeFailedPrecondition, "server c is down"},
		"none has room": {"", func(w *world) {
			full(w)
			w.server("A", func(s *argonv1.Server) { s.Capacity.MemoryBytes = 1 << 30 })
		}, connect.CodeResourceExhausted, "memory free"},
	} {
		t.Run(name, func(t *testing.T) {
			w := checkpointed(t)
			c.change(w)
			before := w.kept()
			wantError(t, w.resumeFrom("then", c.server), c.code, c.says)
			if !sameRecords(before, w.kept()) {
				t.Error("something has changed")
			}
			// The same machine, suspended.
			w.machine(func(m *argonv1.Machine) {
				m.Wanted, m.Wake = suspended, &argonv1.Wake{CheckpointId: "x"}
			})
			before = w.kept()
			wantError(t, w.resumeFrom("", c.server), c.code, c.says)
			if !sameRecords(before, w.kept()) {
				t.Error("something of the suspended machine has changed")
			}
		})
	}
}

func TestCheckpointsAreRefused(t *testing.T) {
	w := checkpointed(t)
	take := func(name string) error {
		_, err := call(t, w.machines.CheckpointMachine, &argonv1.CheckpointMachineRequest{Name: "web", Checkpoint: name})
		return err
	}
	suspend := func() error {
		_, err := call(t, w.machines.SuspendMachine, &argonv1.SuspendMachineRequest{Name: "web"})
		return err
	}
	before := w.kept()
	wantError(t, take("later"), connect.CodeFailedPrecondition, "is stopped")
	wantError(t, suspend(), connect.CodeFailedPrecondition, "is stopped")
	wantError(t, w.clone("web"), connect.CodeAlreadyExists, `machine "web" exists already`)
	wantError(t, w.clone("data"), connect.CodeAlreadyExists, `volume "data" exists already`)
	wantError(t, w.clone("No"), connect.CodeInvalidArgument, "machine name")
	wantError(t, w.resumeFrom("none", ""), connect.CodeNotFound, `checkpoint "none"`)
	wantError(t, w.resumeFrom("", ""), connect.CodeFailedPrecondition, "is not suspended")
	if !sameRecords(before, w.kept()) {
		t.Error("something has changed")
	}
	for state, says := range map[argonv1.CheckpointState]string{
		cpTaking: "it is taking", cpFailed: "it is failed", cpRemoving: "it is removing",
	} {
		w.checkpoint("then", func(c *argonv1.Checkpoint) { c.State = state })
		wantError(t, w.resumeFrom("then", ""), connect.CodeFailedPrecondition, says)
		wantError(t, w.clone("twin"), connect.CodeFailedPrecondition, says)
	}
	w.checkpoint("then", func(c *argonv1.Checkpoint) { c.State = cpReady })

	w.machine(func(m *argonv1.Machine) {
		m.Wanted, m.ServerId = argonv1.Wanted_WANTED_RUNNING, "A"
		m.Status = &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_RUNNING, ServerId: "A", Placement: m.GetPlacement()}
	})
	before = w.kept()
	wantError(t, take("then"), connect.CodeAlreadyExists, `checkpoint "then" exists already`)
	wantError(t, take("Then"), connect.CodeInvalidArgument, "checkpoint name")
	wantError(t, w.resumeFrom("then", ""), connect.CodeFailedPrecondition, "stop it first")
	for _, id := range []string{"A", "B"} {
		w.server(id, func(s *argonv1.Server) { s.Used = &argonv1.Resources{DiskBytes: 99 << 30} })
	}
	wantError(t, take("later"), connect.CodeResourceExhausted, "no room for its memory")
	wantError(t, suspend(), connect.CodeResourceExhausted, "no room for its memory")
	if !sameRecords(before, w.kept()) {
		t.Error("something has changed")
	}
}

// Two operators act at once: one wins, the other is told.
func TestTwoAtOnce(t *testing.T) {
	take := func(w *world) error {
		_, err := call(w.t, w.machines.CheckpointMachine, &argonv1.CheckpointMachineRequest{Name: "web"})
		return err
	}
	suspend := func(w *world) error {
		_, err := call(w.t, w.machines.SuspendMachine, &argonv1.SuspendMachineRequest{Name: "web"})
		return err
	}
	for name, c := range map[string]struct {
		before func(t *testing.T) *world
		a, b   func(w *world) error
	}{
		"checkpoint and suspend": {withRunning, take, suspend},
		"checkpoint twice":       {withRunning, take, take},
		"suspend twice":          {withRunning, suspend, suspend},
		"resume twice": {
			func(t *testing.T) *world {
				w := withRunning(t)
				w.saves()
				w.must(suspend(w))
				return w
			},
			func(w *world) error { return w.resumeFrom("", "a") }, func(w *world) error { return w.resumeFrom("", "b") },
		},
		"resume from a checkpoint twice": {
			checkpointed,
			func(w *world) error { return w.resumeFrom("then", "a") }, func(w *world) error { return w.resumeFrom("then", "b") },
		},
		"resume from it and remove it": {
			checkpointed, func(w *world) error { return w.resumeFrom("then", "") },
			func(w *world) error {
				_, err := call(w.t, w.checks.RemoveCheckpoint, &argonv1.RemoveCheckpointRequest{Name: "then"})
				return err
			},
		},
		"clone it twice to one name": {
			checkpointed, func(w *world) error { return w.clone("twin") }, func(w *world) error { return w.clone("twin") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := c.before(t)
			told := make(chan error, 2)
			for _, call := range []func(w *world) error{c.a, c.b} {
				go func() { told <- call(w) }()
			}
			// Whoever won waits until the checkpoint is taken: the other one is
			// told before that.
			errs := []error{<-told}
			w.saves()
			errs = append(errs, <-told)
			won := 0
			for _, err := range errs {
				switch code := connect.CodeOf(err); {
				case err == nil:
					won++
				case code != connect.CodeFailedPrecondition && code != connect.CodeAlreadyExists && code != connect.CodeNotFound:
					t.Errorf("got %v", err)
				}
			}
			if won != 1 {
				t.Errorf("%d of 2 won: %v", won, errs)
			}
		})
	}
}

// What goes on from a checkpoint knows that it is another one than the one that
// went on before; a machine whose memory knows no such device gets none.
func TestGenerations(t *testing.T) {
	for name, old := range map[string]bool{"with the device": false, "made before there was one": true} {
		t.Run(name, func(t *testing.T) {
			w := withRunning(t)
			if old {
				w.machine(func(m *argonv1.Machine) { m.GenerationId = "" })
			}
			w.saves()
			_, err := call(t, w.machines.CheckpointMachine, &argonv1.CheckpointMachineRequest{Name: "web", Checkpoint: "then"})
			w.must(err)
			w.rests()
			w.must(w.clone("twin"))
			seen := map[string]bool{}
			generation := func(machine string) string {
				m, err := w.store.Machines.ByName(t.Context(), machine)
				w.must(err)
				return m.GetGenerationId()
			}
			for _, g := range []string{generation("web"), generation("twin"), func() string {
				w.must(w.resumeFrom("then", ""))
				return generation("web")
			}()} {
				if (g == "") != old || g != "" && seen[g] {
					t.Errorf("generation %q, after %v", g, seen)
				}
				seen[g] = true
			}
		})
	}
}
