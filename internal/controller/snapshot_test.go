package controller

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// snap adds a snapshot that these replicas have.
func snap(v *argonv1.Volume, name string, replicas ...uint32) *argonv1.Snapshot {
	s := &argonv1.Snapshot{
		Id: uint32(len(v.Snapshots) + 1), Name: name, State: argonv1.SnapshotState_SNAPSHOT_STATE_READY, ReplicaIds: replicas,
	}
	v.Snapshots = append(v.Snapshots, s)
	return s
}

// clone adds a volume based on a snapshot of another, on one server.
func (f fixture) clone(name string, parent *argonv1.Volume, snapshot uint32, server string) *argonv1.Volume {
	v := f.volume(name, 1, server+":in")
	v.Base = &argonv1.Base{VolumeId: parent.GetMeta().GetId(), SnapshotId: snapshot}
	v.Replicas[0].Based = true
	return v
}

// only is the single record that a plan changes.
func only[R any](t *testing.T, actions []Action) R {
	t.Helper()
	if len(actions) != 1 || len(actions[0].Put) != 1 {
		t.Fatalf("planned %+v, want one change", actions)
	}
	return actions[0].Put[0].(R)
}

func TestSnapshotsOfGoneReplicas(t *testing.T) {
	f := newFixture("a", "b")
	v := f.volume("v", 2, "a:in", "b:in")
	snap(v, "kept", 1, 2, 7)
	snap(v, "lost", 7, 8)
	snap(v, "new").State = argonv1.SnapshotState_SNAPSHOT_STATE_CREATING
	v.RollbackTo = 2
	actions := f.plan(time.Second)
	next := only[*argonv1.Volume](t, actions)
	if s := next.GetSnapshots(); len(s) != 2 || !slices.Equal(s[0].GetReplicaIds(), []uint32{1, 2}) || s[1].GetName() != "new" {
		t.Errorf("snapshots become %v", s)
	}
	if next.GetRollbackTo() != 0 {
		t.Error("the volume waits for ever for a snapshot that is lost")
	}
	if got := reasons(actions); !slices.Equal(got, []string{"snapshot-lost"}) || actions[0].Events[0].GetSeverity() != argonv1.Severity_SEVERITY_ERROR {
		t.Errorf("told %v", actions[0].Events)
	}
}

func TestRemovedSnapshotWaitsForItsClones(t *testing.T) {
	f := newFixture("a")
	v := f.volume("v", 1, "a:in")
	snap(v, "monday", 1).Removing = true
	c := f.clone("c", v, 1, "a")
	if actions := f.plan(time.Second); len(actions) > 0 {
		t.Fatalf("planned %+v while a clone needs it", actions)
	}
	c.Base = nil
	if next := only[*argonv1.Volume](t, f.plan(time.Second)); len(next.GetSnapshots()) != 0 {
		t.Errorf("left: %v", next.GetSnapshots())
	}
}

func TestSurplusThatOthersNeedStays(t *testing.T) {
	for name, depend := range map[string]func(f fixture, v *argonv1.Volume){
		"a clone reads from it":       func(f fixture, v *argonv1.Volume) { snap(v, "s", 1, 2, 3); f.clone("c", v, 1, "c") },
		"it alone has a snapshot":     func(_ fixture, v *argonv1.Volume) { snap(v, "s", 3) },
		"nothing; then another would": nil,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture("a", "b", "c")
			v := f.volume("v", 2, "a:in", "b:in", "c:out")
			if depend == nil {
				if got := show(only[*argonv1.Volume](t, f.plan(time.Second))); !slices.Equal(got, []string{"a:in", "b:in", "c:gone"}) {
					t.Errorf("becomes %v", got)
				}
				return
			}
			depend(f, v)
			for _, a := range f.plan(time.Second) {
				for _, r := range a.Put[0].(*argonv1.Volume).GetReplicas() {
					if r.GetServerId() == "c" && r.GetState() == removing {
						t.Errorf("the replica is taken away: %+v", a)
					}
				}
			}
		})
	}
}

func TestBaseGoesWithItsLastReader(t *testing.T) {
	f := newFixture("a", "b")
	f.Images["i"] = &argonv1.Image{Meta: meta("i"), Copies: []*argonv1.ImageCopy{{ServerId: "a", Ready: true}, {ServerId: "b", Ready: true}}}
	v := f.volume("v", 2, "a:in", "b:in")
	v.Base, v.Replicas[0].Based = &argonv1.Base{ImageId: "i", Detaching: true}, true
	if actions := f.plan(time.Second); len(actions) > 0 {
		t.Fatalf("planned %+v while a replica is based", actions)
	}
	v.Replicas[0].Based = false
	if next := only[*argonv1.Volume](t, f.plan(time.Second)); next.GetBase() != nil || next.GetEpoch() != 4 {
		t.Errorf("base %v, epoch %d", next.GetBase(), next.GetEpoch())
	}

	// Before the first attachment, nobody may make a replica of nothing now.
	v.Epoch, v.Clean = 0, false
	if next := only[*argonv1.Volume](t, f.plan(time.Second)); next.GetBase() != nil || next.GetEpoch() != 1 || !next.GetClean() {
		t.Errorf("never attached: base %v, epoch %d, clean %v", next.GetBase(), next.GetEpoch(), next.GetClean())
	}
	v.Replicas[1].State = creating
	for _, a := range f.plan(time.Second) {
		if a.Put[0].(*argonv1.Volume).GetBase() == nil {
			t.Error("the base goes while a replica is being made from it")
		}
	}
}

func TestImageCopyStaysWhereItIsRead(t *testing.T) {
	f := newFixture("a", "b", "c").dead("b")
	f.Images["i"] = &argonv1.Image{Meta: meta("i"), Copies: []*argonv1.ImageCopy{{ServerId: "a", Ready: true}, {ServerId: "b", Ready: true}, {ServerId: "c", Ready: true}}}
	v := f.volume("v", 1, "b:in")
	v.Base, v.Replicas[0].Based = &argonv1.Base{ImageId: "i"}, true
	for _, a := range f.plan(time.Hour) {
		if i, ok := a.Put[0].(*argonv1.Image); ok {
			t.Errorf("copies become %v", i.GetCopies())
		}
	}
}

func TestRemovedImageWaitsForItsVolumes(t *testing.T) {
	f := newFixture("a")
	f.Images["i"] = &argonv1.Image{Meta: meta("i"), Removing: true, Copies: []*argonv1.ImageCopy{{ServerId: "a", Ready: true}}}
	v := f.volume("v", 1, "a:in")
	v.Base, v.Replicas[0].Based = &argonv1.Base{ImageId: "i", Detaching: true}, true
	if actions := f.plan(time.Second); len(actions) > 0 {
		t.Fatalf("planned %+v while a volume needs it", actions)
	}
	v.Base, v.Replicas[0].Based = nil, false
	if actions := f.plan(time.Second); len(actions) != 1 || len(actions[0].Delete) != 1 {
		t.Errorf("planned %+v, want the image deleted", actions)
	}
}

func TestScrubsAreDueOneByOne(t *testing.T) {
	f := newFixture("a", "b")
	long := timestamppb.New(noon.Add(-8 * 24 * time.Hour))
	for _, name := range []string{"v", "w"} {
		f.volume(name, 1, "a:in").Scrub = &argonv1.Scrub{Wanted: 3, Finished: 3, FinishedAt: long}
	}
	f.volume("fresh", 1, "a:in")
	next := only[*argonv1.Volume](t, f.plan(time.Second))
	if next.GetMeta().GetName() != "v" || next.GetScrub().GetWanted() != 4 {
		t.Fatalf("planned %v", next)
	}
	f.Volumes["v"] = next
	if actions := f.plan(time.Second); len(actions) > 0 {
		t.Errorf("another at the same time: %+v", actions)
	}
	f.dead("a") // nobody can scrub v now; w has to wait for a, too
	f.Volumes["w"].Replicas[0].ServerId = "b"
	if next := only[*argonv1.Volume](t, f.planVolumes(time.Second)); next.GetMeta().GetName() != "w" {
		t.Errorf("planned %v", next)
	}
	f.alive("a")
	f.Volumes["v"].Scrub = &argonv1.Scrub{FinishedAt: long}
	f.Volumes["w"].Scrub = nil
	f.Cluster = &argonv1.Cluster{Settings: &argonv1.Settings{ScrubOff: true}}
	if actions := f.plan(time.Second); len(actions) > 0 {
		t.Errorf("switched off, and planned %+v", actions)
	}
	f.Cluster.Settings = &argonv1.Settings{ScrubIntervalHours: 1000}
	if actions := f.plan(time.Second); len(actions) > 0 {
		t.Errorf("not due yet, and planned %+v", actions)
	}
}

// planVolumes is a plan without the news about servers.
func (f fixture) planVolumes(absent time.Duration) []Action {
	return slices.DeleteFunc(f.plan(absent), func(a Action) bool { return a.OnlyNews })
}

func TestUsageOfARemovedServerIsCleared(t *testing.T) {
	f := newFixture("a")
	f.Usage["a"], f.Usage["gone"] = &argonv1.Usage{}, &argonv1.Usage{}
	if actions := f.plan(time.Second); len(actions) != 1 || actions[0].ClearUsage != "gone" {
		t.Errorf("planned %+v", actions)
	}
}
