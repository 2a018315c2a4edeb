package sim

import (
	"slices"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// Snapshots come and go faster than their layers are given back. The one that
// finds no layer left waits; the volume is used meanwhile, and no replica is lost.
func TestNoLayerIsLeft(t *testing.T) {
	w := newWorld(Options{Seed: 1})
	w.quiet, w.untidy, w.think = true, true, 200*time.Millisecond
	if err := w.build(2); err != nil {
		t.Fatal(err)
	}
	w.move(w.servers[2])
	done := func() bool { return wished(w.catalog.volume) }
	taken := 0
	for taken < 200 {
		w.wishSnapshot()
		if w.run(w.now+20*time.Second, done); !done() {
			break
		}
		taken++
		for len(w.catalog.volume.GetSnapshots()) > 2 {
			w.deleteSnapshot(w.catalog.volume.GetSnapshots()[0].GetId())
		}
	}
	if taken < 90 || taken > 128 {
		t.Errorf("%d snapshots were taken", taken)
	}
	before := w.stats.Operations
	w.run(w.now+10*time.Second, never)
	if w.stats.Operations < before+10 || !w.current.alive() || slices.ContainsFunc(w.catalog.volume.GetReplicas(), func(r *argonv1.Replica) bool {
		return r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
	}) {
		t.Errorf("%d operations in 10 s, replicas%s, the holder ended with %v", w.stats.Operations-before, replicaStates(w.catalog.volume), w.current.core.Err())
	}
	w.untidy = false
	if w.run(w.now+2*time.Minute, done); !done() {
		t.Error("the snapshot was not taken when there were layers again")
	}
	w.think = 24 * time.Hour
	w.run(w.now+3*time.Second, never)
	w.detach()
	w.run(w.now+10*time.Second, func() bool { return w.catalog.volume.GetAttachment() == nil })
	if w.compare(); w.violation != nil {
		t.Error(w.violation)
	}
}
