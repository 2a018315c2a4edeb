package replica

import (
	"context"
	"errors"
	"fmt"

	"github.com/argon-cluster/argon/internal/volume/layer"
)

// ErrInUse: another volume's replica on this server reads what should go.
var ErrInUse = errors.New("a volume that was made from it still reads it")

// SnapshotInfo is a snapshot that is here.
type SnapshotInfo struct {
	ID         uint32
	Generation uint64
	Size       int64
}

// Snapshots are what is here, oldest first.
func (r *Replica) Snapshots() []SnapshotInfo {
	var list []SnapshotInfo
	for _, e := range r.files.Snapshots() {
		list = append(list, SnapshotInfo{ID: e.Snapshot, Generation: e.Generation, Size: int64(e.Size)})
	}
	return list
}

// OpenSnapshot opens a snapshot to be read. It ends with Forget.
func (r *Replica) OpenSnapshot(id uint32) (*layer.View, error) {
	if r.health(layer.Good) == layer.Failed {
		return nil, fmt.Errorf("snapshot %d: %w", id, ErrFailed)
	}
	return r.files.View(id)
}

// Forget takes a snapshot's name off, durably: it is gone. Its space comes back
// with Tidy. That there is none is no error.
func (r *Replica) Forget(id uint32) error {
	r.store.basing.Lock()
	defer r.store.basing.Unlock()
	if r.store.needed(r.Info().VolumeID, id) {
		return fmt.Errorf("forget snapshot %d: %w", id, ErrInUse)
	}
	return r.maintain(func() error {
		if err := r.files.Settle(); err != nil {
			return err
		}
		r.ops.Lock()
		defer r.ops.Unlock()
		return r.files.Forget(id)
	})
}

// maintain runs a change of the layers, unless the replica is closed or its disk
// has failed.
func (r *Replica) maintain(do func() error) error {
	r.upkeep.Lock()
	defer r.upkeep.Unlock()
	if r.closed {
		return ErrNotFound
	}
	if r.health(layer.Good) == layer.Failed {
		return ErrFailed
	}
	return r.outcome("maintain the layers", do())
}

// Untidy tells whether Tidy has something to do. A replica whose disk failed is left
// alone: it is emptied.
func (r *Replica) Untidy() bool {
	return r.health(layer.Good) != layer.Failed && r.files.Untidy()
}

// Tidy does a bounded part of what gives back the space of snapshots that were
// deleted. More tells whether there is more to do.
func (r *Replica) Tidy(ctx context.Context) (more bool, err error) {
	err = r.maintain(func() error {
		if err := ctx.Err(); err != nil {
			return nil
		}
		drained, err := r.files.MoveDown()
		if err != nil || !drained {
			return err
		}
		r.ops.Lock()
		defer r.ops.Unlock()
		return r.files.DropLayer()
	})
	if err = errors.Join(err, ctx.Err()); err != nil {
		return false, fmt.Errorf("tidy a replica: %w", err)
	}
	return r.files.Untidy(), nil
}

// Based tells whether the replica reads what it does not hold from an image or
// another volume's snapshot.
func (r *Replica) Based() bool { return r.files.Based() }

// DetachBase does a bounded part of copying what is needed of the base, until it
// is not needed any more. More tells whether there is more to do.
func (r *Replica) DetachBase(ctx context.Context) (more bool, err error) {
	err = r.maintain(func() error {
		if err := ctx.Err(); err != nil {
			return nil
		}
		whole, err := r.copyDown()
		if err != nil || !whole {
			return err
		}
		if err := r.files.Settle(); err != nil {
			return err
		}
		r.ops.Lock()
		defer r.ops.Unlock()
		return r.files.DropBase()
	})
	if err = errors.Join(err, ctx.Err()); err != nil {
		return false, fmt.Errorf("copy from the base: %w", err)
	}
	return r.files.Based(), nil
}

func (r *Replica) copyDown() (whole bool, err error) {
	r.ops.RLock()
	defer r.ops.RUnlock()
	if err := r.haveRoom(r.files.DetachRoom()); err != nil {
		return false, err
	}
	return r.files.CopyDown()
}

// Detached is how far DetachBase has come, in bytes of the volume.
func (r *Replica) Detached() uint64 {
	r.upkeep.Lock()
	defer r.upkeep.Unlock()
	return r.files.Detached()
}

// Usage is how many bytes the replica takes on the disk, and how many of these
// only for its snapshots.
func (r *Replica) Usage() (used, snapshots uint64, err error) {
	r.upkeep.Lock()
	defer r.upkeep.Unlock()
	if r.closed {
		return 0, 0, ErrNotFound
	}
	return r.files.Usage()
}

// needed tells whether a snapshot of a volume, 0: any, is what another replica
// here begins with.
func (s *Store) needed(volumeID string, id uint32) bool {
	return s.anyBase(func(b layer.BaseRef) bool { return b.Volume == volumeID && (id == 0 || b.Snapshot == id) })
}

// RemoveImage calls remove unless a replica here reads from the image: then
// ErrInUse. No replica is made of it meanwhile.
func (s *Store) RemoveImage(id string, remove func() error) error {
	s.basing.Lock()
	defer s.basing.Unlock()
	if s.anyBase(func(b layer.BaseRef) bool { return b.Image == id }) {
		return fmt.Errorf("image %s: %w", id, ErrInUse)
	}
	return remove()
}

func (s *Store) anyBase(is func(layer.BaseRef) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.replicas {
		if is(r.files.Superblock().Base) {
			return true
		}
	}
	return false
}

// inUse refuses what would take snapshots away that others read.
func (s *Store) inUse(volumeID string) error {
	if s.needed(volumeID, 0) {
		return fmt.Errorf("volume %s: %w", volumeID, ErrInUse)
	}
	return nil
}
