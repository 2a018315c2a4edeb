package rpc

import (
	"errors"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// wantError fails unless err has the code and the words; code 0: no error.
func wantError(t *testing.T, err error, code connect.Code, says string) {
	t.Helper()
	if code == 0 {
		if err != nil {
			t.Errorf("got %v", err)
		}
		return
	}
	var coded *connect.Error
	if !errors.As(err, &coded) || coded.Code() != code || !strings.Contains(coded.Message(), says) {
		t.Errorf("got %v, want %v with %q", err, code, says)
		return
	}
	if strings.Contains(coded.Message(), "\n") {
		t.Errorf("more than one line: %q", coded.Message())
	}
}

func TestCheckName(t *testing.T) {
	for name, good := range map[string]bool{
		"a": true, "web-1": true, "0": true, strings.Repeat("x", 63): true,
		"": false, "-a": false, "a-": false, "Web": false, "a.b": false, "a/b": false, "..": false,
		"ä": false, "a b": false, "a\n": false, strings.Repeat("x", 64): false,
	} {
		var code connect.Code
		if !good {
			code = connect.CodeInvalidArgument
		}
		wantError(t, checkName("machine", name), code, "machine name")
	}
}

func TestCheckVolumeSize(t *testing.T) {
	image := func(size uint64) origin { return origin{what: "image debian", size: size} }
	for name, c := range map[string]struct {
		size  uint64
		image origin
		want  uint64
		says  string
	}{
		"one MiB":               {size: mib, want: mib},
		"nothing":               {says: "give a size"},
		"odd":                   {size: mib + 512, says: "multiple of 1 MiB"},
		"too large":             {size: 65 << 40, says: "more than a volume can have"},
		"the image's":           {image: image(3 * mib), want: 3 * mib},
		"the image's, odd":      {image: image(3*mib - 512), want: 3 * mib},
		"larger than the image": {size: 5 * mib, image: image(3 * mib), want: 5 * mib},
		"smaller than it":       {size: 2 * mib, image: image(3 * mib), says: "at least 3.0 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := checkVolumeSize("v", c.size, c.image)
			if c.says != "" {
				wantError(t, err, connect.CodeInvalidArgument, c.says)
			} else if err != nil || got != c.want {
				t.Errorf("got %d, %v, want %d", got, err, c.want)
			}
		})
	}
}

func TestCheckMachine(t *testing.T) {
	good := func() *argonv1.CreateMachineRequest {
		return &argonv1.CreateMachineRequest{Name: "web", Image: "debian"}
	}
	req := good()
	wantError(t, checkMachine(req), 0, "")
	if req.GetCpus() != 1 || req.GetMemoryBytes() != 512*mib || req.GetAcceleration() != "auto" || req.GetStopTimeoutSeconds() != 60 {
		t.Errorf("what was left open became %v", req)
	}
	for says, change := range map[string]func(*argonv1.CreateMachineRequest){
		"machine name":            func(r *argonv1.CreateMachineRequest) { r.Name = "Web" },
		"CPUs":                    func(r *argonv1.CreateMachineRequest) { r.Cpus = 1000 },
		"multiple of 1 MiB":       func(r *argonv1.CreateMachineRequest) { r.MemoryBytes = 20*mib + 1 },
		"of memory":               func(r *argonv1.CreateMachineRequest) { r.MemoryBytes = mib },
		"acceleration":            func(r *argonv1.CreateMachineRequest) { r.Acceleration = "xen" },
		"stop timeout":            func(r *argonv1.CreateMachineRequest) { r.StopTimeoutSeconds = 100000 },
		"give an image":           func(r *argonv1.CreateMachineRequest) { r.Image = "" },
		"17 disks":                func(r *argonv1.CreateMachineRequest) { r.Volumes = make([]string, 16) },
		"9 networks":              func(r *argonv1.CreateMachineRequest) { r.Networks = 9 },
		"use bios or uefi":        func(r *argonv1.CreateMachineRequest) { r.Firmware = "coreboot" },
		"no public SSH key":       func(r *argonv1.CreateMachineRequest) { r.FirstBoot = &argonv1.FirstBoot{SshKeys: []string{"x"}} },
		"given twice":             func(r *argonv1.CreateMachineRequest) { r.Image, r.Volumes = "", []string{"a", "a"} },
		"go with an image":        func(r *argonv1.CreateMachineRequest) { r.Image, r.Volumes, r.DiskBytes = "", []string{"a"}, mib },
		"disks: at most":          func(r *argonv1.CreateMachineRequest) { r.Volumes = make([]string, 17) },
		"port 0":                  func(r *argonv1.CreateMachineRequest) { r.Ports = ports(0, 80) },
		"port 65536":              func(r *argonv1.CreateMachineRequest) { r.Ports = ports(80, 65536) },
		"published twice":         func(r *argonv1.CreateMachineRequest) { r.Ports = append(ports(80, 80), ports(80, 81)...) },
		"published ports: at mos": func(r *argonv1.CreateMachineRequest) { r.Ports = make([]*argonv1.PublishedPort, 65) },
	} {
		t.Run(says, func(t *testing.T) {
			r := good()
			change(r)
			wantError(t, checkMachine(r), connect.CodeInvalidArgument, says)
		})
	}
}

func ports(cluster, guest uint32) []*argonv1.PublishedPort {
	return []*argonv1.PublishedPort{{ClusterPort: cluster, GuestPort: guest}}
}

func TestFreePorts(t *testing.T) {
	st := &catalog.State{
		Servers:  map[string]*argonv1.Server{"S": {Meta: &argonv1.Meta{Name: "a"}, ApiPort: 7440, DataPort: 7441, PeerPort: 7442, EtcdPort: 7443}},
		Machines: map[string]*argonv1.Machine{"M": {Meta: &argonv1.Meta{Name: "db"}, Ports: ports(5432, 5432)}},
	}
	wantError(t, freePorts(st, "web", ports(80, 80)), 0, "")
	wantError(t, freePorts(st, "web", ports(5432, 80)), connect.CodeFailedPrecondition, "published by machine db")
	wantError(t, freePorts(st, "web", ports(7441, 80)), connect.CodeFailedPrecondition, "server a for volume data")
}

func TestMayRemoveServer(t *testing.T) {
	base := func() *catalog.State {
		return &catalog.State{
			Servers: map[string]*argonv1.Server{
				"A": {Meta: &argonv1.Meta{Id: "A", Name: "a"}}, "B": {Meta: &argonv1.Meta{Id: "B", Name: "b"}},
			},
			Leases:   map[string]*argonv1.Lease{"B": {}},
			Machines: map[string]*argonv1.Machine{},
			Volumes:  map[string]*argonv1.Volume{},
			Images:   map[string]*argonv1.Image{},
		}
	}
	alive := func(st *catalog.State) { st.Leases["A"] = &argonv1.Lease{} }
	machine := func(st *catalog.State) {
		st.Machines["M"] = &argonv1.Machine{Meta: &argonv1.Meta{Name: "web"}, ServerId: "A"}
	}
	sole := func(st *catalog.State) {
		st.Volumes["V"] = &argonv1.Volume{Meta: &argonv1.Meta{Name: "data"}, Replicas: []*argonv1.Replica{
			{Id: 1, ServerId: "A", State: inSync}, {Id: 2, ServerId: "B", State: outOfSync},
		}}
	}
	both := func(st *catalog.State) { sole(st); st.Volumes["V"].Replicas[1].State = inSync }
	// The other replica in sync is on a server that was removed a moment ago.
	gone := func(st *catalog.State) { both(st); st.Volumes["V"].Replicas[1].ServerId = "X" }
	image := func(st *catalog.State) {
		st.Images["I"] = &argonv1.Image{Meta: &argonv1.Meta{Name: "debian"}, Copies: []*argonv1.ImageCopy{
			{ServerId: "A", Ready: true}, {ServerId: "B"}, {ServerId: "X", Ready: true},
		}}
	}
	copied := func(st *catalog.State) { image(st); st.Images["I"].Copies[1].Ready = true }
	last := func(st *catalog.State) { delete(st.Servers, "B") }
	type changes []func(*catalog.State)
	for name, c := range map[string]struct {
		changes changes
		force   bool
		says    string
	}{
		"lost, nothing on it":         {},
		"alive, nothing on it":        {changes: changes{alive}},
		"alive, another has the data": {changes: changes{alive, both}, says: "server drain a --evacuate"},
		"lost, another has the data":  {changes: changes{both}},
		"runs a machine":              {changes: changes{alive, machine}, says: "server drain a"},
		"a machine is lost with it":   {changes: changes{machine}, says: "runs machine web"},
		"has the only replica":        {changes: changes{alive, sole}, says: "only replica in sync of volume data"},
		"lost with the only replica":  {changes: changes{sole}, says: "--force"},
		"the others are removed":      {changes: changes{gone}, says: "--force"},
		"has the only copy":           {changes: changes{alive, image}, says: "only copy of image debian: `argon server drain a --evacuate`"},
		"lost with the only copy":     {changes: changes{image}, says: "only copy of image debian: start it"},
		"another has a copy":          {changes: changes{alive, copied}},
		"forced, lost":                {changes: changes{machine, sole}, force: true},
		"forced, alive":               {changes: changes{alive}, force: true, says: "is alive"},
		"the last one":                {changes: changes{last}, force: true, says: "last one"},
	} {
		t.Run(name, func(t *testing.T) {
			st := base()
			for _, change := range c.changes {
				change(st)
			}
			var code connect.Code
			if c.says != "" {
				code = connect.CodeFailedPrecondition
			}
			wantError(t, mayRemove(st, st.Servers["A"], c.force), code, c.says)
		})
	}
}

func TestCheckSettings(t *testing.T) {
	wantError(t, checkSettings(nil), 0, "")
	wantError(t, checkSettings(&argonv1.Settings{LeaseSeconds: 2, ReplicaGraceSeconds: 5, VoterGraceSeconds: 5}), 0, "")
	wantError(t, checkSettings(&argonv1.Settings{LeaseSeconds: 1}), connect.CodeInvalidArgument, "lease")
	wantError(t, checkSettings(&argonv1.Settings{VoterGraceSeconds: 1 << 31}), connect.CodeInvalidArgument, "voter grace")
}

func TestPromotable(t *testing.T) {
	base := func() (*catalog.State, *argonv1.PromoteReplicaRequest) {
		return &catalog.State{
			Servers: map[string]*argonv1.Server{"A": {Meta: &argonv1.Meta{Id: "A", Name: "a"}}, "B": {Meta: &argonv1.Meta{Id: "B", Name: "b"}}},
			Leases:  map[string]*argonv1.Lease{"A": {}},
			Volumes: map[string]*argonv1.Volume{"V": {
				Meta:       &argonv1.Meta{Id: "V", Name: "data"},
				Attachment: &argonv1.Attachment{ServerId: "A"},
				Replicas:   []*argonv1.Replica{{Id: 1, ServerId: "A", State: outOfSync}, {Id: 2, ServerId: "B", State: inSync}},
			}},
			VolumeStatus: map[string]*argonv1.VolumeStatus{},
		}, &argonv1.PromoteReplicaRequest{Volume: "data", Server: "a", AcceptLoss: true}
	}
	for says, c := range map[string]struct {
		code   connect.Code
		change func(*catalog.State, *argonv1.PromoteReplicaRequest)
	}{
		"":                    {0, func(*catalog.State, *argonv1.PromoteReplicaRequest) {}},
		`volume "x" does not`: {connect.CodeNotFound, func(_ *catalog.State, r *argonv1.PromoteReplicaRequest) { r.Volume = "x" }},
		`server "x" does not`: {connect.CodeNotFound, func(_ *catalog.State, r *argonv1.PromoteReplicaRequest) { r.Server = "x" }},
		"--accept-loss":       {connect.CodeFailedPrecondition, func(_ *catalog.State, r *argonv1.PromoteReplicaRequest) { r.AcceptLoss = false }},
		"being removed":       {connect.CodeFailedPrecondition, func(st *catalog.State, _ *argonv1.PromoteReplicaRequest) { st.Volumes["V"].Removing = true }},
		"no replica on server a": {connect.CodeFailedPrecondition, func(st *catalog.State, _ *argonv1.PromoteReplicaRequest) {
			st.Volumes["V"].Replicas[0].State = creating
		}},
		"being served": {connect.CodeFailedPrecondition, func(st *catalog.State, _ *argonv1.PromoteReplicaRequest) {
			st.VolumeStatus["V"] = &argonv1.VolumeStatus{Condition: "serving"}
		}},
	} {
		t.Run(says, func(t *testing.T) {
			st, req := base()
			c.change(st, req)
			v, r, err := promotable(st, req)
			wantError(t, err, c.code, says)
			if err == nil && (v != st.Volumes["V"] || r.GetId() != 1) {
				t.Errorf("chose %v of %v", r, v)
			}
		})
	}
}

func TestWhatIsLost(t *testing.T) {
	v := &argonv1.Volume{Epoch: 5}
	r := &argonv1.Replica{State: inSync, Incarnation: 7}
	for says, c := range map[string]struct {
		r     *argonv1.Replica
		facts ReplicaFacts
	}{
		"nothing":            {r, ReplicaFacts{Incarnation: 7, Sealed: 5}},
		"not flushed":        {r, ReplicaFacts{Incarnation: 8, Sealed: 5}},
		"everything written": {&argonv1.Replica{State: outOfSync, Reason: "its disk failed"}, ReplicaFacts{Incarnation: 7, Sealed: 5}},
	} {
		if got := whatIsLost(v, c.r, c.facts); !strings.Contains(got, says) {
			t.Errorf("got %q, want %q", got, says)
		}
	}
	if got := whatIsLost(v, proto.CloneOf(r), ReplicaFacts{Incarnation: 7, Sealed: 9}); strings.Contains(got, "nothing") {
		t.Errorf("a catalog that is behind: %q", got)
	}
}

func TestMayDrain(t *testing.T) {
	const room = 100 << 30
	for name, c := range map[string]struct {
		change   func(st *catalog.State)
		evacuate bool
		says     string
	}{
		"nothing on it": {func(*catalog.State) {}, true, ""},
		"it keeps the only replica in sync, and there is room": {func(st *catalog.State) {
			st.Volumes["V"].Replicas = st.Volumes["V"].Replicas[:1]
		}, true, ""},
		"it keeps the only replica in sync, and there is no room": {func(st *catalog.State) {
			st.Volumes["V"].Replicas = st.Volumes["V"].Replicas[:1]
			st.Servers["B"].Used = &argonv1.Resources{DiskBytes: room}
		}, true, "only replica in sync of volume data, and no other server has room"},
		"the same, but replicas stay": {func(st *catalog.State) {
			st.Volumes["V"].Replicas = st.Volumes["V"].Replicas[:1]
			st.Servers["B"].Used = &argonv1.Resources{DiskBytes: room}
		}, false, ""},
		"the other replica is being copied to": {func(st *catalog.State) {
			st.Volumes["V"].Replicas[1].State = outOfSync
			st.Servers["B"].Used = &argonv1.Resources{DiskBytes: room}
		}, true, ""},
		"the other replica's server is down": {func(st *catalog.State) {
			st.Volumes["V"].Replicas[1].State = outOfSync
			delete(st.Leases, "B")
		}, true, "only replica in sync of volume data"},
		"the other one is drained": {func(st *catalog.State) { st.Servers["B"].Drain = &argonv1.Drain{} }, true, "the last one that takes"},
		"it is a witness":          {func(st *catalog.State) { st.Servers["A"].Witness = true }, true, "is a witness"},
	} {
		t.Run(name, func(t *testing.T) {
			st := &catalog.State{
				Servers: map[string]*argonv1.Server{},
				Leases:  map[string]*argonv1.Lease{"A": {}, "B": {}},
				Volumes: map[string]*argonv1.Volume{"V": {
					Meta: &argonv1.Meta{Id: "V", Name: "data"}, SizeBytes: 1 << 30, ReplicasWanted: 2, Epoch: 3,
					Attachment: &argonv1.Attachment{ServerId: "B"},
					Replicas:   []*argonv1.Replica{{Id: 1, ServerId: "A", State: inSync}, {Id: 2, ServerId: "B", State: inSync}},
				}},
			}
			for _, id := range []string{"A", "B"} {
				st.Servers[id] = &argonv1.Server{
					Meta: &argonv1.Meta{Id: id, Name: strings.ToLower(id)}, Capacity: &argonv1.Resources{Cpus: 4, MemoryBytes: 8 << 30, DiskBytes: room},
				}
			}
			c.change(st)
			next := proto.CloneOf(st.Servers["A"])
			next.Drain = &argonv1.Drain{Evacuate: c.evacuate}
			var code connect.Code
			if c.says != "" {
				code = connect.CodeFailedPrecondition
			}
			wantError(t, mayDrain(st, next), code, c.says)
		})
	}
}
