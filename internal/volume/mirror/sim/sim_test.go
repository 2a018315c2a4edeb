package sim

import (
	"errors"
	"flag"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

var (
	seeds = flag.Int("seeds", 200, "how many seeds to run")
	first = flag.Uint64("first", 1, "the first seed")
)

// TestSeeds runs many worlds. A failure names its seed; run it alone with
//
//	go test ./internal/volume/mirror/sim -run TestSeeds -first SEED -seeds 1 -v
func TestSeeds(t *testing.T) {
	var operations, attachments, faults, whole, partial, snapshots, rollbacks, grown, scrubs, retired, detached, late atomic.Int64
	forSeeds(*first, *seeds, func(seed uint64) bool {
		r := Run(Options{Seed: seed})
		operations.Add(int64(r.Operations))
		attachments.Add(int64(r.Attachments))
		faults.Add(int64(r.Faults))
		whole.Add(int64(r.Whole))
		partial.Add(int64(r.Partial))
		snapshots.Add(int64(r.Snapshots))
		rollbacks.Add(int64(r.Rollbacks))
		grown.Add(int64(r.Grown))
		scrubs.Add(int64(r.Scrubs))
		retired.Add(int64(r.Retired))
		detached.Add(int64(r.Detached))
		late.Add(int64(r.Late))
		if r.Violation != nil {
			t.Error(r.Violation)
			if *seeds == 1 {
				t.Log("\n" + strings.Join(Run(Options{Seed: seed, Trace: true}).Trace, "\n"))
			}
		}
		return !t.Failed()
	})
	t.Logf("%d seeds: %d operations, %d attachments, %d faults, %d copies of a whole volume, %d of what had changed, %d snapshots, %d rollbacks, %d times grown, %d scrubs, %d replicas left as they were asked to, %d were detached from their base, %d were made late",
		*seeds, operations.Load(), attachments.Load(), faults.Load(), whole.Load(), partial.Load(), snapshots.Load(), rollbacks.Load(), grown.Load(), scrubs.Load(), retired.Load(), detached.Load(), late.Load())
	if operations.Load() < int64(*seeds)*50 {
		t.Errorf("the worlds stood still: %d operations in %d", operations.Load(), *seeds)
	}
}

// forSeeds calls f for seeds on all processors, until it returns false.
func forSeeds(first uint64, n int, f func(seed uint64) bool) {
	var next atomic.Uint64
	next.Store(first)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for seed := next.Add(1) - 1; seed < first+uint64(n); seed = next.Add(1) - 1 {
				if !f(seed) {
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestSameSeedSameRun: a failure can be looked at again.
func TestSameSeedSameRun(t *testing.T) {
	a, b := Run(Options{Seed: 3, Trace: true}), Run(Options{Seed: 3, Trace: true})
	for i := range a.Trace {
		if i >= len(b.Trace) || a.Trace[i] != b.Trace[i] {
			t.Fatalf("the runs part at line %d:\n%s\n%s", i, a.Trace[i], b.Trace[i])
		}
	}
}

// TestBrokenRules breaks each rule, and expects that the checker notices. A
// checker that cannot fail is worth nothing.
func TestBrokenRules(t *testing.T) {
	tests := []struct {
		rule  string
		brk   mirror.Breakage
		hooks replica.Hooks
		late  bool
	}{
		{rule: "I1: acknowledged when one replica has it", brk: mirror.BreakAckBeforeAll},
		{rule: "I1: flush answered when one replica has flushed", brk: mirror.BreakFlushBeforeAll},
		{rule: "I1: flush answered without fdatasync", hooks: replica.Hooks{FlushWithoutSync: true}},
		{rule: "I1: write answered and not carried out", hooks: replica.Hooks{AckBeforeWrite: true}},
		{rule: "I2: a replica outside the set becomes the source", brk: mirror.BreakStaleSource},
		{rule: "I3: acknowledged before the catalog agrees", brk: mirror.BreakAckBeforeShrink},
		{rule: "I4: the sealed epoch is not kept on disk", hooks: replica.Hooks{ForgetSeal: true}},
		{rule: "I4: a lower epoch is not refused", hooks: replica.Hooks{AcceptOldEpoch: true}},
		{rule: "I5: in the set before the copy is done", brk: mirror.BreakEnterEarly},
		{rule: "I6: overlapping writes race", brk: mirror.BreakNoOrder},
		{rule: "I7: a restarted replica stays in the set", brk: mirror.BreakIgnoreIncarnation},
		{rule: "I7: a power cut goes unnoticed", hooks: replica.Hooks{KeepIncarnation: true}},
		{rule: "I8: a failed replica goes on", hooks: replica.Hooks{IgnoreFailure: true}},
		{rule: "stamps: none", hooks: replica.Hooks{ForgetStamp: true}},
		{rule: "stamps: not durable before the data", hooks: replica.Hooks{LazyStamp: true}},
		{rule: "rolls: while older writes are under way", brk: mirror.BreakRollUnfinished},
		{rule: "rolls: without a flush", brk: mirror.BreakRollUnflushed},
		{rule: "copies: only what the source has stamped", brk: mirror.BreakSourceOnly},
		{rule: "layers: a block is held before its content is durable", hooks: replica.Hooks{HoldBeforeData: true}},
		{rule: "layers: a flush leaves what is provisional so", hooks: replica.Hooks{ForgetSettle: true}},
		{rule: "layers: a stamp is provisional where blocks are written in place", hooks: replica.Hooks{StampLater: true}},
		{rule: "layers: a block is held without the rest of its content", hooks: replica.Hooks{ForgetCopyUp: true}},
		{rule: "layers: a block leaves its layer before it is durable below", hooks: replica.Hooks{MoveUnsynced: true}},
		{rule: "snapshots: what was written before is not flushed after", hooks: replica.Hooks{ForgetFrozen: true}},
		{rule: "snapshots: while writes are under way", brk: mirror.BreakSnapshotUnlocked},
		{rule: "snapshots: ready before they are flushed", brk: mirror.BreakSnapshotUnflushed},
		{rule: "late: a replica of the image passes for one that was in the set", late: true},
		{rule: "sums: recorded of what is not flushed", brk: mirror.BreakSumUnflushed},
		{rule: "sums: a record counts after its region was written", hooks: replica.Hooks{StaleSums: true}},
	}
	for _, tt := range tests {
		t.Run(tt.rule, func(t *testing.T) {
			const within = 2000
			var found, ran atomic.Int64
			var how sync.Once
			forSeeds(1, within, func(seed uint64) bool {
				if found.Load() > 0 {
					return false
				}
				ran.Add(1)
				if r := Run(Options{Seed: seed, Break: tt.brk, Hooks: tt.hooks, BreakLate: tt.late}); r.Violation != nil {
					found.Add(1)
					how.Do(func() { t.Logf("noticed after %d runs: %v", ran.Load(), r.Violation) })
					return false
				}
				return true
			})
			if found.Load() == 0 {
				t.Errorf("not noticed in %d runs", within)
			}
		})
	}
}

// TestRestoredCatalog puts the catalog back to an older state, in which a
// replica was in sync that has missed a lot since (I9). The others know better,
// so nobody may serve.
func TestRestoredCatalog(t *testing.T) {
	for _, tt := range []struct {
		name    string
		brk     mirror.Breakage
		noticed bool
	}{
		{name: "kept"},
		{name: "broken", brk: mirror.BreakIgnoreAhead, noticed: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(20) {
				w := newWorld(Options{Seed: seed, Break: tt.brk})
				if err := w.build(3); err != nil {
					t.Fatal(err)
				}
				w.move(w.servers[3])
				w.run(2*time.Second, never)
				old := proto.CloneOf(w.catalog.volume)
				for _, n := range []int{1, 2, 4} {
					w.cut[[2]int{3, n}], w.cut[[2]int{n, 3}] = true, true
				}
				for range 3 {
					w.move(w.servers[0])
					w.run(w.now+3*time.Second, never)
				}
				w.current.over = true
				w.run(w.now+time.Second, never) // what it has sent arrives nowhere
				w.catalog.volume = old
				clear(w.cut)
				w.move(w.servers[3])
				w.run(w.now+20*time.Second, never)
				if w.current.served != tt.noticed {
					t.Errorf("seed %d: a holder served: %v, it ended with %v", seed, w.current.served, w.current.core.Err())
				}
				if !tt.noticed && !errors.Is(w.current.core.Err(), mirror.ErrCatalogBehind) {
					t.Errorf("seed %d: the attachment ended with %v", seed, w.current.core.Err())
				}
			}
		})
	}
}

// TestRebootCopiesLittle: a server that loses power and comes back, and one
// that a holder loses without notice, get what was written meanwhile and shortly
// before, and never the whole volume.
func TestRebootCopiesLittle(t *testing.T) {
	copied := uint64(0)
	for seed := range uint64(20) {
		w := newWorld(Options{Seed: seed})
		w.think = 8 * time.Second
		if err := w.build(3); err != nil {
			t.Fatal(err)
		}
		w.tend()
		w.move(w.servers[3])
		w.run(10*time.Second, never)
		w.servers[0].crash(true)
		w.run(w.now+20*time.Second, never)
		w.servers[3].crash(false) // the holder's
		most := uint64(0)
		for end := w.now + 20*time.Second; w.now < end && w.violation == nil; w.run(w.now+time.Millisecond, never) {
			if h := w.current; h.alive() && h.core != nil {
				for _, r := range h.core.Status().GetResyncs() {
					most = max(most, r.GetTotalBytes())
				}
			}
		}
		if r := w.result(); r.Violation != nil || r.Whole > 0 || r.Partial < 3 {
			t.Errorf("seed %d: %d whole and %d partial copies, %v", seed, r.Whole, r.Partial, r.Violation)
		}
		if most >= volumeSize/2 {
			t.Errorf("seed %d: a copy was to move %d of %d bytes", seed, most, volumeSize)
		}
		copied += most
	}
	if copied == 0 {
		t.Error("nothing was copied at all")
	}
}

// TestRetire: a replica that is asked to leave does, if as many as are wanted
// stay, and is copied to once it is wanted again.
func TestRetire(t *testing.T) {
	inSync := func(w *world) int {
		n := 0
		for _, r := range w.catalog.volume.GetReplicas() {
			if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
				n++
			}
		}
		return n
	}
	for seed := range uint64(4) {
		w := newWorld(Options{Seed: seed})
		if err := w.build(3); err != nil {
			t.Fatal(err)
		}
		w.tend()
		w.move(w.servers[0])
		w.run(2*time.Second, never)
		for _, step := range []struct {
			retire []uint32 // among them the holder's own
			wanted uint32
			want   int
		}{
			{[]uint32{1}, 3, 3}, {[]uint32{1}, 2, 2}, {[]uint32{1, 2}, 1, 1}, {[]uint32{1, 2, 3}, 1, 1}, {nil, 3, 3},
		} {
			w.change("others are wanted", func(v *argonv1.Volume) {
				v.ReplicasWanted = step.wanted
				for _, r := range v.GetReplicas() {
					r.Retiring = slices.Contains(step.retire, r.GetId())
				}
			})
			w.run(w.now+10*time.Second, never)
			if got := inSync(w); got != step.want || !w.current.alive() {
				t.Errorf("seed %d, %v: %d replicas in sync; the holder is alive: %v", seed, step, got, w.current.alive())
			}
		}
		if r := w.result(); r.Violation != nil {
			t.Errorf("seed %d: %v", seed, r.Violation)
		}
	}
}

// TestScrubMends: what a disk changes behind everybody's back is found and mended
// from a copy that is as it was recorded.
func TestScrubMends(t *testing.T) {
	for seed := range uint64(10) {
		w := newWorld(Options{Seed: seed})
		w.think, w.rotten = 100*time.Millisecond, true
		if err := w.build(2 + int(seed%2)); err != nil {
			t.Fatal(err)
		}
		w.tend()
		w.move(w.servers[0])
		w.run(3*time.Second, never)
		w.think = 24 * time.Hour
		w.run(w.now+2*time.Second, never)
		if s := w.scrub(); s.GetFinished() != 1 || s.GetRegions() != volumeSize/grain || s.GetRepaired()+s.GetUnclear() != 0 {
			t.Fatalf("seed %d: the first scrub: %v", seed, s)
		}
		if err := w.servers[1].rot(int64(seed) * grain); err != nil {
			t.Fatal(err)
		}
		if s := w.scrub(); s.GetFinished() != 2 || s.GetRepaired() != 1 || s.GetUnclear() != 0 {
			t.Errorf("seed %d: the scrub after a byte had changed: %v", seed, s)
		}
		if s := w.scrub(); s.GetRepaired()+s.GetUnclear() != 0 {
			t.Errorf("seed %d: the scrub after that: %v", seed, s)
		}
		w.detach()
		w.run(w.now+10*time.Second, func() bool { return w.catalog.volume.GetAttachment() == nil })
		w.quiet = true
		if w.compare(); w.violation != nil {
			t.Errorf("seed %d: %v", seed, w.violation)
		}
	}
}

func never() bool { return false }
