package agent

import (
	"fmt"
	"testing"

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
