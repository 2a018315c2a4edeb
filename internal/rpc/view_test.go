package rpc

import (
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

func servers(alive ...string) *catalog.State {
	st := &catalog.State{
		Servers: map[string]*argonv1.Server{}, Leases: map[string]*argonv1.Lease{},
		Images: map[string]*argonv1.Image{}, Volumes: map[string]*argonv1.Volume{}, Machines: map[string]*argonv1.Machine{},
	}
	for _, id := range []string{"a", "b", "c"} {
		st.Servers[id] = &argonv1.Server{Meta: &argonv1.Meta{Id: id, Name: id}, VoterRole: argonv1.VoterRole_VOTER_ROLE_VOTER}
	}
	for _, id := range alive {
		st.Leases[id] = &argonv1.Lease{}
	}
	return st
}

func TestVolumeHealth(t *testing.T) {
	replica := func(server string, state argonv1.ReplicaState) *argonv1.Replica {
		return &argonv1.Replica{ServerId: server, State: state}
	}
	type replicas = []*argonv1.Replica
	for name, c := range map[string]struct {
		alive    []string
		volume   *argonv1.Volume
		health   string
		contains string
	}{
		"healthy":           {[]string{"a", "b"}, &argonv1.Volume{Replicas: replicas{replica("a", inSync), replica("b", inSync)}}, "healthy", ""},
		"being made":        {[]string{"a", "b"}, &argonv1.Volume{Replicas: replicas{replica("a", creating)}}, "creating", "made on a"},
		"nowhere":           {[]string{"a"}, &argonv1.Volume{}, "creating", "add servers"},
		"image gone":        {[]string{"a"}, &argonv1.Volume{Base: &argonv1.Base{ImageId: "I"}}, "creating", "image is gone"},
		"one server down":   {[]string{"a"}, &argonv1.Volume{Replicas: replicas{replica("a", inSync), replica("b", inSync)}}, "degraded", "start server b"},
		"being copied":      {[]string{"a", "b"}, &argonv1.Volume{Replicas: replicas{replica("a", inSync), replica("b", outOfSync)}}, "degraded", "copied to b"},
		"behind and down":   {[]string{"a"}, &argonv1.Volume{Replicas: replicas{replica("a", inSync), replica("b", outOfSync)}}, "degraded", "start server b"},
		"too few":           {[]string{"a"}, &argonv1.Volume{Replicas: replicas{replica("a", inSync)}}, "degraded", "add servers"},
		"all in sync away":  {[]string{"c"}, &argonv1.Volume{Replicas: replicas{replica("a", inSync), replica("c", outOfSync)}}, "unavailable", "start that server"},
		"none in sync":      {[]string{"c"}, &argonv1.Volume{Epoch: 1, Replicas: replicas{replica("c", outOfSync)}}, "unavailable", "promote"},
		"removing":          {[]string{"a"}, &argonv1.Volume{Removing: true, Replicas: replicas{replica("a", removing)}}, "removing", ""},
		"removing, waiting": {nil, &argonv1.Volume{Removing: true, Replicas: replicas{replica("a", removing)}}, "removing", "once a is back"},
	} {
		t.Run(name, func(t *testing.T) {
			c.volume.Meta, c.volume.ReplicasWanted = &argonv1.Meta{Name: "v"}, 2
			health, advice := volumeHealth(servers(c.alive...), c.volume)
			if health != c.health || !strings.Contains(advice, c.contains) || (c.contains == "") != (advice == "") {
				t.Errorf("got %q, %q, want %q, %q", health, advice, c.health, c.contains)
			}
		})
	}
}

func TestWarnings(t *testing.T) {
	two := servers("a", "b")
	delete(two.Servers, "c")
	two.Servers["b"].VoterRole = argonv1.VoterRole_VOTER_ROLE_CLIENT
	witness := servers("a", "b", "c")
	witness.Servers["b"].Witness, witness.Servers["c"].Witness = true, true
	growing := servers("a", "b", "c")
	growing.Servers["c"].VoterRole = argonv1.VoterRole_VOTER_ROLE_LEARNER
	single := servers("a", "b", "c")
	single.Volumes["V"] = &argonv1.Volume{
		Meta: &argonv1.Meta{Name: "v"}, ReplicasWanted: 1,
		Replicas: []*argonv1.Replica{{ServerId: "b", State: inSync}},
	}
	slow := servers("a", "b", "c")
	slow.Servers["b"].AccelerationDetail, slow.Servers["c"].ClosedNetwork = "/dev/kvm is not there", "argon is not root"
	filled := servers("a", "b", "c")
	filled.Servers["b"].DirectoryProblem = "the file system of /d is full"
	bad := servers("a", "b", "c")
	bad.Servers["b"].Disks = []*argonv1.Disk{{Path: "/volumes", Problem: "it burns"}}
	bad.Volumes["V"] = &argonv1.Volume{
		Meta: &argonv1.Meta{Name: "v"}, ReplicasWanted: 2,
		Replicas: []*argonv1.Replica{{ServerId: "a", State: inSync}, {ServerId: "b", State: inSync}},
	}
	for name, c := range map[string]struct {
		st   *catalog.State
		want []string
	}{
		"a bad disk":          {bad, []string{"the disk at /volumes on server b is not used: it burns", "volume v is degraded: mend the disk of b"}},
		"a full disk":         {filled, []string{"on server b the file system of /d is full"}},
		"no KVM, no ways out": {slow, []string{"server b has no KVM: its machines are emulated, slowly: /dev/kvm is not there", "server c open no connections"}},
		"all is well":         {servers("a", "b", "c"), nil},
		"two servers":         {two, []string{"the loss of server a stops the cluster"}},
		"one is down":         {servers("a", "b"), []string{"server c is down"}},
		"one host":            {witness, []string{"only one server can run machines"}},
		"still growing":       {growing, []string{"only 2 of 3 servers vote"}},
		"one replica":         {single, []string{"lost with server b"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := warnings(c.st)
			if len(got) != len(c.want) {
				t.Fatalf("got %q", got)
			}
			for i, w := range c.want {
				if !strings.Contains(got[i], w) {
					t.Errorf("got %q, want %q", got[i], w)
				}
			}
		})
	}
}

func TestGone(t *testing.T) {
	st := servers("a")
	st.Volumes["half"] = &argonv1.Volume{Replicas: []*argonv1.Replica{{ServerId: "a", State: removing}, {ServerId: "b", State: removing}}}
	st.Volumes["rest"] = &argonv1.Volume{Replicas: []*argonv1.Replica{{ServerId: "b", State: removing}}}
	st.Volumes["new"] = &argonv1.Volume{Replicas: []*argonv1.Replica{{ServerId: "b", State: inSync}}}
	st.Volumes["empty"] = &argonv1.Volume{}
	for id, want := range map[string]bool{"none": true, "half": false, "rest": true, "new": false, "empty": false} {
		if got := gone(st, id); got != want {
			t.Errorf("%s: got %v", id, got)
		}
	}
}

func TestCatalogWarnings(t *testing.T) {
	for _, c := range []struct {
		load *argonv1.CatalogLoad
		want string
	}{
		{nil, ""}, // no voter answered
		{&argonv1.CatalogLoad{UsedBytes: 499 * mib, QuotaBytes: 1000 * mib}, ""},
		{&argonv1.CatalogLoad{UsedBytes: 500 * mib, QuotaBytes: 1000 * mib}, "500 MiB of 1000 MiB, and takes nothing new from nine tenths on"},
		{&argonv1.CatalogLoad{UsedBytes: 910 * mib, QuotaBytes: 1000 * mib, Full: true}, "910 MiB of 1000 MiB and takes nothing new: remove"},
	} {
		got := strings.Join(catalogWarnings(c.load), "; ")
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%v: %q, want %q", c.load, got, c.want)
		}
	}
}
