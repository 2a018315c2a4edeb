package placement

import (
	"fmt"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// fixture is a cluster that a test describes; names are ids.
type fixture struct{ *catalog.State }

func newFixture() fixture {
	return fixture{&catalog.State{
		Servers:  map[string]*argonv1.Server{},
		Images:   map[string]*argonv1.Image{},
		Volumes:  map[string]*argonv1.Volume{},
		Machines: map[string]*argonv1.Machine{},
		Leases:   map[string]*argonv1.Lease{},
	}}
}

// server adds a server that is alive, with 10 CPUs, 20 GiB of memory and 100
// GiB of disk: 18 GiB and 95 GiB to give away.
func (f fixture) server(name, zone string) *argonv1.Server {
	s := &argonv1.Server{
		Meta:         &argonv1.Meta{Id: name, Name: name},
		Zone:         zone,
		Capacity:     &argonv1.Resources{Cpus: 10, MemoryBytes: 20 * gib, DiskBytes: 100 * gib},
		Acceleration: "tcg",
	}
	f.Servers[name] = s
	f.Leases[name] = &argonv1.Lease{ServerId: name}
	return s
}

func (f fixture) machine(name, server string, memory uint64, cpus uint32, volumes ...string) *argonv1.Machine {
	m := &argonv1.Machine{
		Meta: &argonv1.Meta{Id: name, Name: name}, ServerId: server,
		MemoryBytes: memory, Cpus: cpus, VolumeIds: volumes,
	}
	f.Machines[name] = m
	return m
}

func (f fixture) volume(name string, size uint64, inSync ...string) *argonv1.Volume {
	v := &argonv1.Volume{Meta: &argonv1.Meta{Id: name, Name: name}, SizeBytes: size}
	for i, s := range inSync {
		v.Replicas = append(v.Replicas, &argonv1.Replica{
			Id: uint32(i + 1), ServerId: s, State: argonv1.ReplicaState_REPLICA_STATE_IN_SYNC,
		})
	}
	f.Volumes[name] = v
	return v
}

func TestAllocated(t *testing.T) {
	f := newFixture()
	f.server("a", "")
	f.server("b", "")
	f.machine("m1", "a", 2*gib, 3)
	f.machine("m2", "a", gib, 1).Wanted = argonv1.Wanted_WANTED_STOPPED
	f.machine("m3", "b", gib, 1)
	f.machine("m4", "", 7*gib, 1)
	f.volume("v1", 10*gib, "a", "b")
	f.volume("v2", 5*gib, "a").Replicas[0].State = argonv1.ReplicaState_REPLICA_STATE_REMOVING
	f.Images["i"] = &argonv1.Image{SizeBytes: 3 * gib, Copies: []*argonv1.ImageCopy{{ServerId: "a"}}}

	got := Allocated(f.State, "a")
	// What running them takes counts, too.
	memory := MemoryOn(f.Servers["a"], f.Machines["m1"]) + MemoryOn(f.Servers["a"], f.Machines["m2"])
	if got.GetCpus() != 4 || got.GetMemoryBytes() != memory || memory <= 3*gib || got.GetDiskBytes() != 18*gib {
		t.Errorf("allocated on a: %v, want 4 CPUs, %d bytes, 18 GiB", got, memory)
	}
	free := Free(f.State, "a")
	if free.GetCpus() != 36 || free.GetMemoryBytes() != 18*gib-memory || free.GetDiskBytes() != 92*gib {
		t.Errorf("free on a: %v, want 36 CPUs, 18 GiB less what is given away, 92 GiB: what lies there counts, and the image that comes", free)
	}
	f.Servers["a"].Used = &argonv1.Resources{DiskBytes: 90 * gib}
	if free := Free(f.State, "a"); free.GetDiskBytes() != 2*gib {
		t.Errorf("free disk with 90 of 100 GiB used: %d, want 2 GiB", free.GetDiskBytes())
	}
	if free := Free(f.State, "gone"); free.GetCpus() != 0 || free.GetMemoryBytes() != 0 || free.GetDiskBytes() != 0 {
		t.Errorf("free on a server without a record: %v, want nothing", free)
	}
}

func TestPlaceMachine(t *testing.T) {
	tests := []struct {
		name    string
		cluster func(f fixture) *argonv1.Machine
		want    string
		err     string
	}{
		{
			name: "least loaded",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.server("b", "")
				f.machine("m", "a", gib, 1)
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1}
			},
			want: "b",
		},
		{
			name: "first by name when equal",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("b", "")
				f.server("a", "")
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1}
			},
			want: "a",
		},
		{
			name: "its disks in sync before less load",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.server("b", "")
				f.machine("m", "b", gib, 1)
				f.volume("v", gib, "b")
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1, VolumeIds: []string{"v"}}
			},
			want: "b",
		},
		{
			name: "a replica out of sync is no reason",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.server("b", "")
				f.volume("v", gib, "b").Replicas[0].State = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1, VolumeIds: []string{"v"}}
			},
			want: "a",
		},
		{
			name: "most of its disks",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.server("b", "")
				f.volume("v1", 2*gib, "a")
				f.volume("v2", 3*gib, "b")
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1, VolumeIds: []string{"v1", "v2"}}
			},
			want: "b",
		},
		{
			name: "not a witness, not without a lease",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "").Witness = true
				f.server("b", "")
				f.server("c", "")
				delete(f.Leases, "b")
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1}
			},
			want: "c",
		},
		{
			name: "its own place counts as free",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				return f.machine("m", "a", 18*gib, 40)
			},
			want: "a",
		},
		{
			name: "kvm only",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.server("b", "").Acceleration = "kvm"
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1, Acceleration: "kvm"}
			},
			want: "b",
		},
		{
			name: "kvm nowhere",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 1, Acceleration: "kvm"}
			},
			err: "no server that is alive has KVM; create the machine with acceleration auto or tcg",
		},
		{
			name:    "nobody",
			cluster: func(fixture) *argonv1.Machine { return &argonv1.Machine{} },
			err:     "no server that may run machines is alive",
		},
		{
			name: "memory",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.server("b", "")
				f.machine("m", "a", 6*gib, 1)
				return &argonv1.Machine{MemoryBytes: 64 * gib, Cpus: 1}
			},
			err: "no server has 65 GiB of memory free, its 64 GiB and what running it takes; the most is 18 GiB on server b",
		},
		{
			name: "CPUs",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.machine("m", "a", gib, 30)
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 11}
			},
			err: "no server has 11 CPUs free; the most is 10 on server a (each CPU is promised to 4 at most)",
		},
		{
			name: "CPUs that are promised to more",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.machine("m", "a", gib, 50)
				f.Cluster = &argonv1.Cluster{Settings: &argonv1.Settings{CpuOvercommit: 6}}
				return &argonv1.Machine{MemoryBytes: gib, Cpus: 11}
			},
			err: "no server has 11 CPUs free; the most is 10 on server a (each CPU is promised to 6 at most)",
		},
		{
			name: "what it has now is not what it is to get",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				m := f.machine("m", "a", gib, 1)
				return &argonv1.Machine{Meta: m.GetMeta(), ServerId: "a", MemoryBytes: 100 * gib, Cpus: 1}
			},
			err: "no server has 102 GiB of memory free, its 100 GiB and what running it takes; the most is 18 GiB on server a",
		},
		{
			name: "memory here, CPUs there",
			cluster: func(f fixture) *argonv1.Machine {
				f.server("a", "")
				f.server("b", "")
				f.machine("m1", "a", 17*gib, 1)
				f.machine("m2", "b", gib, 39)
				return &argonv1.Machine{MemoryBytes: 4 * gib, Cpus: 4}
			},
			err: "no server has both 4.0 GiB of memory and 4 CPUs free",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture()
			m := tt.cluster(f)
			got, err := PlaceMachine(f.State, m)
			if fmt.Sprint(err) != cmpErr(tt.err) || got != tt.want {
				t.Errorf("got %q, %v; want %q, %v", got, err, tt.want, cmpErr(tt.err))
			}
		})
	}
}

func cmpErr(s string) string {
	if s == "" {
		return "<nil>"
	}
	return s
}

func TestPlaceReplicas(t *testing.T) {
	tests := []struct {
		name    string
		cluster func(f fixture) Replicas
		want    []string
		err     string
	}{
		{
			name: "one in each zone",
			cluster: func(f fixture) Replicas {
				f.server("a", "x")
				f.server("b", "x")
				f.server("c", "y")
				return Replicas{Count: 2, NeedBytes: gib}
			},
			want: []string{"a", "c"},
		},
		{
			name: "away from the zone of the one that stays",
			cluster: func(f fixture) Replicas {
				f.server("a", "x")
				f.server("b", "x")
				f.server("c", "y")
				return Replicas{Count: 1, NeedBytes: gib, Stay: []string{"a"}}
			},
			want: []string{"c"},
		},
		{
			name: "the same zone rather than none",
			cluster: func(f fixture) Replicas {
				f.server("a", "x")
				f.server("b", "x")
				return Replicas{Count: 2, NeedBytes: gib}
			},
			want: []string{"a", "b"},
		},
		{
			name: "the image before free space, the zone before the image",
			cluster: func(f fixture) Replicas {
				f.server("a", "x")
				f.server("b", "x")
				f.server("c", "x")
				f.server("d", "y")
				f.Images["i"] = &argonv1.Image{SizeBytes: gib, Copies: []*argonv1.ImageCopy{
					{ServerId: "b", Ready: true}, {ServerId: "c", Ready: true}, {ServerId: "a"},
				}}
				return Replicas{Count: 2, NeedBytes: gib, Near: BaseServers(f.State, &argonv1.Volume{Base: &argonv1.Base{ImageId: "i"}})}
			},
			want: []string{"b", "d"},
		},
		{
			name: "more free space first",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.server("b", "")
				f.volume("v", gib, "a")
				return Replicas{Count: 1, NeedBytes: gib}
			},
			want: []string{"b"},
		},
		{
			name: "keeps the reserve",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				return Replicas{Count: 1, NeedBytes: 95*gib + 1}
			},
			err: "no server has 95 GiB of disk free; the most is 95 GiB on server a",
		},
		{
			name: "fills up to the reserve",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				return Replicas{Count: 1, NeedBytes: 95 * gib}
			},
			want: []string{"a"},
		},
		{
			name: "degraded: too few servers",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.server("b", "")
				f.server("w", "").Witness = true
				f.server("z", "")
				delete(f.Leases, "z")
				return Replicas{Count: 3, NeedBytes: gib}
			},
			want: []string{"a", "b"},
			err:  "3 replicas would need 3 servers that are alive; there are 2",
		},
		{
			name: "degraded: the last one has no sibling",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				return Replicas{Count: 1, NeedBytes: gib, Stay: []string{"a"}}
			},
			err: "2 replicas would need 2 servers that are alive; there is 1",
		},
		{
			name: "degraded: too full",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.server("b", "")
				f.Servers["b"].Used = &argonv1.Resources{DiskBytes: 94 * gib}
				return Replicas{Count: 2, NeedBytes: 2 * gib}
			},
			want: []string{"a"},
			err:  "only 1 server of the 2 needed has 2.0 GiB of disk free",
		},
		{
			name: "where its image is, and where it is on its way to",
			cluster: func(f fixture) Replicas {
				for _, name := range []string{"a", "b", "c", "d"} {
					f.server(name, "")
				}
				f.volume("v", 5*gib, "c", "d")
				return Replicas{Count: 3, NeedBytes: gib, Near: []string{"d"}, Coming: []string{"c"}}
			},
			want: []string{"d", "c", "a"},
		},
		{
			name: "a zone of its own counts more than the image",
			cluster: func(f fixture) Replicas {
				f.server("a", "x")
				f.server("b", "x")
				f.server("c", "y")
				return Replicas{Count: 2, NeedBytes: gib, Near: []string{"a", "b"}}
			},
			want: []string{"a", "c"},
		},
		{
			name: "not where its image is, if all goes there",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.server("b", "")
				f.volume("v", 11*gib, "a")
				return Replicas{Count: 1, NeedBytes: gib, Near: []string{"a"}}
			},
			want: []string{"b"},
		},
		{
			name: "never on a barred one",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.server("b", "")
				return Replicas{Count: 1, NeedBytes: gib, Never: []string{"a"}}
			},
			want: []string{"b"},
		},
		{
			name: "promised more than there is, but there is room",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.volume("v", 900*gib, "a")
				return Replicas{Count: 1}
			},
			want: []string{"a"},
		},
		{
			name: "nothing beyond the reserve, however little is needed",
			cluster: func(f fixture) Replicas {
				f.server("a", "").Used = &argonv1.Resources{DiskBytes: 95 * gib}
				return Replicas{Count: 1}
			},
			err: "no server has 16 MiB of disk free; the most is 0 B on server a",
		},
		{
			name: "too large for every file system",
			cluster: func(f fixture) Replicas {
				f.server("a", "").Capacity.LargestFileBytes = 16 << 40
				f.server("b", "").Capacity.LargestFileBytes = 15 << 40
				return Replicas{Count: 2, SizeBytes: 60 << 40}
			},
			err: "no server's file system can hold a volume of 60 TiB; the most is 16 TiB on server a",
		},
		{
			name: "too large for one file system",
			cluster: func(f fixture) Replicas {
				f.server("a", "").Capacity.LargestFileBytes = 16 << 40
				f.server("b", "")
				return Replicas{Count: 2, SizeBytes: 60 << 40}
			},
			want: []string{"b"},
			err:  "only 1 server of the 2 needed has a file system that can hold a volume of 60 TiB",
		},
		{
			name: "what is being copied there counts",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.server("b", "").Used = &argonv1.Resources{DiskBytes: 80 * gib}
				v := f.volume("v", 60*gib, "b", "a")
				v.Epoch, v.Replicas[1].State = 3, argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
				f.Usage = map[string]*argonv1.Usage{
					"b": {Replicas: []*argonv1.ReplicaUsage{{VolumeId: "v", ReplicaId: 1, UsedBytes: 50 * gib, SnapshotBytes: 10 * gib}}},
					"a": {Replicas: []*argonv1.ReplicaUsage{{VolumeId: "v", ReplicaId: 2, UsedBytes: 10 * gib}}},
				}
				return Replicas{Count: 1, NeedBytes: 66 * gib}
			},
			err: "no server has 66 GiB of disk free; the most is 65 GiB on server a",
		},
		{
			name: "a clone only where its parent has the snapshot",
			cluster: func(f fixture) Replicas {
				f.server("a", "")
				f.server("b", "")
				f.server("c", "")
				v := f.volume("v", gib, "a", "c")
				v.Snapshots = []*argonv1.Snapshot{{Id: 1, ReplicaIds: []uint32{2, 7}}}
				return Replicas{Count: 2, OnlyNear: true, Near: SnapshotServers(v, v.Snapshots[0])}
			},
			want: []string{"c"},
			err:  "2 replicas would need 2 servers that are alive and have what they are made from; there is 1",
		},
		{
			name: "not on a disk that failed",
			cluster: func(f fixture) Replicas {
				f.server("a", "").Disks = []*argonv1.Disk{{Path: "/volumes", Problem: "it burns"}}
				f.server("b", "")
				return Replicas{Count: 2, NeedBytes: gib}
			},
			want: []string{"b"},
			err:  "2 replicas would need 2 servers that are alive; there is 1; the disk of a failed",
		},
		{
			name:    "nobody",
			cluster: func(fixture) Replicas { return Replicas{Count: 2, NeedBytes: gib} },
			err:     "no server that may keep volumes is alive",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture()
			want := tt.cluster(f)
			got, err := PlaceReplicas(f.State, want)
			if fmt.Sprint(err) != cmpErr(tt.err) || fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("got %v, %v; want %v, %v", got, err, tt.want, cmpErr(tt.err))
			}
		})
	}
}
