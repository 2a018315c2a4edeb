package agent

import (
	"fmt"
	"slices"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/fake"
)

// What a guest's agent says is in the machine's record while the guest runs, and
// a guest that was left frozen is thawed by the next daemon.
func TestGuestAgent(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	said := func(want string) {
		t.Helper()
		w.until("the record says "+want, func(st *catalog.State) bool {
			g := st.Machines["m"].GetStatus().GetGuest()
			return fmt.Sprint(g.GetHostname(), g.GetOs(), g.GetAddresses()) == want
		})
	}
	guest := w.hosts["a"].guest()
	guest.Say(&hypervisor.Info{Hostname: "web", OS: "Debian", Addresses: []string{"10.0.2.15"}})
	said("webDebian[10.0.2.15]")
	guest.Say(&hypervisor.Info{Hostname: "web", OS: "Debian", Addresses: []string{"10.0.2.16"}})
	said("webDebian[10.0.2.16]")

	if err := guest.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.hosts["a"].crash()
	w.hosts["a"].start()
	w.untilHosts("the guest is thawed", func(h *host) bool { return !h.guest().Frozen() })
	said("webDebian[10.0.2.16]")

	guest.Say(nil)
	said("[]")
	guest.Say(&hypervisor.Info{Hostname: "web"})
	said("web[]")
	w.want(wantStopped)
	w.until("stopped", func(st *catalog.State) bool { return st.Machines["m"].GetStatus().GetState() == stateStopped })
	said("[]")
}

// A guest that stood still, with its memory in a checkpoint or on the way to another
// server, gets its clock set; where it can't be after a long time, that is told.
func TestClockIsSet(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	w.runs(0)
	id := w.checkpoint(manual)
	w.until("taken", func(st *catalog.State) bool { return st.Checkpoints[id].GetState() == cpReady })
	here := func() *fake.Guest { return w.hosts[w.view.State().Machines["m"].GetServerId()].guest() }
	goesOn := func(agent *hypervisor.Info) {
		t.Helper()
		w.want(wantStopped)
		w.until("stopped", atRest(stateStopped))
		w.atWake = func(g *fake.Guest) { g.Say(agent) }
		w.wakeFrom(id)
		w.runs(0)
	}
	set := func(h *host) bool { return h.guest() == nil || h.guest().ClockSet() > 0 }

	goesOn(&hypervisor.Info{Hostname: "web"})
	w.untilHosts("its clock is set", set)
	w.tells("machine-clock-set")

	to := map[string]string{"a": "b", "b": "a"}[w.view.State().Machines["m"].GetServerId()]
	if r := w.ended(w.migrate(to)); r.GetFailure() != "" {
		t.Fatal(r)
	}
	w.runs(0)
	here().Say(&hypervisor.Info{Hostname: "web"})
	w.untilHosts("its clock is set there", set)

	goesOn(nil)
	w.tells("machine-clock-behind")
}

// What waits for the next start is not given to a guest that goes to another server:
// it would not take the memory. Ports are published and taken away while it runs.
func TestChangedWhileItRuns(t *testing.T) {
	w := newWorld(t, "a", "b")
	w.create(2, "a", "b")
	from := w.runs(0).GetServerId()
	change := func(change func(*argonv1.Machine)) {
		t.Helper()
		if _, err := w.store.Machines.Update(t.Context(), "m", func(m *argonv1.Machine) error { change(m); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	publishes := func(want ...int) {
		t.Helper()
		w.untilHosts(fmt.Sprint("published: ", want), func(h *host) bool {
			if h.guest() == nil {
				return true
			}
			var got []int
			for _, p := range h.guest().Ports() {
				got = append(got, p.GuestPort)
			}
			return slices.Equal(got, want)
		})
	}
	change(func(m *argonv1.Machine) {
		m.Cpus, m.MemoryBytes, m.FirstBoot = 4, 2*gib, &argonv1.FirstBoot{Revision: 1}
		m.Ports = []*argonv1.PublishedPort{{ClusterPort: 8080, GuestPort: 80}, {ClusterPort: 8022, GuestPort: 22}}
	})
	publishes(80, 22)
	to := map[string]string{"a": "b", "b": "a"}[from]
	if r := w.ended(w.migrate(to)); r.GetFailure() != "" {
		t.Fatal(r)
	}
	w.runs(0)
	if s := w.hosts[to].guest().Spec(); s.CPUs != 1 || s.MemoryBytes != gib || s.Seed != "" {
		t.Errorf("the guest there is made of %+v", s)
	}
	change(func(m *argonv1.Machine) { m.Ports = m.GetPorts()[:1] })
	publishes(80)
	w.want(wantStopped)
	w.until("stopped", atRest(stateStopped))
	w.want(wantRunning)
	m := w.runs(0)
	if s := w.hosts[m.GetServerId()].guest().Spec(); s.CPUs != 4 || s.MemoryBytes != 2*gib || s.Seed == "" {
		t.Errorf("its next guest is made of %+v", s)
	}
}
