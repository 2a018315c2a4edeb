package rpc

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// A copy has disks of its own, made of a snapshot of the other's, which goes unless
// they stay clones of it.
func TestCopyMachine(t *testing.T) {
	w := newWorld(t)
	w.agents()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "root", SizeBytes: mib})
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Volumes: []string{"root"}, Stopped: true, Cpus: 2, Ports: onePort(8080, 80)})
	w.must(err)
	duplicate := func(name, as string, linked bool) (*argonv1.CopyMachineResponse, error) {
		return call(t, w.machines.CopyMachine, &argonv1.CopyMachineRequest{Name: name, Copy: as, Linked: linked, Stopped: true})
	}
	_, err = duplicate("web", "web", false)
	wantError(t, err, connect.CodeAlreadyExists, "exists already")
	_, err = duplicate("nope", "x", false)
	wantError(t, err, connect.CodeNotFound, "nope")
	_, err = duplicate("web", "root", false)
	wantError(t, err, connect.CodeAlreadyExists, "as a disk of machine web")
	snapshots := func() (removing, kept int) {
		st, err := w.parts.fresh(t.Context())
		w.must(err)
		v, _ := byName(st.Volumes, "root")
		for _, s := range v.GetSnapshots() {
			if s.GetRemoving() {
				removing++
			} else {
				kept++
			}
		}
		return removing, kept
	}
	if removing, kept := snapshots(); removing+kept > 0 {
		t.Errorf("a copy that failed leaves %d snapshots", removing+kept)
	}
	for _, linked := range []bool{false, true} {
		name := map[bool]string{false: "whole", true: "linked"}[linked]
		res, err := duplicate("web", name, linked)
		w.must(err)
		m := res.GetMachine().GetMachine()
		if m.GetCpus() != 2 || len(m.GetPorts()) > 0 || strings.Join(res.GetMachine().GetVolumeNames(), " ") != name || len(res.GetNotes()) == 0 {
			t.Errorf("it is %v", res)
		}
		st, err := w.parts.fresh(t.Context())
		w.must(err)
		v, _ := byName(st.Volumes, name)
		if v.GetMadeFor() != m.GetMeta().GetId() || v.GetBase().GetVolumeId() == "" || v.GetBase().GetDetaching() == linked {
			t.Errorf("its disk is %v", v)
		}
	}
	if removing, kept := snapshots(); removing != 1 || kept != 1 {
		t.Errorf("%d snapshots go, %d stay, want one of each", removing, kept)
	}
}
