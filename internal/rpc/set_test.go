package rpc

import (
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestSetParts(t *testing.T) {
	w := newWorld(t)
	w.agents()
	for _, name := range []string{"root", "data"} {
		_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: name, SizeBytes: mib})
		w.must(err)
	}
	_, err := call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Volumes: []string{"root"}, Stopped: true, Ports: onePort(8080, 80)})
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "other", Volumes: []string{"data"}, Stopped: true, Ports: onePort(9090, 80)})
	w.must(err)
	set := func(req *argonv1.SetMachineRequest) (*argonv1.MachineView, error) {
		t.Helper()
		if req.Name == "" {
			req.Name = "web"
		}
		res, err := call(t, w.machines.SetMachine, req)
		return res.GetMachine(), err
	}
	refused := func(req *argonv1.SetMachineRequest, code connect.Code, says string) {
		t.Helper()
		_, err := set(req)
		wantError(t, err, code, says)
	}
	refused(&argonv1.SetMachineRequest{Publish: onePort(9090, 80)}, connect.CodeFailedPrecondition, "published by machine other")
	refused(&argonv1.SetMachineRequest{Publish: onePort(8080, 81)}, connect.CodeInvalidArgument, "published twice")
	refused(&argonv1.SetMachineRequest{Unpublish: []uint32{81}}, connect.CodeFailedPrecondition, "is not published")
	refused(&argonv1.SetMachineRequest{Attach: []string{"data"}}, connect.CodeFailedPrecondition, "`argon machine set other --detach data` sets it free")
	refused(&argonv1.SetMachineRequest{Attach: []string{"root"}}, connect.CodeInvalidArgument, "a disk of it already")
	refused(&argonv1.SetMachineRequest{Detach: []string{"root"}}, connect.CodeFailedPrecondition, "no disk left")
	refused(&argonv1.SetMachineRequest{Detach: []string{"nope"}}, connect.CodeFailedPrecondition, "is no disk of it")
	refused(&argonv1.SetMachineRequest{Boot: "data"}, connect.CodeFailedPrecondition, "is no disk of it")
	refused(&argonv1.SetMachineRequest{Networks: new(uint32)}, connect.CodeInvalidArgument, "network interfaces")
	refused(&argonv1.SetMachineRequest{Firmware: ptr("coreboot")}, connect.CodeInvalidArgument, "bios or uefi")
	refused(&argonv1.SetMachineRequest{NewName: "other"}, connect.CodeAlreadyExists, "exists already")
	refused(&argonv1.SetMachineRequest{NewName: "No!"}, connect.CodeInvalidArgument, "name")
	refused(&argonv1.SetMachineRequest{Labels: map[string]string{"a=b": "c"}}, connect.CodeInvalidArgument, "KEY=VALUE")

	_, err = set(&argonv1.SetMachineRequest{Name: "other", NewName: "third"})
	w.must(err)
	_, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "third"})
	w.must(err)
	v, err := set(&argonv1.SetMachineRequest{
		NewName: "other", Publish: onePort(8080, 443), Unpublish: []uint32{8080}, Attach: []string{"data"}, Boot: "data",
		Networks: ptr(uint32(2)), Firmware: ptr("uefi"), Labels: map[string]string{"env": "test", "owner": "me"},
	})
	w.must(err)
	m := v.GetMachine()
	if m.GetMeta().GetName() != "other" || len(m.GetPorts()) != 1 || m.GetPorts()[0].GetGuestPort() != 443 ||
		!slices.Equal(v.GetVolumeNames(), []string{"data", "root"}) || len(m.GetNetworks()) != 2 || m.GetFirmware() != "uefi" || m.GetMeta().GetLabels()["env"] != "test" {
		t.Errorf("it is %v", v)
	}
	mac := m.GetNetworks()[0].GetMac()
	v, err = set(&argonv1.SetMachineRequest{Name: "other", Networks: ptr(uint32(1)), RemoveLabels: []string{"env"}, Detach: []string{"data"}})
	w.must(err)
	if m := v.GetMachine(); m.GetNetworks()[0].GetMac() != mac || len(m.GetMeta().GetLabels()) != 1 || len(m.GetVolumeIds()) != 1 {
		t.Errorf("it is %v", v)
	}
	// What was its name is free again.
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Volumes: []string{"data"}, Stopped: true})
	w.must(err)
	_, err = call(t, w.machines.StartMachine, &argonv1.StartMachineRequest{Name: "web"})
	w.must(err)
	refused(&argonv1.SetMachineRequest{Firmware: ptr("uefi")}, connect.CodeFailedPrecondition, "argon machine stop web")
	refused(&argonv1.SetMachineRequest{Boot: "data"}, connect.CodeFailedPrecondition, "argon machine stop web")
	_, err = set(&argonv1.SetMachineRequest{Publish: onePort(1080, 80)})
	w.must(err)
}

// The guest of a machine that runs is to be given disks and cards, and to let go of
// others: those stay the machine's until it has.
func TestSetDevicesOfARunningMachine(t *testing.T) {
	w := newWorld(t)
	w.agents()
	for _, name := range []string{"root", "data", "more"} {
		_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: name, SizeBytes: mib})
		w.must(err)
	}
	for _, req := range []*argonv1.CreateMachineRequest{{Name: "web", Volumes: []string{"root", "data"}, Stopped: true}, {Name: "other", Volumes: []string{"more"}, Stopped: true}} {
		_, err := call(t, w.machines.CreateMachine, req)
		w.must(err)
	}
	st, err := w.parts.fresh(t.Context())
	w.must(err)
	web, _ := byName(st.Machines, "web")
	change := func(f func(*argonv1.Machine)) {
		t.Helper()
		_, err := w.store.Machines.Update(t.Context(), web.GetMeta().GetId(), func(m *argonv1.Machine) error {
			f(m)
			return nil
		})
		w.must(err)
	}
	change(func(m *argonv1.Machine) { // as an older server recorded it
		m.Wanted, m.ServerId, m.Placement, m.InForce = argonv1.Wanted_WANTED_RUNNING, "A", 1, &argonv1.Hardware{Cpus: m.GetCpus(), MemoryBytes: m.GetMemoryBytes()}
	})
	set := func(req *argonv1.SetMachineRequest) (*argonv1.MachineView, error) {
		req.Name = "web"
		res, err := call(t, w.machines.SetMachine, req)
		return res.GetMachine(), err
	}
	_, err = set(&argonv1.SetMachineRequest{Detach: []string{"root"}})
	wantError(t, err, connect.CodeFailedPrecondition, "it runs from volume root")
	_, err = set(&argonv1.SetMachineRequest{Attach: []string{"more"}})
	wantError(t, err, connect.CodeFailedPrecondition, "`argon machine set other --detach more`")
	_, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "other", KeepVolumes: true})
	w.must(err)
	for range 2 { // again is no error
		v, err := set(&argonv1.SetMachineRequest{Detach: []string{"data"}, Networks: ptr(uint32(2))})
		w.must(err)
		m := v.GetMachine()
		mac := m.GetNetworks()[1].GetMac()
		want := []string{"disk data stays until the guest lets go of it or stops", "the guest is being given network card " + mac}
		if !slices.Equal(v.GetChanging(), want) || len(m.GetVolumeIds()) != 2 || len(m.GetInForce().GetNetworks()) != 1 {
			t.Errorf("%q; it is %v", v.GetChanging(), m)
		}
	}
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "next", Volumes: []string{"data"}, Stopped: true})
	wantError(t, err, connect.CodeFailedPrecondition, "is to be let go of by the guest of machine web")
	v, err := set(&argonv1.SetMachineRequest{Attach: []string{"data", "more"}}) // after all
	w.must(err)
	if m := v.GetMachine(); len(m.GetDetaching()) > 0 || len(m.GetVolumeIds()) != 3 || len(m.GetInForce().GetDisks()) != 2 {
		t.Errorf("it is %v", m)
	}
	change(func(m *argonv1.Machine) { m.Migration = &argonv1.Migration{Id: "x", ToServerId: "B"} })
	_, err = set(&argonv1.SetMachineRequest{Detach: []string{"more"}})
	wantError(t, err, connect.CodeFailedPrecondition, "on its way")
	change(func(m *argonv1.Machine) { m.Migration, m.Networks = nil, nil })
	_, err = set(&argonv1.SetMachineRequest{Networks: ptr(uint32(2))})
	wantError(t, err, connect.CodeFailedPrecondition, "stop it first")
	change(func(m *argonv1.Machine) { m.Wanted = argonv1.Wanted_WANTED_STOPPED })
	_, err = set(&argonv1.SetMachineRequest{Detach: []string{"more"}})
	wantError(t, err, connect.CodeFailedPrecondition, "is stopping")
}

func ptr[T any](v T) *T { return &v }

func onePort(cluster, guest uint32) []*argonv1.PublishedPort {
	return []*argonv1.PublishedPort{{ClusterPort: cluster, GuestPort: guest}}
}

// A machine goes with the disks that were made with it, and leaves those that were
// not; a new one of its name is told what to do about them.
func TestVolumesMadeApart(t *testing.T) {
	w := newWorld(t)
	w.agents()
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(2*mib))
	w.must(err)
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	create := func(req *argonv1.CreateMachineRequest) error {
		req.Name, req.Stopped = "web", true
		_, err := call(t, w.machines.CreateMachine, req)
		return err
	}
	w.must(create(&argonv1.CreateMachineRequest{Image: "debian", Volumes: []string{"data"}}))
	res, err := call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "web"})
	w.must(err)
	st, err := w.parts.fresh(t.Context())
	w.must(err)
	if _, ok := byName(st.Volumes, "web"); ok || !slices.Equal(res.GetKeptVolumes(), []string{"data"}) {
		t.Errorf("kept: %v; its own disk is there: %v", res.GetKeptVolumes(), ok)
	}
	if v, ok := byName(st.Volumes, "data"); !ok || v.GetRemoving() {
		t.Error("a volume that was made apart went with the machine")
	}
	w.must(create(&argonv1.CreateMachineRequest{Image: "debian"}))
	_, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "web", KeepVolumes: true})
	w.must(err)
	wantError(t, create(&argonv1.CreateMachineRequest{Image: "debian"}), connect.CodeAlreadyExists, "use it with --volume web")
	w.must(create(&argonv1.CreateMachineRequest{Volumes: []string{"web"}}))
	res, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "web"})
	w.must(err)
	if !slices.Equal(res.GetKeptVolumes(), []string{"web"}) {
		t.Errorf("a volume that was kept once went with the next machine: %v", res.GetKeptVolumes())
	}
}

func TestRestart(t *testing.T) {
	w := newWorld(t)
	w.agents()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "v", SizeBytes: mib})
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Volumes: []string{"v"}, On: "b"})
	w.must(err)
	_, err = call(t, w.machines.RestartMachine, &argonv1.RestartMachineRequest{Name: "web"})
	wantError(t, err, connect.CodeFailedPrecondition, "argon machine start web")
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "big", Volumes: []string{"v"}, On: "nope"})
	if err == nil || !strings.Contains(err.Error(), "nope") && !strings.Contains(err.Error(), "volume v") {
		t.Errorf("got %v", err)
	}
	st, err := w.parts.fresh(t.Context())
	w.must(err)
	m, _ := byName(st.Machines, "web")
	if m.GetStartOn() != "B" {
		t.Errorf("it starts on %q", m.GetStartOn())
	}
	_, err = w.store.Machines.Update(t.Context(), m.GetMeta().GetId(), func(m *argonv1.Machine) error {
		m.ServerId, m.Placement = "A", 1
		return nil
	})
	w.must(err)
	for range 2 { // again is no error
		res, err := call(t, w.machines.RestartMachine, &argonv1.RestartMachineRequest{Name: "web", Force: true})
		w.must(err)
		if now := res.GetMachine().GetMachine(); !now.GetMove().GetRestart() || now.GetMove().GetPlacement() != 1 || !now.GetForceStop() {
			t.Errorf("it is %v", now)
		}
	}
	res, err := call(t, w.machines.ResetMachine, &argonv1.ResetMachineRequest{Name: "web"})
	w.must(err)
	if w.parts.Guests.(*fakeGuests).resets != 1 || res.GetMachine() == nil {
		t.Error("nobody pressed the button")
	}
}

// What a server can't open, and what waits for the next start, is shown.
func TestShownOfMachine(t *testing.T) {
	st := servers("a", "b", "c")
	m := &argonv1.Machine{
		Meta: &argonv1.Meta{Id: "M", Name: "web"}, Cpus: 4, MemoryBytes: 512 * mib, ServerId: "a", Ports: onePort(8080, 80),
		InForce: &argonv1.Hardware{Cpus: 1, MemoryBytes: 512 * mib},
	}
	st.Machines = map[string]*argonv1.Machine{"M": m}
	st.Servers["b"].ClosedPorts = []*argonv1.ClosedPort{{Port: 8080, MachineId: "M", Reason: "address already in use"}, {Port: 99, MachineId: "M", Reason: "old"}}
	v := machineView(st, m)
	want := "port 8080 on server b: address already in use"
	if !slices.Equal(v.GetClosedPorts(), []string{want}) || !slices.Equal(v.GetNextStart(), []string{"4 CPUs instead of 1"}) {
		t.Errorf("closed: %q, next: %q", v.GetClosedPorts(), v.GetNextStart())
	}
	if !slices.Contains(warnings(st), "machine web can't be reached at "+want) {
		t.Errorf("warned: %q", warnings(st))
	}
	m.ServerId = ""
	if next := machineView(&catalog.State{Machines: st.Machines}, m).GetNextStart(); len(next) > 0 {
		t.Errorf("it does not run, and %q waits", next)
	}
}
