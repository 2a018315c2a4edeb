package rpc

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image/seed"
)

func TestFirstBoot(t *testing.T) {
	w := newWorld(t)
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(2*mib))
	w.must(err)
	boot := &argonv1.FirstBoot{Revision: 77, User: "alice", PasswordHash: "$6$a$b", UserData: []byte("#!/bin/sh\n"), NetworkConfig: []byte("version: 2\n")}
	res, err := call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Image: "debian", FirstBoot: boot, Firmware: "uefi", Networks: 2})
	w.must(err)
	record := func() *argonv1.Machine {
		t.Helper()
		st, err := w.parts.fresh(t.Context())
		w.must(err)
		m, _ := byName(st.Machines, "web")
		return m
	}
	m, err := w.parts.Store.Whole(t.Context(), record())
	w.must(err)
	if b := m.GetFirstBoot(); b.GetRevision() != 1 || b.GetPasswordHash() != "$6$a$b" || !bytes.Equal(b.GetUserData(), boot.GetUserData()) {
		t.Errorf("recorded: %v", b)
	}
	if n := m.GetNetworks(); m.GetFirmware() != "uefi" || len(n) != 2 || n[0].GetMac() == n[1].GetMac() || !strings.HasPrefix(n[0].GetMac(), "52:54:00:") {
		t.Errorf("recorded: %v, %v", m.GetFirmware(), m.GetNetworks())
	}
	list, err := call(t, w.machines.ListMachines, &argonv1.ListMachinesRequest{})
	w.must(err)
	for _, shown := range []*argonv1.Machine{res.GetMachine().GetMachine(), list.GetMachines()[0].GetMachine()} {
		if b := shown.GetFirstBoot(); b.GetUser() != "alice" || b.GetPasswordHash() != "" || b.GetUserData() != nil || b.GetNetworkConfig() != nil || b.GetContentId() != "" {
			t.Errorf("shown: %v", b)
		}
	}
	set := func(b *argonv1.FirstBoot, revision uint32) {
		t.Helper()
		_, err := call(t, w.machines.SetFirstBoot, &argonv1.SetFirstBootRequest{Name: "web", FirstBoot: b})
		w.must(err)
		if got := record().GetFirstBoot().GetRevision(); got != revision {
			t.Errorf("revision %d, want %d", got, revision)
		}
	}
	set(boot, 1) // the same again
	set(&argonv1.FirstBoot{User: "bob"}, 2)
	// What the catalog keeps can't be had by naming it.
	set(&argonv1.FirstBoot{User: "bob", ContentId: m.GetFirstBoot().GetContentId()}, 2)
	set(nil, 0)

	large := &argonv1.FirstBoot{UserData: make([]byte, seed.MaxBytes+1)}
	_, err = call(t, w.machines.SetFirstBoot, &argonv1.SetFirstBootRequest{Name: "web", FirstBoot: large})
	wantError(t, err, connect.CodeInvalidArgument, "at most 65536")
	_, err = call(t, w.machines.SetFirstBoot, &argonv1.SetFirstBootRequest{Name: "none"})
	wantError(t, err, connect.CodeNotFound, "none")
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "x", Image: "debian", FirstBoot: large})
	wantError(t, err, connect.CodeInvalidArgument, "at most 65536")
}

// A machine can have a disk from an image and volumes behind it.
func TestSeveralDisks(t *testing.T) {
	w := newWorld(t)
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(2*mib))
	w.must(err)
	w.agents()
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	res, err := call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Image: "debian", Volumes: []string{"data"}})
	w.must(err)
	if got := strings.Join(res.GetMachine().GetVolumeNames(), " "); got != "web data" {
		t.Errorf("its disks are %s", got)
	}
}

// What an image says of its machine is a default, and nothing more.
func TestHints(t *testing.T) {
	for name, c := range map[string]struct {
		hints *argonv1.MachineHints
		req   *argonv1.CreateMachineRequest
		cpus  uint32
		mib   uint64
	}{
		"none":          {nil, &argonv1.CreateMachineRequest{}, 0, 0},
		"some":          {&argonv1.MachineHints{Cpus: 3, MemoryBytes: 1536 * mib}, &argonv1.CreateMachineRequest{}, 3, 1536},
		"others wanted": {&argonv1.MachineHints{Cpus: 3, MemoryBytes: 1536 * mib}, &argonv1.CreateMachineRequest{Cpus: 1, MemoryBytes: mib}, 1, 1},
		"odd":           {&argonv1.MachineHints{Cpus: 100000, MemoryBytes: 100*mib + 5}, &argonv1.CreateMachineRequest{}, maxCPUs, 100},
		"impossible":    {&argonv1.MachineHints{MemoryBytes: 1 << 60}, &argonv1.CreateMachineRequest{}, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			applyHints(c.req, c.hints)
			if c.req.GetCpus() != c.cpus || c.req.GetMemoryBytes() != c.mib*mib {
				t.Errorf("got %d processors, %d bytes", c.req.GetCpus(), c.req.GetMemoryBytes())
			}
		})
	}
}

// The state that a handler works with has everything.
func TestOnlyViewsAreWithoutSecrets(t *testing.T) {
	m := &argonv1.Machine{Meta: &argonv1.Meta{Id: "M"}, FirstBoot: &argonv1.FirstBoot{PasswordHash: "$6$a$b"}}
	_ = machineView(&catalog.State{}, m)
	if m.GetFirstBoot().GetPasswordHash() == "" {
		t.Error("the record itself was changed")
	}
}

// A machine may come with its hardware addresses; nobody gets another one's.
func TestHardwareAddresses(t *testing.T) {
	w := newWorld(t)
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(2*mib))
	w.must(err)
	create := func(name string, networks uint32, macs ...string) ([]*argonv1.NetworkInterface, error) {
		res, err := call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: name, Image: "debian", Networks: networks, Macs: macs})
		return res.GetMachine().GetMachine().GetNetworks(), err
	}
	got, err := create("a", 3, "00:50:56:AA:BB:CC", "")
	w.must(err)
	if len(got) != 3 || got[0].GetMac() != "00:50:56:aa:bb:cc" || got[1].GetMac() == "" || got[1].GetMac() == got[2].GetMac() {
		t.Errorf("got %v", got)
	}
	for _, c := range []struct {
		networks uint32
		macs     []string
		code     connect.Code
		says     string
	}{
		{0, []string{"00:50:56:aa:bb:cc"}, connect.CodeFailedPrecondition, "machine a has the hardware address"},
		{1, []string{"", ""}, connect.CodeInvalidArgument, "2 hardware addresses for 1"},
		{0, []string{"01:50:56:aa:bb:cc"}, connect.CodeInvalidArgument, "not the hardware address of a network card"},
		{0, []string{"nonsense"}, connect.CodeInvalidArgument, "not the hardware address"},
		{0, []string{"00:50:56:00:00:01", "00-50-56-00-00-01"}, connect.CodeInvalidArgument, "given twice"},
	} {
		_, err := create("b", c.networks, c.macs...)
		wantError(t, err, c.code, c.says)
	}
	st, err := w.parts.fresh(t.Context())
	w.must(err)
	free, warnings := keepFreeMACs(st, []string{"00:50:56:aa:bb:cc", "00:50:56:00:00:01"})
	if !slices.Equal(free, []string{"", "00:50:56:00:00:01"}) || len(warnings) != 1 {
		t.Errorf("of an import: %q, %q", free, warnings)
	}
}
