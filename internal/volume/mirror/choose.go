package mirror

import (
	"errors"
	"fmt"
	"slices"
)

// Errors that end an attachment.
var (
	// ErrDeposed: the volume has a newer holder.
	ErrDeposed = errors.New("the volume was attached elsewhere")
	// ErrCatalogBehind: a replica has seen a higher epoch than the catalog
	// shows (rule I9).
	ErrCatalogBehind = errors.New("the catalog is older than the volume")
	// ErrReplicasLost: no replica of the in-sync set can be trusted any more.
	ErrReplicasLost = errors.New("no replica in sync is left")
	// ErrRestarted: every in-sync replica restarted under a living holder, so
	// writes that were acknowledged and not flushed may be gone. What ran on
	// the volume must start afresh, as after a power cut.
	ErrRestarted = errors.New("every replica in sync was restarted; writes that were not flushed may be lost")
)

// Health is what a replica says of its own copy.
type Health uint8

// A replica's own word about its copy.
const (
	Good Health = iota + 1
	// Syncing: a copy to it was begun and not ended.
	Syncing
	// Failed: a write or an fsync failed (rule I8).
	Failed
)

// Info is what a replica answers when it is sealed, and when a copy to it
// begins.
type Info struct {
	Incarnation uint64
	Health      Health
	// Emptied: nothing of what it had was kept.
	Emptied bool
	// Old: its server knows no checksums of snapshots, see wire.ProtocolV1.
	Old bool
}

// answer is what is known of an in-sync replica while attaching.
type answer struct {
	up   bool
	info Info
	// gone: its server has no lease, there is no use in waiting for it.
	gone bool
	near bool
}

// choice is who an attachment starts with.
type choice struct {
	// wait: nothing can be decided yet.
	wait bool
	// keep is the new in-sync set; its first member is the source.
	keep []Member
	// afresh: writes that were acknowledged and not flushed may be gone.
	afresh bool
	err    error
}

// choose decides which of the in-sync replicas an attachment starts with.
//
// Only a replica of the set can be the source (I2), and only if it lost
// nothing (I7): its incarnation is the recorded one, or the last attachment
// ended clean, so that everything was flushed on all. If every one of them
// restarted, all servers lost power: what was not flushed may be gone
// everywhere, each still has every flushed write, and any one will do — but
// just one, since they may differ.
//
// After an unclean end the others may differ from the source in the writes
// that were under way, so they leave the set and are copied to.
func choose(set []Member, answers map[uint32]answer, clean, patient bool) choice {
	var good, changed, failed []Member
	near := map[uint32]bool{}
	unanswered := 0
	for _, m := range set {
		a := answers[m.ID]
		near[m.ID] = a.near
		now := Member{ID: m.ID, Incarnation: a.info.Incarnation}
		switch {
		case !a.up:
			if !a.gone {
				unanswered++
			}
		case a.info.Health != Good:
			failed = append(failed, now)
		case clean || a.info.Incarnation == m.Incarnation:
			good = append(good, now)
		default:
			changed = append(changed, now)
		}
	}
	nearFirst := func(a, b Member) int {
		switch {
		case near[a.ID] == near[b.ID]:
			return int(a.ID) - int(b.ID)
		case near[a.ID]:
			return -1
		default:
			return 1
		}
	}
	slices.SortFunc(good, nearFirst)
	slices.SortFunc(changed, nearFirst)
	switch {
	case len(good) > 0 && unanswered > 0 && patient:
		return choice{wait: true}
	case len(good) > 0 && clean:
		return choice{keep: good}
	case len(good) > 0:
		return choice{keep: good[:1]}
	case len(changed) == len(set):
		return choice{keep: changed[:1], afresh: true}
	case len(failed) > 0 && len(failed)+len(changed) == len(set):
		return choice{err: fmt.Errorf("%d failed, %d restarted with writes not flushed: %w", len(failed), len(changed), ErrReplicasLost)}
	}
	return choice{wait: true}
}
