package agent

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestNextInside(t *testing.T) {
	const inSync = argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
	detaching := &argonv1.Base{ImageId: "i", Detaching: true}
	for _, tt := range []struct {
		name   string
		v      *argonv1.Volume
		r      *argonv1.Replica
		seen   Inside
		want   upkeepStep
		forget []uint32
	}{
		{name: "nothing to do", r: &argonv1.Replica{State: inSync}},
		{name: "something is left", r: &argonv1.Replica{State: inSync}, seen: Inside{Untidy: true}, want: tidyUp},
		{
			name: "a snapshot was removed", v: &argonv1.Volume{NextSnapshotId: 4, Snapshots: []*argonv1.Snapshot{{Id: 2}}},
			r: &argonv1.Replica{State: inSync}, seen: Inside{Snapshots: []uint32{1, 2, 3, 4}}, want: forgetSnapshots, forget: []uint32{1, 3},
		},
		{
			name: "one that is newer than what is known", v: &argonv1.Volume{NextSnapshotId: 4},
			r: &argonv1.Replica{State: inSync}, seen: Inside{Snapshots: []uint32{4, 5}},
		},
		{
			name: "being removed as a whole", v: &argonv1.Volume{NextSnapshotId: 4, Removing: true},
			r: &argonv1.Replica{State: inSync}, seen: Inside{Snapshots: []uint32{1}},
		},
		{name: "based, and stays so", v: &argonv1.Volume{Base: &argonv1.Base{ImageId: "i"}}, r: &argonv1.Replica{State: inSync, Based: true}, seen: Inside{Based: true}},
		{name: "to be detached", v: &argonv1.Volume{Base: detaching}, r: &argonv1.Replica{State: inSync, Based: true}, seen: Inside{Based: true}, want: copyBase},
		{name: "detached, not recorded", v: &argonv1.Volume{Base: detaching}, r: &argonv1.Replica{State: inSync, Based: true}, want: recordDetached},
		{name: "emptied by a copy", v: &argonv1.Volume{Base: &argonv1.Base{ImageId: "i"}}, r: &argonv1.Replica{State: inSync, Based: true}, want: recordDetached},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.v == nil {
				tt.v = &argonv1.Volume{}
			}
			step, forget := nextInside(tt.v, tt.r, tt.seen)
			if step != tt.want || !slices.Equal(forget, tt.forget) {
				t.Errorf("next is %v %v, want %v %v", step, forget, tt.want, tt.forget)
			}
		})
	}
}

// A clone is detached from its image while other things go on, and the image
// may then go.
func TestDetaching(t *testing.T) {
	w := newWorld(t, "a", "b")
	for _, s := range []string{"a", "b"} {
		w.hosts[s].mu.Lock()
		w.hosts[s].images["i"] = true
		w.hosts[s].mu.Unlock()
	}
	image := &argonv1.Image{Meta: &argonv1.Meta{Id: "i", Name: "i"}, SizeBytes: gib, Copies: []*argonv1.ImageCopy{{ServerId: "a", Ready: true}, {ServerId: "b", Ready: true}}}
	v := &argonv1.Volume{
		Meta: &argonv1.Meta{Id: "v", Name: "v"}, SizeBytes: gib, ReplicasWanted: 2, NextReplicaId: 3, Base: &argonv1.Base{ImageId: "i"},
		Replicas: []*argonv1.Replica{
			{Id: 1, ServerId: "a", State: argonv1.ReplicaState_REPLICA_STATE_CREATING},
			{Id: 2, ServerId: "b", State: argonv1.ReplicaState_REPLICA_STATE_CREATING},
		},
	}
	if err := w.store.Txn().Create(image).Create(v).Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.until("made from the image", func(st *catalog.State) bool {
		v := st.Volumes["v"]
		return allInSync(v, 2) && v.GetReplicas()[0].GetBased() && v.GetReplicas()[1].GetBased()
	})
	err := w.store.Images.Create(t.Context(), &argonv1.Image{Meta: &argonv1.Meta{Id: "j", Name: "j"}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.store.Images.Update(t.Context(), "i", func(i *argonv1.Image) error { i.Removing = true; return nil })
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.store.Volumes.Update(t.Context(), "v", func(v *argonv1.Volume) error { v.Base.Detaching = true; return nil })
	if err != nil {
		t.Fatal(err)
	}
	st := w.until("detached, and the image gone", func(st *catalog.State) bool {
		return st.Volumes["v"].GetBase() == nil && st.Images["i"] == nil
	})
	if got := st.Volumes["v"]; got.GetEpoch() == 0 || !allInSync(got, 2) {
		t.Errorf("left: %v", got)
	}
	w.untilHosts("without the image", func(h *host) bool { return !h.images["i"] })
}

// What the record does not have any more is deleted here, and its space given
// back, though one of them must stay for as long as a clone reads it.
func TestSnapshotsAreForgotten(t *testing.T) {
	w := newWorld(t, "a")
	h := w.hosts["a"]
	h.mu.Lock()
	(*fakeReplicas)(h).content("v", 1).snapshots = []uint32{1, 2, 3, 4}
	(*fakeReplicas)(h).content("v", 1).inUse = 1
	h.mu.Unlock()
	w.create(1, "a")
	w.runs(0)
	_, err := w.store.Volumes.Update(t.Context(), "v", func(v *argonv1.Volume) error {
		v.NextSnapshotId = 4
		v.Snapshots = []*argonv1.Snapshot{{Id: 2, State: argonv1.SnapshotState_SNAPSHOT_STATE_READY, ReplicaIds: []uint32{1}}}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	holds := func(snapshots ...uint32) func(*host) bool {
		return func(h *host) bool {
			c := (*fakeReplicas)(h).content("v", 1)
			return slices.Equal(c.snapshots, snapshots) && c.untidy == 0
		}
	}
	w.untilHosts("without what can go, and tidy", holds(1, 2, 4))
	h.mu.Lock()
	(*fakeReplicas)(h).content("v", 1).inUse = 0
	h.mu.Unlock()
	w.untilHosts("without the snapshots, and tidy", holds(2, 4))
}

func TestUsageIsTold(t *testing.T) {
	w := newWorld(t, "a")
	w.until("measured", func(st *catalog.State) bool { return st.Usage["a"].GetFreeBytes() == 50*gib })
}

func TestWorthTelling(t *testing.T) {
	at := time.Unix(1000, 0)
	usage := func(after time.Duration, used, free uint64) *argonv1.Usage {
		return &argonv1.Usage{
			Measured: timestamppb.New(at.Add(after)), FreeBytes: free,
			Replicas: []*argonv1.ReplicaUsage{{VolumeId: "v", ReplicaId: 1, UsedBytes: used}},
		}
	}
	known := usage(0, 1000, 1000)
	for name, c := range map[string]struct {
		now  *argonv1.Usage
		want bool
	}{
		"the same":                 {usage(time.Second, 1000, 1000), false},
		"little":                   {usage(time.Second, 1004, 1000), false},
		"little, a minute later":   {usage(time.Minute, 1004, 1000), true},
		"the same, a minute later": {usage(time.Minute, 1000, 1000), false},
		"little, a clock set back": {usage(-2*time.Hour, 1004, 1000), true},
		"much":                     {usage(time.Second, 1010, 1000), true},
		"less free":                {usage(time.Second, 1000, 900), true},
		"a replica less":           {&argonv1.Usage{}, true},
	} {
		if got := worthTelling(known, c.now); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if !worthTelling(nil, known) {
		t.Error("the first one is not told")
	}
}

func TestFill(t *testing.T) {
	s := &argonv1.Server{Meta: &argonv1.Meta{Id: "a", Name: "a"}}
	state := fillUnknown
	for _, step := range []struct {
		free   uint64
		state  fill
		reason string
	}{
		{50 * gib, roomy, ""},
		{4 * gib, low, "disk-low"},
		{4 * gib, low, ""},
		{5*gib + gib/4, low, ""}, // at the border
		{2 * gib, full, "disk-full"},
		{4 * gib, low, ""},
		{6 * gib, roomy, "disk-roomy"},
	} {
		u := &argonv1.Usage{FreeBytes: step.free, TotalBytes: 100 * gib, ReserveBytes: gib}
		next := fillOf(u, 5*gib, state)
		if e := fillEvent(s, state, next, "x"); next != step.state || e.GetReason() != step.reason {
			t.Errorf("%d GiB free: %v, event %q; want %v, %q", step.free/gib, next, e.GetReason(), step.state, step.reason)
		}
		state = next
	}
}
