package agent

import (
	"context"
	"errors"
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
				to := "c"
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
