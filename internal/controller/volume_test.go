package controller

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

func TestReplicas(t *testing.T) {
	const short, long = time.Minute, time.Hour // the grace time is 10 minutes
	tests := []struct {
		name    string
		cluster func() (fixture, *argonv1.Volume)
		absent  time.Duration
		want    []string // nil: nothing changes
	}{
		{
			name: "healthy",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c")
				return f, f.volume("v", 2, "a:in", "b:in")
			},
		},
		{
			name: "a server is away for a while: wait",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c").dead("b")
				return f, f.volume("v", 2, "a:in", "b:in")
			},
			absent: short,
		},
		{
			name: "away for long: a new one, the old one stays until it is in sync",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c").dead("b")
				return f, f.volume("v", 2, "a:in", "b:in")
			},
			absent: long,
			want:   []string{"a:in", "b:in", "c:new"},
		},
		{
			name: "the new one is in sync: the old one goes",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c").dead("b")
				return f, f.volume("v", 2, "a:in", "b:out", "c:in")
			},
			absent: long,
			want:   []string{"a:in", "b:gone", "c:in"},
		},
		{
			name: "the old one came back first: the new one goes",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c")
				return f, f.volume("v", 2, "a:in", "b:in", "c:out")
			},
			want: []string{"a:in", "b:in", "c:gone"},
		},
		{
			name: "one too many in sync, at rest: the newest in a shared zone goes",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c")
				f.Servers["a"].Zone, f.Servers["b"].Zone, f.Servers["c"].Zone = "x", "x", "y"
				return f, f.volume("v", 2, "a:in", "b:in", "c:in")
			},
			want: []string{"a:in", "b:gone", "c:in"},
		},
		{
			name: "one too many in sync, attached: the holder is asked",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c")
				v := f.volume("v", 2, "a:in", "b:in", "c:in")
				v.Attachment, v.Clean = &argonv1.Attachment{ServerId: "a"}, false
				return f, v
			},
			want: []string{"a:in", "b:in", "c:leaves"},
		},
		{
			name: "one too many in sync after a crash: left alone",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c")
				v := f.volume("v", 2, "a:in", "b:in", "c:in")
				v.Clean = false
				return f, v
			},
		},
		{
			name: "nowhere to put one",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b").dead("b")
				return f, f.volume("v", 2, "a:in", "b:out")
			},
			absent: long,
		},
		{
			name: "created degraded: healed when a server comes",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b")
				return f, f.volume("v", 2, "a:in")
			},
			want: []string{"a:in", "b:new"},
		},
		{
			name: "created degraded, never attached",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b")
				v := f.volume("v", 2, "a:new")
				v.Epoch = 0
				return f, v
			},
			want: []string{"a:new", "b:new"},
		},
		{
			name: "nothing to copy from",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c")
				return f, f.volume("v", 2, "a:out")
			},
		},
		{
			name: "its image is gone before it was made",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b", "c")
				v := f.volume("v", 2, "a:new")
				v.Epoch, v.Base = 0, &argonv1.Base{ImageId: "i"}
				return f, v
			},
		},
		{
			name: "not on a server that still deletes one",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b")
				return f, f.volume("v", 2, "a:in", "b:gone")
			},
		},
		{
			name: "a removed server's replica is forgotten and replaced",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "c")
				return f, f.volume("v", 2, "a:in", "b:out")
			},
			want: []string{"a:in", "c:new"},
		},
		{
			name: "a removed server's replica was the only one in sync",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "c")
				return f, f.volume("v", 1, "b:in", "a:out")
			},
		},
		{
			name: "removal: all are deleted",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b").dead("b")
				v := f.volume("v", 2, "a:in", "b:in", "z:out")
				v.Removing = true
				return f, v
			},
			want: []string{"a:gone", "b:gone"},
		},
		{
			name: "removal waits for the holder",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b")
				v := f.volume("v", 2, "a:in", "b:in")
				v.Removing, v.Attachment = true, &argonv1.Attachment{ServerId: "b"}
				return f, v
			},
		},
		{
			name: "removal does not wait for a lost holder",
			cluster: func() (fixture, *argonv1.Volume) {
				f := newFixture("a", "b").dead("b")
				v := f.volume("v", 2, "a:in", "b:in")
				v.Removing, v.Attachment = true, &argonv1.Attachment{ServerId: "b"}
				return f, v
			},
			absent: short,
			want:   []string{"a:gone", "b:gone"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, v := tt.cluster()
			before := show(v)
			actions := f.plan(max(tt.absent, time.Second))
			if got := show(v); !slices.Equal(got, before) {
				t.Errorf("the plan wrote to the record that it was made from: %v", got)
			}
			if tt.want == nil {
				if len(actions) > 0 {
					t.Fatalf("planned %+v, want nothing", actions)
				}
				return
			}
			if len(actions) != 1 || len(actions[0].Put) != 1 {
				t.Fatalf("planned %+v, want one change", actions)
			}
			next := actions[0].Put[0].(*argonv1.Volume)
			if got := show(next); !slices.Equal(got, tt.want) {
				t.Errorf("replicas become %v, want %v", got, tt.want)
			}
			f.Volumes["v"] = next
			if again := f.plan(max(tt.absent, time.Second)); len(again) > 0 {
				t.Errorf("the same again: %+v", again)
			}
		})
	}
}

func TestVolumeIsRemovedOnceAllReplicasAre(t *testing.T) {
	f := newFixture("a")
	f.volume("v", 2).Removing = true
	f.VolumeStatus["v"] = &argonv1.VolumeStatus{VolumeId: "v"}
	actions := f.plan(time.Minute)
	if len(actions) != 2 || len(actions[0].Delete) != 1 || actions[1].ClearStatus != "v" {
		t.Errorf("planned %+v, want the record deleted and its status cleared", actions)
	}
}

func TestNewReplicasHaveNewIDs(t *testing.T) {
	f := newFixture("a", "b", "c")
	f.volume("v", 3, "a:in").NextReplicaId = 9
	v := f.plan(time.Minute)[0].Put[0].(*argonv1.Volume)
	if v.Replicas[1].GetId() != 9 || v.Replicas[2].GetId() != 10 || v.GetNextReplicaId() != 11 {
		t.Errorf("ids %d, %d, next %d; want 9, 10, 11", v.Replicas[1].GetId(), v.Replicas[2].GetId(), v.GetNextReplicaId())
	}
}

// Whatever the leader does, the in-sync set never becomes empty, and it
// changes nothing about a set that only a holder may change.
func TestPlanKeepsTheInSyncSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		servers := []string{"a", "b", "c", "d", "e"}
		f := newFixture(servers...)
		var replicas []string
		for _, s := range servers {
			if rapid.Bool().Draw(t, "replica on "+s) {
				replicas = append(replicas, s+":"+rapid.SampledFrom([]string{"new", "in", "out", "gone"}).Draw(t, "state"))
			}
			switch rapid.IntRange(0, 3).Draw(t, "fate of "+s) {
			case 0:
				f.dead(s)
			case 1:
				delete(f.Servers, s)
				delete(f.Leases, s)
			}
		}
		v := f.volume("v", rapid.Uint32Range(1, 3).Draw(t, "wanted"), replicas...)
		v.Clean = rapid.Bool().Draw(t, "clean")
		v.Epoch = rapid.Uint64Range(0, 1).Draw(t, "epoch")
		if rapid.Bool().Draw(t, "attached") {
			v.Attachment, v.Clean, v.Epoch = &argonv1.Attachment{ServerId: "a"}, false, 1
		}
		atRest := v.GetAttachment() == nil && (v.GetClean() || v.GetEpoch() == 0)
		before := inSyncOf(v)
		var next *argonv1.Volume
		for round := 0; ; round++ {
			actions := f.plan(time.Hour)
			if len(actions) == 0 {
				break
			}
			if round > 20 {
				t.Fatalf("the plan does not come to rest: %+v", actions)
			}
			next = actions[0].Put[0].(*argonv1.Volume)
			f.Volumes["v"] = next
		}
		if next == nil {
			return
		}
		after := inSyncOf(next)
		if len(before) > 0 && len(after) == 0 {
			t.Fatalf("the in-sync set %v became empty", before)
		}
		if !atRest && !slices.Equal(before, after) {
			t.Fatalf("the in-sync set went from %v to %v although the volume is not at rest", before, after)
		}
		on := map[string]bool{}
		for _, r := range next.GetReplicas() {
			if on[r.GetServerId()] {
				t.Fatalf("two replicas on server %s: %v", r.GetServerId(), show(next))
			}
			on[r.GetServerId()] = true
		}
	})
}

func inSyncOf(v *argonv1.Volume) []uint32 {
	var ids []uint32
	for _, r := range v.GetReplicas() {
		if r.GetState() == inSync {
			ids = append(ids, r.GetId())
		}
	}
	return ids
}

func TestImages(t *testing.T) {
	ready := func(server string) *argonv1.ImageCopy { return &argonv1.ImageCopy{ServerId: server, Ready: true} }
	asked := func(server string) *argonv1.ImageCopy { return &argonv1.ImageCopy{ServerId: server} }
	tests := []struct {
		name   string
		f      fixture
		absent time.Duration
		copies []*argonv1.ImageCopy
		want   []string // nil: nothing changes
	}{
		{"imported: a second copy", newFixture("a", "b", "c"), 0, []*argonv1.ImageCopy{ready("a")}, []string{"a", "b"}},
		{"imported: a second copy where a disk is made of it", newFixture("a", "b", "c").basedOn("i", "c:new"), 0, []*argonv1.ImageCopy{ready("a")}, []string{"a", "c"}},
		{"two", newFixture("a", "b", "c"), 0, []*argonv1.ImageCopy{ready("a"), asked("b")}, nil},
		{"one server", newFixture("a"), 0, []*argonv1.ImageCopy{ready("a")}, nil},
		{"more than two stay", newFixture("a", "b", "c"), 0, []*argonv1.ImageCopy{ready("a"), ready("b"), ready("c")}, nil},
		{"away for a while", newFixture("a", "b", "c").dead("b"), time.Minute, []*argonv1.ImageCopy{ready("a"), ready("b")}, nil},
		{"away for long", newFixture("a", "b", "c").dead("b"), time.Hour, []*argonv1.ImageCopy{ready("a"), ready("b")}, []string{"a", "c"}},
		{"away for long, the only one", newFixture("a", "b", "c").dead("b"), time.Hour, []*argonv1.ImageCopy{ready("b")}, nil},
		{"its server was removed", newFixture("a", "c"), 0, []*argonv1.ImageCopy{ready("a"), ready("b")}, []string{"a", "c"}},
		{"nothing to copy from", newFixture("a", "b"), 0, []*argonv1.ImageCopy{asked("a")}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.f.Images["i"] = &argonv1.Image{Meta: meta("i"), SizeBytes: gib, Copies: tt.copies}
			actions := tt.f.plan(max(tt.absent, time.Second))
			if tt.want == nil {
				if len(actions) > 0 {
					t.Fatalf("planned %+v, want nothing", actions)
				}
				return
			}
			if len(actions) != 1 {
				t.Fatalf("planned %+v, want one change", actions)
			}
			var got []string
			for _, c := range actions[0].Put[0].(*argonv1.Image).GetCopies() {
				got = append(got, c.GetServerId())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("copies on %v, want %v", got, tt.want)
			}
		})
	}
}
