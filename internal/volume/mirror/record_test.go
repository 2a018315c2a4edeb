package mirror

import (
	"errors"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const (
	inSyncState = argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
	behindState = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
)

// aVolume has one replica for each state, ids from 1, in epoch 4.
func aVolume(states ...argonv1.ReplicaState) *argonv1.Volume {
	v := &argonv1.Volume{Meta: &argonv1.Meta{Id: "v", Name: "v"}, Epoch: 4, SizeBytes: 1 << 20}
	for i, s := range states {
		v.Replicas = append(v.Replicas, &argonv1.Replica{Id: uint32(i + 1), ServerId: string(rune('a' + i)), State: s, Incarnation: 1})
	}
	return v
}

func TestTake(t *testing.T) {
	v := aVolume(inSyncState, behindState)
	v.Clean = true
	clean, err := Take(v, Holder{ServerID: "a", MachineID: "m"}, time.Unix(1, 0))
	if err != nil || !clean {
		t.Fatalf("Take = %v, %v, want clean", clean, err)
	}
	if v.Epoch != 5 || v.Clean || v.GetAttachment().GetServerId() != "a" || v.GetAttachment().GetMachineId() != "m" {
		t.Errorf("after Take: %v", v)
	}
	if clean, _ = Take(v, Holder{ServerID: "b"}, time.Unix(2, 0)); clean {
		t.Error("a second Take, with no release in between, says that the end was clean")
	}
	if _, err := Take(aVolume(behindState), Holder{}, time.Unix(1, 0)); err == nil {
		t.Error("a volume without a replica in sync could be taken")
	}
}

func TestApply(t *testing.T) {
	now := time.Unix(9, 0)
	taken := func() *argonv1.Volume {
		v := aVolume(inSyncState, inSyncState, behindState)
		if _, err := Take(v, Holder{ServerID: "a"}, now); err != nil {
			t.Fatal(err)
		}
		return v
	}

	v := taken()
	p := Proposal{Epoch: 5, InSync: []Member{{1, 1}, {3, 8}}, Reasons: map[uint32]string{2: "it could not be reached"}}
	if err := Apply(v, p, now); err != nil {
		t.Fatal(err)
	}
	if s := v.Replicas[1]; s.State != behindState || s.Reason != "it could not be reached" {
		t.Errorf("replica 2 should have left: %v", s)
	}
	if s := v.Replicas[2]; s.State != inSyncState || s.Incarnation != 8 {
		t.Errorf("replica 3 should have entered in incarnation 8: %v", s)
	}

	// I3, I4: an old holder cannot change the set.
	p.Epoch = 4
	if err := Apply(taken(), p, now); !errors.Is(err, ErrDeposed) {
		t.Errorf("a proposal of an older epoch: %v, want ErrDeposed", err)
	}

	v = taken()
	release := Proposal{Epoch: 5, InSync: []Member{{1, 1}, {2, 1}}, Release: true, Clean: true}
	for range 2 { // its outcome may have been unknown
		if err := Apply(v, release, now); err != nil {
			t.Fatal(err)
		}
	}
	if v.Attachment != nil || !v.Clean {
		t.Errorf("after the release: %v", v)
	}
}

func TestPromote(t *testing.T) {
	v := aVolume(inSyncState, behindState)
	if err := Promote(v, Member{ID: 2, Incarnation: 3}, 17, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if v.Epoch != 18 || v.Replicas[0].State != behindState || v.Replicas[1].State != inSyncState || v.Replicas[1].Incarnation != 3 {
		t.Errorf("after Promote: %v", v)
	}
	if err := Promote(v, Member{ID: 9}, 0, time.Unix(1, 0)); err == nil {
		t.Error("a replica that does not exist was promoted")
	}
}

// What is known to be equal goes with a replica that leaves, and never is more
// than was true for it.
func TestEqualBefore(t *testing.T) {
	now := time.Unix(9, 0)
	v := aVolume(inSyncState, inSyncState, inSyncState, behindState)
	v.Generation, v.Clean, v.Replicas[3].EqualBefore = 40, true, 3
	take := func() {
		if _, err := Take(v, Holder{ServerID: "a"}, now); err != nil {
			t.Fatal(err)
		}
	}
	apply := func(p Proposal) {
		p.Epoch = v.Epoch
		for range 2 { // its outcome may have been unknown
			if err := Apply(v, p, now); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := func(what string, generation, equalBefore uint64, replicas ...uint64) {
		t.Helper()
		if v.Generation != generation || v.EqualBefore != equalBefore {
			t.Errorf("%s: generation %d, equal before %d, want %d, %d", what, v.Generation, v.EqualBefore, generation, equalBefore)
		}
		for i, w := range replicas {
			if r := v.Replicas[i]; r.EqualBefore != w {
				t.Errorf("%s: replica %d: equal before %d, want %d", what, r.Id, r.EqualBefore, w)
			}
		}
	}
	all := []Member{{1, 1}, {2, 1}, {3, 1}}
	take()
	want("taken after a clean end", 41, 41)
	apply(Proposal{InSync: all, Generation: 42})
	want("a roll begun", 42, 41)
	apply(Proposal{InSync: all[:2], EqualBefore: 42})
	want("replica 3 left, which may have had no part in the roll", 43, 42, 0, 0, 41, 3)
	take()
	want("taken after an unclean end", 44, 42)
	apply(Proposal{InSync: all[:1], EqualBefore: 42})
	want("replica 2 left", 45, 42, 0, 42, 41, 3)
	if err := Promote(v, Member{ID: 3, Incarnation: 1}, 0, now); err != nil {
		t.Fatal(err)
	}
	want("replica 3 was promoted", 46, 41, 41, 41, 41, 3)
}

// What happens to replicas outside the set, and to snapshots, is recorded once,
// however often it is said, and only where it still holds.
func TestApplyNews(t *testing.T) {
	now := time.Unix(9, 0)
	ready, creating := argonv1.SnapshotState_SNAPSHOT_STATE_READY, argonv1.SnapshotState_SNAPSHOT_STATE_CREATING
	v := aVolume(inSyncState, inSyncState, behindState)
	v.Snapshots = []*argonv1.Snapshot{
		{Id: 1, State: ready, Generation: 7, ReplicaIds: []uint32{1, 2, 3}},
		{Id: 2, State: creating},
	}
	v.WantedBytes, v.RollbackTo, v.Scrub = 3<<20, 1, &argonv1.Scrub{Wanted: 2}
	v.Replicas[2].EqualBefore, v.Replicas[2].Based = 5, true
	if _, err := Take(v, Holder{ServerID: "a"}, now); err != nil {
		t.Fatal(err)
	}
	all := []Member{{1, 1}, {2, 1}}
	apply := func(p Proposal) {
		t.Helper()
		p.Epoch, p.InSync = v.Epoch, all
		for range 2 { // its outcome may have been unknown
			if err := Apply(v, p, now); err != nil {
				t.Fatal(err)
			}
		}
	}

	apply(Proposal{Facts: []fact{{copied: 3, to: 8 << 20, base: 6}}})
	if r := v.Replicas[2]; r.CopiedTo != 8<<20 || r.CopiedBase != 6 || r.EqualBefore != 5 {
		t.Errorf("a copy has come half way: %v", r)
	}
	apply(Proposal{Facts: []fact{{emptied: 3}}})
	if r := v.Replicas[2]; r.CopiedTo != 0 || r.EqualBefore != 0 || r.Based || len(v.Snapshots[0].ReplicaIds) != 2 {
		t.Errorf("replica 3 was emptied: %v, %v", r, v.Snapshots)
	}
	apply(Proposal{Facts: []fact{{reached: 3, snapshot: 1}, {copied: 1, to: 4, base: 4}}})
	if r := v.Replicas[2]; r.EqualBefore != 7 || len(v.Snapshots[0].ReplicaIds) != 3 || v.Replicas[0].CopiedTo != 0 {
		t.Errorf("replica 3 has snapshot 1, and replica 1 is in sync: %v, %v", v.Replicas, v.Snapshots)
	}
	apply(Proposal{Taken: &Taken{ID: 2, Generation: 9, Size: 1 << 20}, Facts: []fact{{reached: 3, snapshot: 2}}})
	if s := v.Snapshots[1]; s.State != ready || s.Generation != 9 || s.SizeBytes != 1<<20 || len(s.ReplicaIds) != 3 {
		t.Errorf("snapshot 2 was taken, and copied: %v", s)
	}
	apply(Proposal{Size: 2 << 20, RolledBack: 2, Scrubbed: &argonv1.Scrub{Finished: 1, Regions: 1}})
	if v.SizeBytes != 2<<20 || v.WantedBytes != 3<<20 || v.RollbackTo != 1 || v.Scrub.Finished != 1 || v.Scrub.Wanted != 2 {
		t.Errorf("what was done is less than what is wanted by now: %v", v)
	}
	apply(Proposal{Size: 3 << 20, RolledBack: 1, Scrubbed: &argonv1.Scrub{Finished: 2, Regions: 3}})
	if v.WantedBytes != 0 || v.RollbackTo != 0 || v.Scrub.Finished != 2 || v.Scrub.Regions != 3 {
		t.Errorf("all that was wanted is done: %v", v)
	}
	// Replica 3 left the set before snapshot 2 was taken: promoting it loses that.
	v.Snapshots[1].ReplicaIds = []uint32{1, 2}
	if err := Promote(v, Member{ID: 3, Incarnation: 1}, 0, now); err != nil {
		t.Fatal(err)
	}
	if len(v.Snapshots) != 1 || v.Snapshots[0].Id != 1 {
		t.Errorf("after Promote: %v", v.Snapshots)
	}
}
