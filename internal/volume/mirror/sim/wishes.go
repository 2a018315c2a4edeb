package sim

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// This file is what operators want of the volume beside its I/O — snapshots,
// rollbacks, growth, scrubs, fewer replicas — and what the servers' agents do about it.

const (
	// maxSectors bounds how far a volume grows.
	maxSectors = sectors + 16
	// maxWished bounds how many snapshots a volume has.
	maxWished = 4
	// operators is the holder that the checker knows operators by.
	operators = 0
)

// kept is a snapshot as it was when it became ready.
type kept struct {
	content []byte // nil: nobody could be asked
	read    opID
}

// wish lets an operator want one thing, then plans the next.
func (w *world) wish() {
	if w.quiet {
		return
	}
	v := w.catalog.volume
	switch p := w.rng.Float64(); {
	case p < 0.45 && len(v.GetSnapshots()) < maxWished:
		w.wishSnapshot()
	case p < 0.65 && len(v.GetSnapshots()) > 0:
		w.deleteSnapshot(v.GetSnapshots()[w.rng.IntN(len(v.GetSnapshots()))].GetId())
	case p < 0.75:
		w.wishRollback()
	case p < 0.85 && v.GetSizeBytes() < maxSectors*volume.SectorSize:
		w.change("the volume shall grow", func(v *argonv1.Volume) {
			// Never less than what was wanted before: a replica may be there already.
			v.WantedBytes = max(v.GetWantedBytes(), v.GetSizeBytes()+uint64(1+w.rng.IntN(6))*volume.SectorSize)
			v.WantedBytes = min(v.WantedBytes, maxSectors*volume.SectorSize)
		})
	default:
		w.change("the volume shall be scrubbed", func(v *argonv1.Volume) {
			if v.Scrub == nil {
				v.Scrub = &argonv1.Scrub{}
			}
			v.Scrub.Wanted++
		})
	}
	w.after(w.between(100*time.Millisecond, 4*time.Second), w.wish)
}

// change is what a handler does to the record, at once.
func (w *world) change(what string, change func(*argonv1.Volume)) {
	w.trace("%s", what)
	w.catalog.alter(change)
}

// wishFewer has a replica leave the set, and wants it back after a while. The
// holder keeps it if no other could carry on.
func (w *world) wishFewer() {
	if w.quiet {
		return
	}
	replicas := w.catalog.volume.GetReplicas()
	id := replicas[w.rng.IntN(len(replicas))].GetId()
	retire := func(yes bool) func(*argonv1.Volume) {
		return func(v *argonv1.Volume) {
			v.ReplicasWanted = uint32(len(v.GetReplicas()))
			for _, r := range v.GetReplicas() {
				if r.Retiring = yes && r.GetId() == id; r.GetRetiring() {
					v.ReplicasWanted = max(1, v.GetReplicasWanted()-1)
				}
			}
		}
	}
	w.change("a replica shall leave", retire(true))
	w.after(w.between(50*time.Millisecond, 4*time.Second), func() {
		w.change("no replica shall leave", retire(false))
		w.after(w.between(100*time.Millisecond, 4*time.Second), w.wishFewer)
	})
}

func (w *world) wishSnapshot() {
	id := max(w.catalog.volume.GetNextSnapshotId(), 1)
	w.kept[id] = &kept{read: w.checker.Read(operators, 0, maxSectors)}
	w.change("a snapshot is wanted", func(v *argonv1.Volume) {
		v.NextSnapshotId = id + 1
		v.Snapshots = append(v.Snapshots, &argonv1.Snapshot{Id: id, State: argonv1.SnapshotState_SNAPSHOT_STATE_CREATING})
	})
}

func (w *world) deleteSnapshot(id uint32) {
	if w.catalog.volume.GetRollbackTo() == id {
		return
	}
	w.change("a snapshot is deleted", func(v *argonv1.Volume) {
		v.Snapshots = slices.DeleteFunc(v.Snapshots, func(s *argonv1.Snapshot) bool { return s.GetId() == id })
	})
}

// wishRollback detaches the volume, and asks for a rollback once nobody uses it.
func (w *world) wishRollback() {
	w.detach()
	w.after(w.between(10*time.Millisecond, time.Second), func() {
		v := w.catalog.volume
		if w.quiet || v.GetAttachment() != nil || v.GetRollbackTo() != 0 || w.violation != nil {
			return
		}
		for _, s := range v.GetSnapshots() {
			if k := w.kept[s.GetId()]; s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_READY && k.content != nil {
				w.rollBackTo(s.GetId(), k.content)
				return
			}
		}
	})
}

// rollBackTo tells the checker that every sector will be written, with what the
// snapshot holds.
func (w *world) rollBackTo(id uint32, content []byte) {
	for i := range maxSectors {
		v := value(0)
		if off := i * volume.SectorSize; off < len(content) {
			v, _ = valueOf(content[off : off+volume.SectorSize])
		}
		w.rollback = append(w.rollback, w.checker.Write(operators, i, 1, v, true))
	}
	w.change("the volume is to be rolled back", func(v *argonv1.Volume) { v.RollbackTo = id })
}

// follow notes what the record says for the first time.
func (w *world) follow(before, after *argonv1.Volume) {
	if before.GetRollbackTo() != 0 && after.GetRollbackTo() == 0 {
		w.trace("the volume is rolled back")
		for _, id := range w.rollback {
			w.checker.Answered(id, nil)
		}
		w.rollback = nil
		w.stats.Rollbacks++
	}
	if after.GetScrub().GetFinished() > before.GetScrub().GetFinished() {
		w.stats.Scrubs++
		if s := after.GetScrub(); s.GetRepaired()+s.GetUnclear() > 0 && !w.rotten {
			w.fail("a scrub found a difference that nobody made: %v", s)
		}
	}
	if after.GetSizeBytes() > before.GetSizeBytes() {
		w.stats.Grown++
	}
	for i, r := range after.GetReplicas() {
		in := argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
		if r.GetRetiring() && r.GetState() != in && before.GetReplicas()[i].GetState() == in {
			w.stats.Retired++
		}
	}
	for _, s := range after.GetSnapshots() {
		ready := argonv1.SnapshotState_SNAPSHOT_STATE_READY
		if s.GetState() == ready && !slices.ContainsFunc(before.GetSnapshots(), func(b *argonv1.Snapshot) bool {
			return b.GetId() == s.GetId() && b.GetState() == ready
		}) {
			w.ready(s)
		}
	}
}

// ready looks at a snapshot at once: what it holds was the volume's content at
// some instant since it was asked for, and will never be anything else.
func (w *world) ready(s *argonv1.Snapshot) {
	w.stats.Snapshots++
	k := w.kept[s.GetId()]
	w.trace("snapshot %d is ready in generation %d", s.GetId(), s.GetGeneration())
	w.compareSnapshot(s)
	if k.content == nil {
		return
	}
	got := make([]value, maxSectors)
	for i := range len(k.content) / volume.SectorSize {
		v, err := valueOf(k.content[i*volume.SectorSize : (i+1)*volume.SectorSize])
		if err != nil {
			w.fail("snapshot %d: %w", s.GetId(), err)
			return
		}
		got[i] = v
	}
	w.checker.Answered(k.read, got)
	if w.chance(0.1) && !w.quiet { // what only seems to be safe shows now
		srv := w.servers[s.GetReplicaIds()[w.rng.IntN(len(s.GetReplicaIds()))]-1]
		w.after(w.between(0, 5*time.Millisecond), func() { srv.crash(true) })
	}
}

// compareSnapshot expects the same content on every replica that has the
// snapshot, now as ever.
func (w *world) compareSnapshot(s *argonv1.Snapshot) {
	k := w.kept[s.GetId()]
	for _, id := range s.GetReplicaIds() {
		srv := w.servers[id-1]
		if !srv.up || srv.diskBroken {
			continue
		}
		b, err := srv.snapshot(s.GetId(), s.GetSizeBytes())
		if err != nil {
			w.fail("snapshot %d cannot be read on %s, which has it: %w", s.GetId(), srv.name, err)
			return
		}
		if k.content == nil {
			k.content = b
		}
		if i := firstDifference(k.content, b); i >= 0 || len(b) != len(k.content) {
			w.fail("snapshot %d on %s is not what it was: sector %d differs", s.GetId(), srv.name, i/volume.SectorSize)
			return
		}
	}
}

// snapshot is the content of a snapshot on the server.
func (s *server) snapshot(id uint32, size uint64) ([]byte, error) {
	r, err := s.store.Get(volumeID, uint32(s.number))
	if err != nil {
		return nil, err
	}
	view, err := r.OpenSnapshot(id)
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	return b, errors.Join(view.ReadAt(b, 0), view.Close())
}

// upkeep does what the agent of a server does for its replica: it forgets
// snapshots that are deleted, as far as it knows, and gives their space back.
func (w *world) upkeep(s *server) {
	w.after(w.between(20*time.Millisecond, 500*time.Millisecond), func() {
		if s.up && s.view != nil && !w.untidy {
			// A disk that failed is the holder's to find out.
			if err := errors.Join(s.tidy(), s.detachBase()); err != nil && !errors.Is(err, volume.ErrNoSpace) && !errors.Is(err, replica.ErrFailed) {
				w.fail("%s cannot give space back: %w", s.name, err)
			}
		}
		w.upkeep(s)
	})
}

func (s *server) tidy() error {
	r, err := s.store.Get(volumeID, uint32(s.number))
	if err != nil {
		return err
	}
	for _, here := range r.Snapshots() {
		wanted := slices.ContainsFunc(s.view.GetSnapshots(), func(x *argonv1.Snapshot) bool { return x.GetId() == here.ID })
		if !wanted && here.ID < s.view.GetNextSnapshotId() {
			s.w.trace("%s forgets snapshot %d", s.name, here.ID)
			if err := r.Forget(here.ID); err != nil {
				return err
			}
		}
	}
	_, err = r.Tidy(context.Background())
	return err
}

// wished tells whether everything that operators want is done.
func wished(v *argonv1.Volume) bool {
	return v.GetRollbackTo() == 0 && v.GetWantedBytes() <= v.GetSizeBytes() &&
		v.GetScrub().GetWanted() == v.GetScrub().GetFinished() &&
		!slices.ContainsFunc(v.GetSnapshots(), func(s *argonv1.Snapshot) bool {
			return s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_CREATING
		})
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
