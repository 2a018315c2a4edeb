package agent

import (
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// threeServers is a cluster of the servers a, b and c; c has no lease. Volume
// v lies on a and b, and is at rest.
func threeServers() (*catalog.State, *argonv1.Volume) {
	st := &catalog.State{
		Servers:  map[string]*argonv1.Server{},
		Images:   map[string]*argonv1.Image{},
		Volumes:  map[string]*argonv1.Volume{},
		Machines: map[string]*argonv1.Machine{},
		Leases:   map[string]*argonv1.Lease{},
	}
	for _, id := range []string{"a", "b", "c"} {
		st.Servers[id] = &argonv1.Server{Meta: &argonv1.Meta{Id: id, Name: id}}
	}
	st.Leases["a"], st.Leases["b"] = &argonv1.Lease{}, &argonv1.Lease{}
	v := &argonv1.Volume{
		Meta: &argonv1.Meta{Id: "v", Name: "data"}, Epoch: 4, Clean: true,
		Replicas: []*argonv1.Replica{
			{Id: 1, ServerId: "b", State: argonv1.ReplicaState_REPLICA_STATE_IN_SYNC},
			{Id: 2, ServerId: "a", State: argonv1.ReplicaState_REPLICA_STATE_IN_SYNC},
		},
	}
	st.Volumes["v"] = v
	return st, v
}

func withDisk(m *argonv1.Machine) *argonv1.Machine {
	m.VolumeIds = []string{"v"}
	return m
}

func TestNextForVolume(t *testing.T) {
	forM := demand{use: forMachine, machineID: "m"}
	attachedElsewhere := func(server, machine string) func(*catalog.State, *argonv1.Volume) {
		return func(st *catalog.State, v *argonv1.Volume) {
			st.Machines["m"] = withDisk(placed(wantRunning))
			v.Attachment, v.Clean = &argonv1.Attachment{ServerId: server, MachineId: machine, Connected: machine == ""}, false
		}
	}
	tests := []struct {
		name   string
		change func(*catalog.State, *argonv1.Volume)
		seen   volumeSeen
		guests map[string]bool
		barred bool
		want   demand
		step   volumeStep
		why    string
	}{
		{name: "nobody wants it", change: func(*catalog.State, *argonv1.Volume) {}},
		{
			name: "its machine is placed here", want: forM, step: attach,
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantRunning)) },
		},
		{
			name: "not without a lease", want: forM, barred: true, why: "waits for its lease",
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantRunning)) },
		},
		{
			name:   "its machine is stopped",
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantStopped)) },
		},
		{
			name: "it is being removed, and an earlier run had it",
			change: func(_ *catalog.State, v *argonv1.Volume) {
				v.Removing, v.Attachment = true, &argonv1.Attachment{ServerId: "a"}
			},
			step: letGo,
		},
		{
			name: "it is being removed, and another server has it",
			change: func(_ *catalog.State, v *argonv1.Volume) {
				v.Removing, v.Attachment = true, &argonv1.Attachment{ServerId: "b"}
			},
		},
		{
			name: "its machine is stopping", want: demand{use: forMachine, machineID: "m", guestRuns: true}, step: attach,
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantStopped)) },
			guests: map[string]bool{"m": true},
		},
		{
			name:   "not for a guest that is killed",
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantRunning)) },
			guests: map[string]bool{"m": false},
		},
		{
			name: "a guest keeps it until it is gone", want: forM,
			change: func(*catalog.State, *argonv1.Volume) {},
			seen:   volumeSeen{attached: forM}, guests: map[string]bool{"m": false},
		},
		{
			name: "also without a lease", want: forM, barred: true,
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantRunning)) },
			seen:   volumeSeen{attached: forM}, guests: map[string]bool{"m": true},
		},
		{
			name: "the guest is gone, the machine stopped", step: detach,
			change: func(st *catalog.State, v *argonv1.Volume) {
				st.Machines["m"] = withDisk(placed(wantStopped))
				v.Attachment = &argonv1.Attachment{ServerId: "a", MachineId: "m"}
			},
			seen: volumeSeen{attached: forM},
		},
		{
			name: "over, the guest goes first", want: forM,
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantRunning)) },
			seen:   volumeSeen{attached: forM, over: true}, guests: map[string]bool{"m": true},
		},
		{
			name: "over", want: forM, step: drop,
			change: func(st *catalog.State, _ *argonv1.Volume) { st.Machines["m"] = withDisk(placed(wantRunning)) },
			seen:   volumeSeen{attached: forM, over: true},
		},
		{name: "taken from our own crashed run", want: forM, step: attach, change: attachedElsewhere("a", "m")},
		{name: "taken from a lost server", want: forM, step: attach, change: attachedElsewhere("c", "")},
		{name: "taken from where the machine was", want: forM, step: attach, change: attachedElsewhere("b", "m")},
		{name: "not from another's connection", want: forM, change: attachedElsewhere("b", ""), why: "volume data is attached on server b"},
		{name: "not from another machine", want: forM, change: attachedElsewhere("b", "x"), why: "volume data is attached on server b"},
		{
			name: "no replica in sync", want: forM, why: "no replica in sync",
			change: func(st *catalog.State, v *argonv1.Volume) {
				st.Machines["m"] = withDisk(placed(wantRunning))
				for _, r := range v.Replicas {
					r.State = argonv1.ReplicaState_REPLICA_STATE_CREATING
				}
			},
		},
		{
			name: "being removed", want: forM, why: "is being removed",
			change: func(st *catalog.State, v *argonv1.Volume) {
				st.Machines["m"] = withDisk(placed(wantRunning))
				v.Removing = true
			},
		},
		{
			name: "connected", want: demand{use: forConnection}, step: attach,
			change: func(*catalog.State, *argonv1.Volume) {}, seen: volumeSeen{connections: 1},
		},
		{
			name: "connected elsewhere", want: demand{use: forConnection}, why: "attached on server b",
			change: attachedNowhere(func(v *argonv1.Volume) { v.Attachment = &argonv1.Attachment{ServerId: "b", Connected: true} }),
			seen:   volumeSeen{connections: 1},
		},
		{
			name: "attached elsewhere for upkeep: it is asked for", want: demand{use: forConnection}, step: askFor,
			change: attachedNowhere(func(v *argonv1.Volume) { v.Attachment = &argonv1.Attachment{ServerId: "b"} }),
			seen:   volumeSeen{connections: 1},
		},
		{
			name: "attached for upkeep, wanted elsewhere", step: detach,
			change: attachedNowhere(func(v *argonv1.Volume) {
				v.Attachment, v.Clean = &argonv1.Attachment{ServerId: "a", WantedBy: "b"}, false
				v.Scrub = &argonv1.Scrub{Wanted: 1}
			}),
			seen: volumeSeen{attached: demand{use: forUpkeep}, ready: true},
		},
		{
			name: "the last user went", step: detach,
			change: attachedNowhere(func(v *argonv1.Volume) { v.Attachment = &argonv1.Attachment{ServerId: "a"} }),
			seen:   volumeSeen{attached: demand{use: forConnection}},
		},
		{
			name: "attached for upkeep, a user comes", want: demand{use: forConnection},
			change: attachedNowhere(func(v *argonv1.Volume) { v.Attachment = &argonv1.Attachment{ServerId: "a"} }),
			seen:   volumeSeen{attached: demand{use: forUpkeep}, connections: 1},
		},
		{
			name: "attached for upkeep, a machine comes", want: forM, step: detach,
			change: func(st *catalog.State, v *argonv1.Volume) {
				st.Machines["m"] = withDisk(placed(wantRunning))
				v.Attachment = &argonv1.Attachment{ServerId: "a"}
			},
			seen: volumeSeen{attached: demand{use: forUpkeep}},
		},
		{
			name: "attached for upkeep, a machine comes elsewhere", step: detach,
			change: func(st *catalog.State, v *argonv1.Volume) {
				m := withDisk(placed(wantRunning))
				m.ServerId = "b"
				st.Machines["m"] = m
				v.Attachment = &argonv1.Attachment{ServerId: "a"}
				v.Replicas[0].State = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
			},
			seen: volumeSeen{attached: demand{use: forUpkeep}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st, v := threeServers()
			tt.change(st, v)
			want := demandFor(st, v, "a", tt.seen, tt.guests)
			if want != tt.want {
				t.Errorf("wanted for %+v, want %+v", want, tt.want)
			}
			step, why := nextForVolume(st, v, "a", tt.seen, want, tt.guests, !tt.barred)
			if step != tt.step || !strings.Contains(why, tt.why) || (why == "") != (tt.why == "") {
				t.Errorf("next is %v (%q), want %v (%q)", step, why, tt.step, tt.why)
			}
		})
	}
}

func attachedNowhere(change func(*argonv1.Volume)) func(*catalog.State, *argonv1.Volume) {
	return func(_ *catalog.State, v *argonv1.Volume) { change(v) }
}

func TestWhoKeepsUp(t *testing.T) {
	behind := func(st *catalog.State, v *argonv1.Volume) {
		st.Leases["c"] = &argonv1.Lease{}
		v.Replicas = append(v.Replicas, &argonv1.Replica{Id: 3, ServerId: "c", State: argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC})
	}
	tests := []struct {
		name   string
		change func(*catalog.State, *argonv1.Volume)
		want   string // the one server that does
	}{
		{"nothing to repair", func(*catalog.State, *argonv1.Volume) {}, ""},
		{"one is behind: the lowest in sync", behind, "b"},
		{"one is behind, the lowest is away", func(st *catalog.State, v *argonv1.Volume) {
			behind(st, v)
			delete(st.Leases, "b")
		}, "a"},
		{"the one behind is away", func(st *catalog.State, v *argonv1.Volume) {
			behind(st, v)
			delete(st.Leases, "c")
		}, ""},
		{"left unclean", func(_ *catalog.State, v *argonv1.Volume) { v.Clean = false }, "b"},
		{"never attached", func(_ *catalog.State, v *argonv1.Volume) { v.Clean, v.Epoch = false, 0 }, ""},
		{"its holder is lost", func(_ *catalog.State, v *argonv1.Volume) {
			v.Clean, v.Attachment = false, &argonv1.Attachment{ServerId: "c"}
		}, "b"},
		{"its holder is alive: it alone", func(_ *catalog.State, v *argonv1.Volume) {
			v.Clean, v.Attachment = false, &argonv1.Attachment{ServerId: "a"}
		}, "a"},
		{"a machine uses it", func(st *catalog.State, v *argonv1.Volume) {
			behind(st, v)
			st.Machines["m"] = withDisk(placed(wantRunning))
		}, ""},
		{"a machine without a server does not use it", func(st *catalog.State, v *argonv1.Volume) {
			behind(st, v)
			m := withDisk(placed(wantRunning))
			m.ServerId = ""
			st.Machines["m"] = m
		}, "b"},
		{"a snapshot was asked for", func(_ *catalog.State, v *argonv1.Volume) {
			v.Snapshots = []*argonv1.Snapshot{{State: argonv1.SnapshotState_SNAPSHOT_STATE_READY}, {State: argonv1.SnapshotState_SNAPSHOT_STATE_CREATING}}
		}, "b"},
		{"all snapshots are taken", func(_ *catalog.State, v *argonv1.Volume) {
			v.Snapshots = []*argonv1.Snapshot{{State: argonv1.SnapshotState_SNAPSHOT_STATE_READY}}
		}, ""},
		{"to be rolled back", func(_ *catalog.State, v *argonv1.Volume) { v.RollbackTo = 1 }, "b"},
		{"to grow", func(_ *catalog.State, v *argonv1.Volume) { v.WantedBytes = 1 }, "b"},
		{"has grown", func(_ *catalog.State, v *argonv1.Volume) { v.WantedBytes, v.SizeBytes = 1, 1 }, ""},
		{"to be scrubbed", func(_ *catalog.State, v *argonv1.Volume) { v.Scrub = &argonv1.Scrub{Wanted: 2, Finished: 1} }, "b"},
		{"to be scrubbed, never attached", func(_ *catalog.State, v *argonv1.Volume) {
			v.Scrub, v.Epoch, v.Clean = &argonv1.Scrub{Wanted: 1}, 0, false
		}, "b"},
		{"never attached, and a replica is still made", func(_ *catalog.State, v *argonv1.Volume) {
			v.Scrub, v.Epoch, v.Clean = &argonv1.Scrub{Wanted: 1}, 0, false
			v.Replicas[1].State = argonv1.ReplicaState_REPLICA_STATE_CREATING
		}, ""},
		{"being removed", func(_ *catalog.State, v *argonv1.Volume) { v.Clean, v.Removing = false, true }, ""},
		{"nothing in sync", func(_ *catalog.State, v *argonv1.Volume) {
			v.Clean = false
			for _, r := range v.Replicas {
				r.State = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
			}
		}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st, v := threeServers()
			tt.change(st, v)
			for _, id := range []string{"a", "b", "c"} {
				if got := keepsUp(st, v, id, volumeSeen{}); got != (id == tt.want) {
					t.Errorf("server %s keeps it up: %v, want %q to", id, got, tt.want)
				}
			}
		})
	}
}

// Once attached for upkeep, a volume is let go when the attachment has served
// and all that live are equal.
func TestUpkeepEnds(t *testing.T) {
	const behind, inSync = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC, argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
	st, v := threeServers()
	v.Attachment, v.Clean = &argonv1.Attachment{ServerId: "a"}, false
	for _, tt := range []struct {
		ready bool
		state argonv1.ReplicaState
		want  bool
	}{
		{false, behind, true},
		{false, inSync, true},
		{true, behind, true},
		{true, inSync, false},
	} {
		v.Replicas[0].State = tt.state
		seen := volumeSeen{attached: demand{use: forUpkeep}, ready: tt.ready}
		if got := keepsUp(st, v, "a", seen); got != tt.want {
			t.Errorf("ready %v, %v: holds on: %v, want %v", tt.ready, tt.state, got, tt.want)
		}
	}
}

func TestNextForReplica(t *testing.T) {
	const (
		creating  = argonv1.ReplicaState_REPLICA_STATE_CREATING
		inSync    = argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
		outOfSync = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
		removing  = argonv1.ReplicaState_REPLICA_STATE_REMOVING
	)
	image, parent := &argonv1.Base{ImageId: "i"}, &argonv1.Base{VolumeId: "p", SnapshotId: 1}
	tests := []struct {
		name   string
		state  argonv1.ReplicaState
		epoch  uint64
		base   *argonv1.Base
		seen   replicaSeen
		want   replicaStep
		behind bool
	}{
		{name: "empty volume", state: creating, want: createReplica},
		{name: "made before the record said so", state: creating, seen: replicaSeen{exists: true}, want: createReplica},
		{name: "from an image", state: creating, base: image, seen: replicaSeen{baseRecorded: true, hasBase: true}, want: createReplica},
		{name: "from an image that is elsewhere", state: creating, base: image, seen: replicaSeen{baseRecorded: true}, want: fetchImage},
		{name: "from an image that is gone", state: creating, base: image, want: keep},
		{name: "from a snapshot", state: creating, base: parent, seen: replicaSeen{baseRecorded: true, hasBase: true}, want: createReplica},
		{name: "from a snapshot that is elsewhere", state: creating, base: parent, seen: replicaSeen{baseRecorded: true}, want: createReplica, behind: true},
		{name: "written to already: of the image, to be given what is newer", state: creating, base: image, epoch: 1, seen: replicaSeen{baseRecorded: true, hasBase: true}, want: createReplica},
		{name: "written to already, and the image is to be fetched", state: creating, base: image, epoch: 1, seen: replicaSeen{baseRecorded: true, fetchable: true}, want: fetchImage},
		{name: "written to already, and the image can't be had", state: creating, base: image, epoch: 1, seen: replicaSeen{baseRecorded: true}, want: createReplica, behind: true},
		{name: "written to already, and the image is not to be needed any more", state: creating, base: &argonv1.Base{ImageId: "i", Detaching: true}, epoch: 1, seen: replicaSeen{baseRecorded: true, hasBase: true}, want: createReplica, behind: true},
		{name: "written to already, no base", state: creating, epoch: 1, want: createReplica, behind: true},
		{name: "written to already, of a snapshot", state: creating, base: parent, epoch: 1, seen: replicaSeen{baseRecorded: true, hasBase: true}, want: createReplica},
		{name: "in sync", state: inSync, seen: replicaSeen{exists: true}, want: keep},
		{name: "in sync and missing: nobody may make an empty one pass for it", state: inSync, want: keep},
		{name: "in sync and missing, and another one is in sync", state: inSync, seen: replicaSeen{spare: true}, want: giveUpReplica},
		{name: "in sync, as another one is", state: inSync, seen: replicaSeen{exists: true, spare: true}, want: keep},
		{name: "behind", state: outOfSync, seen: replicaSeen{exists: true}, epoch: 1, want: keep},
		{name: "behind and missing", state: outOfSync, epoch: 1, want: createReplica, behind: true},
		{name: "to be removed", state: removing, seen: replicaSeen{exists: true}, want: removeReplica},
		{name: "to be removed, gone already", state: removing, want: removeReplica},
		{name: "bad disk: new", state: creating, seen: replicaSeen{bad: true}, want: keep},
		{name: "bad disk: in sync and missing", state: inSync, seen: replicaSeen{bad: true, spare: true}, want: keep},
		{name: "bad disk: behind and missing", state: outOfSync, epoch: 1, seen: replicaSeen{bad: true}, want: keep},
		{name: "bad disk: to be removed", state: removing, seen: replicaSeen{bad: true, exists: true}, want: leaveReplica},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := &argonv1.Volume{Epoch: tt.epoch, Base: tt.base}
			step, behind := nextForReplica(v, &argonv1.Replica{State: tt.state}, tt.seen)
			if step != tt.want || behind != tt.behind {
				t.Errorf("next is %v, behind %v; want %v, %v", step, behind, tt.want, tt.behind)
			}
		})
	}
}

func TestNextForImage(t *testing.T) {
	image := func(copies ...*argonv1.ImageCopy) *argonv1.Image { return &argonv1.Image{Copies: copies} }
	asked, ready := &argonv1.ImageCopy{ServerId: "a"}, &argonv1.ImageCopy{ServerId: "a", Ready: true}
	tests := []struct {
		name         string
		image        *argonv1.Image
		here, source bool
		needed       bool
		want         imageStep
	}{
		{"not asked", image(), false, true, false, asIs},
		{"asked", image(asked), false, true, false, fetch},
		{"asked, nobody has it", image(asked), false, false, false, asIs},
		{"fetched", image(asked), true, true, false, confirm},
		{"ready", image(ready), true, false, false, asIs},
		{"ready says the record only", image(ready), false, true, false, recheck},
		{"not asked any more", image(), true, true, false, deleteImage},
		{"not asked any more, a replica reads from it", image(), true, true, true, keepImage},
		{"its record is gone", nil, true, false, false, deleteImage},
		{"its record is gone, a replica reads from it", nil, true, false, true, asIs},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := nextForImage(tt.image, "a", tt.here, tt.source, tt.needed); got != tt.want {
				t.Errorf("next is %v, want %v", got, tt.want)
			}
		})
	}
}
