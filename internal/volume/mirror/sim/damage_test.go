package sim

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/mirror"
)

// This file damages what snapshots hold, as a disk may, and looks what becomes
// of it.

// withSnapshots is a world at rest, with a volume that was written before,
// between and after two snapshots, but for the last one if that is to be shared.
func withSnapshots(t *testing.T, o Options, replicas int, shared bool) *world {
	t.Helper()
	w := newWorld(o)
	w.think, w.quiet, w.rotten = 20*time.Millisecond, true, true
	if err := w.build(replicas); err != nil {
		t.Fatal(err)
	}
	w.tend()
	w.move(w.servers[replicas]) // which has no replica
	w.run(2*time.Second, never)
	w.snapshot(t)
	w.run(w.now+2*time.Second, never)
	if shared {
		w.think = 24 * time.Hour
		w.run(w.now+2*time.Second, never)
	}
	w.snapshot(t)
	w.run(w.now+2*time.Second, never)
	w.think = 24 * time.Hour
	w.run(w.now+3*time.Second, never)
	return w
}

func (w *world) snapshot(t *testing.T) {
	t.Helper()
	w.wishSnapshot()
	if w.run(w.now+20*time.Second, func() bool { return wished(w.catalog.volume) }); !wished(w.catalog.volume) || w.violation != nil {
		t.Fatalf("a snapshot was not taken: %v", w.violation)
	}
}

// scrub has the volume scrubbed.
func (w *world) scrub() *argonv1.Scrub {
	w.change("a scrub", func(v *argonv1.Volume) {
		if v.Scrub == nil {
			v.Scrub = &argonv1.Scrub{}
		}
		v.Scrub.Wanted++
	})
	w.run(w.now+20*time.Second, func() bool { return wished(w.catalog.volume) })
	return w.catalog.volume.GetScrub()
}

// rotSnapshot changes a byte on the server's disk that is of one snapshot's
// content, and not of another's.
func (s *server) rotSnapshot(t *testing.T, of, notOf uint32) {
	t.Helper()
	dir := fmt.Sprintf("/volumes/%s/%d", volumeID, s.number)
	names, err := s.fs.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	rot := func(name string, off int64) {
		if err := s.fs.Rot(path.Join(dir, name), off); err != nil {
			t.Fatal(err)
		}
	}
	size := s.w.catalog.volume.GetSizeBytes()
	differs := func(id uint32) bool {
		b, err := s.snapshot(id, size)
		if err != nil {
			t.Fatal(err)
		}
		return firstDifference(s.w.kept[id].content, b) >= 0
	}
	for _, name := range names {
		for off := int64(100); strings.HasSuffix(name, ".data") && off < int64(size); off += volume.SectorSize {
			rot(name, off)
			if differs(of) && (notOf == 0 || !differs(notOf)) {
				s.w.trace("byte %d of %s on %s is not what it was", off, name, s.name)
				return
			}
			rot(name, off)
		}
	}
	t.Fatal("no block is of this snapshot only")
}

// A scrub finds what a disk has changed of a snapshot, and mends it if a
// checksum tells which copy is good; else it says so and changes nothing.
func TestScrubMendsSnapshots(t *testing.T) {
	for _, tt := range []struct {
		name              string
		scrubbed          bool   // before the damage
		shared            bool   // the damaged snapshot with the volume
		of, notOf         uint32 // which snapshot is damaged
		repaired, unclear uint64
	}{
		{name: "the older one", scrubbed: true, of: 1, notOf: 2, repaired: 1},
		{name: "the newer one", scrubbed: true, of: 2, repaired: 1},
		// The volume is mended by a write, which leaves the snapshot's block as it is.
		{name: "what the volume shares", scrubbed: true, shared: true, of: 2, repaired: 2},
		{name: "nothing is known of it", of: 1, notOf: 2, unclear: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(10) {
				w := withSnapshots(t, Options{Seed: seed}, 2+int(seed%2), tt.shared)
				if tt.scrubbed {
					if s := w.scrub(); s.GetFinished() != 1 || s.GetRegions() <= volumeSize/grain || s.GetRepaired()+s.GetUnclear() != 0 {
						t.Fatalf("seed %d: the first scrub: %v", seed, s)
					}
				}
				w.servers[1].rotSnapshot(t, tt.of, tt.notOf)
				before := w.contents(t, tt.of)
				if s := w.scrub(); s.GetRepaired() != tt.repaired || s.GetUnclear() != tt.unclear {
					t.Errorf("seed %d: the scrub after a byte had changed: %v", seed, s)
				}
				if tt.unclear > 0 {
					if !slices.Equal(w.contents(t, tt.of), before) {
						t.Errorf("seed %d: the scrub has guessed", seed)
					}
					continue
				}
				if s := w.scrub(); s.GetRepaired()+s.GetUnclear() != 0 {
					t.Errorf("seed %d: the scrub after that: %v", seed, s)
				}
				w.rest(t)
			}
		})
	}
}

// contents is what each replica has of a snapshot.
func (w *world) contents(t *testing.T, id uint32) (list []string) {
	t.Helper()
	for _, s := range w.servers[:len(w.servers)-1] {
		b, err := s.snapshot(id, volumeSize)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, string(b))
	}
	return list
}

// rest detaches the volume and compares all there is.
func (w *world) rest(t *testing.T) {
	t.Helper()
	w.detach()
	w.run(w.now+10*time.Second, func() bool { return w.catalog.volume.GetAttachment() == nil })
	if w.compare(); w.violation != nil {
		t.Errorf("seed %d: %v", w.opts.Seed, w.violation)
	}
}

// A replica is made anew with all its history while another one's copy of a
// snapshot is damaged: it is given what is good from a third, and nothing if
// there is none.
func TestDamageDoesNotSpread(t *testing.T) {
	for _, tt := range []struct {
		name     string
		replicas int
		brk      mirror.Breakage
		spreads  bool
	}{
		{name: "another one is good", replicas: 3},
		{name: "none is", replicas: 2},
		{name: "broken: copies without looking", replicas: 2, brk: mirror.BreakCopyUnverified, spreads: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(10) {
				w := withSnapshots(t, Options{Seed: seed, Break: tt.brk}, tt.replicas, false)
				w.scrub()
				w.servers[1].rotSnapshot(t, 1, 2)
				w.servers[0].fs.FailSync = true
				w.think = 100 * time.Millisecond
				w.run(w.now+time.Second, never)
				w.holders[len(w.holders)-1].think() // it stood still
				w.run(w.now+20*time.Second, never)
				w.think = 24 * time.Hour
				if w.stats.Whole == 0 {
					t.Fatalf("seed %d: no replica was copied to anew", seed)
				}
				b, err := w.servers[0].snapshot(1, volumeSize)
				spread := err == nil && firstDifference(b, w.kept[1].content) >= 0
				if spread != tt.spreads {
					t.Errorf("seed %d: the new replica's snapshot has what was damaged: %v (%v)", seed, spread, err)
				}
				if tt.replicas < 3 {
					continue
				}
				if s := w.scrub(); s.GetRepaired() != 1 || s.GetUnclear() != 0 {
					t.Errorf("seed %d: the scrub after that: %v", seed, s)
				}
				w.rest(t)
			}
		})
	}
}

// A volume is rolled back to a snapshot that one of its replicas has damaged: it
// becomes what the snapshot was. If no other replica is there, what is damaged does
// not become the volume's.
func TestRollbackToWhatIsDamaged(t *testing.T) {
	for _, replicas := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(replicas), func(t *testing.T) {
			lone := 0
			defer func() {
				if lone > 3 {
					t.Errorf("in %d of 10 runs the damaged replica was alone", lone)
				}
			}()
			for seed := range uint64(10) {
				w := withSnapshots(t, Options{Seed: seed}, replicas, false)
				w.scrub()
				s := w.servers[replicas-1]
				s.rotSnapshot(t, 1, 2)
				damaged, err := s.snapshot(1, volumeSize)
				if err != nil {
					t.Fatal(err)
				}
				w.detach()
				w.run(w.now+10*time.Second, func() bool { return w.catalog.volume.GetAttachment() == nil })
				w.rollBackTo(1, w.kept[1].content)
				alone := false
				w.run(w.now+30*time.Second, func() bool {
					alone = alone || replicas > 1 && w.catalog.volume.GetRollbackTo() != 0 && !slices.ContainsFunc(w.catalog.volume.GetReplicas(), func(r *argonv1.Replica) bool {
						return int(r.GetId()) != s.number && r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
					})
					return wished(w.catalog.volume) && !slices.ContainsFunc(w.catalog.volume.GetReplicas(), func(r *argonv1.Replica) bool {
						return r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
					})
				})
				if w.violation != nil || w.stats.Rollbacks != 1 {
					t.Fatalf("seed %d: %d rollbacks, %v", seed, w.stats.Rollbacks, w.violation)
				}
				switch {
				case alone: // the holder before it was lost: it is as with one replica
					lone++
					continue
				case replicas > 1:
					w.scrub()
					w.rest(t)
					continue
				}
				w.current.over = true
				b, _, err := s.content(w.catalog.volume.GetEpoch() + 1)
				if err != nil {
					t.Fatal(err)
				}
				if i := firstDifference(damaged, w.kept[1].content); b[i] == damaged[i] {
					t.Errorf("seed %d: byte %d of the volume is what was damaged", seed, i)
				}
			}
		})
	}
}
