package agent

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// migrate gives the order to move m to a server, as the API does.
func (w *world) migrate(to string) (id string) {
	w.t.Helper()
	m, err := w.store.Machines.Update(w.t.Context(), "m", func(m *argonv1.Machine) error {
		m.Migration = &argonv1.Migration{
			Id: catalog.NewID(), ToServerId: to, Placement: placement.NextPlacement(m), Phase: preparing,
			Since: timestamppb.Now(), Deadline: timestamppb.New(time.Now().Add(time.Hour)),
		}
		m.LastPlacement = m.GetMigration().GetPlacement()
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return m.GetMigration().GetId()
}

// ended waits until a migration is over, and until one guest runs: where the
// record says.
func (w *world) ended(id string) *argonv1.MigrationReport {
	w.t.Helper()
	st := w.until("ended", func(st *catalog.State) bool {
		m := st.Machines["m"]
		return m.GetMigration().GetId() != id && m.GetLastMigration().GetId() == id
	})
	w.oneRuns()
	return st.Machines["m"].GetLastMigration()
}

// oneRuns waits until there is one guest, and it runs, where the record says.
func (w *world) oneRuns() {
	w.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		m := w.runs(0)
		h := w.hosts[m.GetServerId()]
		if w.guests() == 1 && h.guest() != nil && h.guest().ID() == GuestID("m", m.GetPlacement()) {
			if s, _ := h.guest().Status(w.t.Context()); s.State == hypervisor.Running {
				break
			}
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("it does not come to one guest: %d, machine %v", w.guests(), m)
		}
		time.Sleep(time.Millisecond)
	}
	if wrong := w.census.Wrong(); len(wrong) > 0 {
		w.t.Fatal(wrong)
	}
}

func TestMigrationThereAndBack(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	at := w.runs(0).GetServerId()
	first := w.hosts[at].guest().PID()
	for _, to := range []string{"c", at, "c"} {
		if r := w.ended(w.migrate(to)); r.GetFailure() != "" || r.GetToServerId() != to {
			t.Fatalf("the way to %s: %v", to, r)
		}
		m := w.runs(0)
		if m.GetServerId() != to || m.GetStatus().GetStarts() != 1 {
			t.Errorf("it is on %s after %d starts", m.GetServerId(), m.GetStatus().GetStarts())
		}
		w.until("attached there", func(st *catalog.State) bool { return st.Volumes["v"].GetAttachment().GetServerId() == to })
	}
	if w.hosts["c"].guest().PID() == first {
		t.Error("the guest's process did not change")
	}
	w.tells("machine-migrated")
}

// At each step of a guest's way each of what takes part fails. Never do two
// guests run, and in the end one does.
func TestMigrationFailsAtEachStep(t *testing.T) {
	broken := errors.New("broken")
	for _, step := range []string{"send", "finish", "finished"} {
		for _, fault := range []struct {
			name string
			do   func(w *world, from, to *host) error
			// moves: the machine may be elsewhere in the end.
			moves bool
		}{
			{name: "the transfer breaks", do: func(*world, *host, *host) error { return broken }},
			{name: "the guest that waits dies", do: func(_ *world, _, to *host) error { to.monitor.KillAll(); return broken }},
			{name: "the guest dies", moves: true, do: func(_ *world, from, _ *host) error { from.monitor.KillAll(); return broken }},
			{name: "it is cancelled", do: func(w *world, _, _ *host) error {
				return w.update(func(m *argonv1.Machine) { m.Migration.Cancel = true })
			}},
			{name: "the order goes", do: func(w *world, _, _ *host) error {
				return w.update(func(m *argonv1.Machine) {
					m.LastMigration = &argonv1.MigrationReport{Id: m.GetMigration().GetId(), Failure: "somebody took it"}
					m.Migration = nil
				})
			}},
			{name: "the other server dies", do: func(_ *world, _, to *host) error { to.kill(); return nil }},
			{name: "the daemon ends", do: func(_ *world, from, _ *host) error {
				go func() {
					from.end()
					from.start()
				}()
				return nil
			}, moves: true},
			{name: "the other daemon ends", moves: true, do: func(_ *world, _, to *host) error {
				to.end()
				to.start()
				return nil
			}},
		} {
			t.Run(step+"/"+fault.name, func(t *testing.T) {
				w := newWorld(t, "a", "b", "c")
				w.create(2, "a", "b")
				from := w.runs(0).GetServerId()
				to, first := "c", w.hosts[from].guest().PID()
				w.setTransfer(func(_ context.Context, at string) error {
					if at != step {
						return nil
					}
					w.setTransfer(nil)
					return fault.do(w, w.hosts[from], w.hosts[to])
				})
				r := w.ended(w.migrate(to))
				if now := w.runs(0).GetServerId(); !fault.moves && now != from {
					t.Errorf("it is on %s, was on %s: %v", now, from, r)
				}
				if !fault.moves && w.hosts[from].guest().PID() != first {
					t.Errorf("it was started again: %v", r)
				}
			})
		}
	}
}

func (w *world) setTransfer(f func(context.Context, string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.transfer = f
}

func (w *world) update(change func(*argonv1.Machine)) error {
	_, err := w.store.Machines.Update(context.Background(), "m", func(m *argonv1.Machine) error {
		if m.GetMigration() == nil {
			return catalog.ErrUnchanged
		}
		change(m)
		return nil
	})
	return err
}

// A server dies at each step, with its daemon in the middle of it: the machine is
// started elsewhere, and what waited for its state goes.
func TestServerDiesWhileItSends(t *testing.T) {
	for _, step := range []string{"send", "finish", "finished"} {
		t.Run(step, func(t *testing.T) {
			w := newWorld(t, "a", "b", "c")
			w.create(2, "a", "b")
			m := w.runs(0)
			from, came, died := w.hosts[m.GetServerId()], make(chan struct{}), make(chan struct{})
			w.setTransfer(func(ctx context.Context, at string) error {
				if at != step {
					return nil
				}
				close(came)
				<-ctx.Done() // of the daemon that ends
				return ctx.Err()
			})
			w.migrate("c")
			go func() {
				defer close(died)
				<-came
				from.kill()
			}()
			<-died
			w.setTransfer(nil)
			w.until("elsewhere", func(st *catalog.State) bool { return st.Machines["m"].GetServerId() != from.id })
			w.oneRuns()
		})
	}
}

// Somebody wants the machine stopped while it is on its way.
func TestStopWhileItIsSent(t *testing.T) {
	for _, step := range []string{"send", "finish", "finished"} {
		t.Run(step, func(t *testing.T) {
			w := newWorld(t, "a", "b", "c")
			w.create(2, "a", "b")
			w.runs(0)
			w.setTransfer(func(_ context.Context, at string) error {
				if at == step {
					w.want(wantStopped)
				}
				return nil
			})
			w.migrate("c")
			w.until("stopped", func(st *catalog.State) bool {
				m := st.Machines["m"]
				return m.GetStatus().GetState() == stateStopped && m.GetServerId() == "" && m.GetMigration() == nil
			})
			w.untilHosts("without a guest", func(h *host) bool { return h.guest() == nil })
			if wrong := w.census.Wrong(); len(wrong) > 0 {
				t.Error(wrong)
			}
		})
	}
}

// The server that it is to go to can't run it.
func TestMigrationIsRefusedThere(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	from := w.runs(0).GetServerId()
	w.hosts["c"].monitor.Fail(errors.New("no room"))
	if r := w.ended(w.migrate("c")); r.GetFailure() != "server c can't run it: no room" {
		t.Errorf("got %v", r)
	}
	if now := w.runs(0).GetServerId(); now != from {
		t.Errorf("it is on %s, was on %s", now, from)
	}
	w.tells("machine-migration-failed")
}

// A migration is given up while a disk is being let go of: the guest goes on, and
// is not started again.
func TestGivenUpWhileDiskIsDetached(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	m := w.runs(0)
	from := w.hosts[m.GetServerId()]
	first, hold := from.guest().PID(), &held{began: make(chan struct{}), goOn: make(chan struct{})}
	volumes := from.agent.Volumes.(*fakeVolumes)
	volumes.holdOver.Store(hold)
	id := w.migrate("c")
	<-hold.began
	volumes.holdOver.Store(nil)
	if err := w.update(func(m *argonv1.Machine) { m.Migration.Cancel = true }); err != nil {
		t.Fatal(err)
	}
	w.until("given up", func(st *catalog.State) bool { return st.Machines["m"].GetLastMigration().GetId() == id })
	passes := 0
	w.untilHosts("through some passes", func(h *host) bool {
		passes++
		return h != from || passes > 5
	})
	close(hold.goOn)
	w.until("attached again", func(st *catalog.State) bool { return st.Volumes["v"].GetAttachment().GetServerId() == from.id })
	w.oneRuns()
	if now := from.guest().PID(); now != first || w.runs(0).GetStatus().GetStarts() != 1 {
		t.Errorf("it was started again: process %d, was %d", now, first)
	}
}

// The next order is there as soon as the last one is off the record, and before
// the guest is asked how it does: it is carried out.
func TestMigrationAfterFailure(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	from := w.runs(0).GetServerId()
	first := w.hosts[from].guest().PID()
	for _, h := range w.hosts {
		h.end()
		h.tick = time.Hour
		h.start()
	}
	for _, step := range []string{"send", "finish", "finished"} {
		w.setTransfer(func(_ context.Context, at string) error {
			if at != step {
				return nil
			}
			w.setTransfer(nil)
			return errors.New("broken")
		})
		id := w.migrate("c")
		st := w.until("given up", func(st *catalog.State) bool { return st.Machines["m"].GetLastMigration().GetId() == id })
		if r := st.Machines["m"].GetLastMigration(); r.GetFailure() == "" {
			t.Fatalf("it did not fail at %s: %v", step, r)
		}
		if r := w.ended(w.migrate("c")); r.GetFailure() != "" {
			t.Errorf("after a failure at %s: %v", step, r)
		}
		if r := w.ended(w.migrate(from)); r.GetFailure() != "" {
			t.Errorf("the way back: %v", r)
		}
	}
	if m := w.runs(0); m.GetStatus().GetStarts() != 1 || w.hosts[from].guest().PID() == first {
		t.Errorf("it was started %d times", m.GetStatus().GetStarts())
	}
}

// Servers whose machine monitors know different kinds of machine: a guest keeps
// the kind that it was started as, and stays where no other server knows that.
func TestMigrationKeepsTheKind(t *testing.T) {
	w := newWorld(t, "a", "b", "c", "d")
	w.hosts["c"].monitor.Know("fake-2", "fake-1")
	w.hosts["d"].monitor.Know("fake-2")
	w.create(2, "a", "b")
	from := w.runs(0).GetServerId()
	w.until("of a known kind", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetMachineType() == "fake-1" })
	if r := w.ended(w.migrate("d")); !strings.Contains(r.GetFailure(), `server d can't run it: unsupported machine type "fake-1"`) {
		t.Errorf("to a server that does not know its kind: %v", r)
	}
	for _, to := range []string{"c", from} {
		if r := w.ended(w.migrate(to)); r.GetFailure() != "" {
			t.Fatalf("the way to %s: %v", to, r)
		}
		if about, _ := w.hosts[to].guest().Platform(t.Context()); about.Machine != "fake-1" {
			t.Errorf("on %s it is a %s", to, about.Machine)
		}
	}
	// What is started anew is of the newest kind.
	w.want(wantStopped)
	w.until("stopped", func(st *catalog.State) bool { return st.Machines["m"].GetServerId() == "" })
	if kind := w.view.State().Machines["m"].GetStatus().GetMachineType(); kind != "" {
		t.Errorf("stopped, it is still a %s", kind)
	}
}

// The daemon that received a machine ends before it has written down that the
// machine goes on: the next one does.
func TestArrivalIsRecordedLater(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	w.runs(0)
	w.ended(w.migrate("c"))
	to := w.hosts["c"]
	w.until("recorded", func(st *catalog.State) bool { return st.Machines["m"].GetLastMigration().GetResumed() != nil })
	to.end()
	_, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
		m.LastMigration.Resumed = nil
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	to.start()
	w.until("recorded again", func(st *catalog.State) bool { return st.Machines["m"].GetLastMigration().GetResumed() != nil })
	w.oneRuns()
}

// It takes longer than it may.
func TestMigrationTakesTooLong(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	from := w.runs(0).GetServerId()
	first := w.hosts[from].guest().PID()
	w.setTransfer(func(ctx context.Context, at string) error {
		if at != "send" {
			return nil
		}
		// From now on it is too late.
		if err := w.update(func(m *argonv1.Machine) { m.Migration.Deadline = timestamppb.Now() }); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	})
	r := w.ended(w.migrate("c"))
	if !strings.Contains(r.GetFailure(), "it was not done after") || r.GetCancelled() {
		t.Errorf("got %v", r)
	}
	if now := w.runs(0).GetServerId(); now != from || w.hosts[from].guest().PID() != first {
		t.Errorf("it is on %s, was on %s", now, from)
	}
}

// The clock of who gives the order is hours behind the server's: it goes all the
// same.
func TestMigrationByAnotherClock(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	w.runs(0)
	hoursAgo := time.Now().Add(-3 * time.Hour)
	m, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error {
		placement.Migrate(m, catalog.NewID(), "c", hoursAgo, time.Hour)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if r := w.ended(m.GetMigration().GetId()); r.GetFailure() != "" {
		t.Errorf("got %v", r)
	}
}

// A replica is behind, and is being copied to, when the machine goes: it is copied
// to from there.
func TestMigrationWhileReplicaIsBehind(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	w.create(2, "a", "b")
	from := w.runs(0).GetServerId()
	behind := map[string]string{"a": "b", "b": "a"}[from]
	w.hosts[behind].kill()
	w.until("without it", func(st *catalog.State) bool { return !allInSync(st.Volumes["v"], 2) })
	if r := w.ended(w.migrate("c")); r.GetFailure() != "" {
		t.Fatalf("got %v", r)
	}
	w.hosts[behind].start()
	w.until("whole again", func(st *catalog.State) bool {
		v := st.Volumes["v"]
		return allInSync(v, 2) && v.GetAttachment().GetServerId() == "c"
	})
	if r := w.ended(w.migrate(behind)); r.GetFailure() != "" {
		t.Errorf("to the server that was behind: %v", r)
	}
}
