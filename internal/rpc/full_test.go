package rpc

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// TestFullCatalog: what makes it larger is refused, and says what to do; what
// makes room is done.
func TestFullCatalog(t *testing.T) {
	w := newWorld(t)
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(2*mib))
	w.must(err)
	w.agents()
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Image: "debian", Stopped: true})
	w.must(err)
	w.must(w.parts.Store.SetFull(t.Context(), true))
	const says = "the catalog is full: remove"
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "more", SizeBytes: mib})
	wantError(t, err, connect.CodeResourceExhausted, says)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "more", Image: "debian"})
	wantError(t, err, connect.CodeResourceExhausted, says)
	_, err = call(t, w.machines.SetFirstBoot, &argonv1.SetFirstBootRequest{Name: "web", FirstBoot: &argonv1.FirstBoot{UserData: []byte("#!/bin/sh\n")}})
	wantError(t, err, connect.CodeResourceExhausted, says)
	_, err = call(t, w.machines.SetFirstBoot, &argonv1.SetFirstBootRequest{Name: "web", FirstBoot: &argonv1.FirstBoot{PasswordHash: "$6$a$" + strings.Repeat("b", 80)}})
	wantError(t, err, connect.CodeResourceExhausted, says)
	status, err := call(t, w.cluster.Status, &argonv1.StatusRequest{})
	if err != nil || !status.GetCatalog().GetFull() || status.GetCatalog().GetQuotaBytes() != 1000 || !strings.Contains(status.GetWarnings()[0], "takes nothing new") {
		t.Errorf("status: %v, %v", status, err)
	}
	_, err = call(t, w.machines.StartMachine, &argonv1.StartMachineRequest{Name: "web"})
	w.must(err)
	_, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "web", Force: true})
	w.must(err)
	_, err = call(t, w.volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: "data"})
	w.must(err)
	w.must(w.parts.Store.SetFull(t.Context(), false))
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "more", SizeBytes: mib})
	w.must(err)
}
