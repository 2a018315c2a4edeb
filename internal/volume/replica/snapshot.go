package replica

import (
	"errors"
	"fmt"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
)

// PrepareSnapshot makes what the next Snapshot needs, durably, so that that
// takes no longer than one small write. volume.ErrNoSpace also as long as there
// are as many layers as can be: then nothing stands still yet.
func (s *Session) PrepareSnapshot() error {
	return s.do(func(r *Replica) error {
		err := r.files.Prepare()
		if errors.Is(err, layer.ErrTooMany) {
			return fmt.Errorf("prepare a snapshot: %w: %w", volume.ErrNoSpace, err)
		}
		return r.outcome("prepare a snapshot", err)
	})
}

// Snapshot keeps the content as it is under an id, in a generation. If that was
// done already and nothing was written since, it does nothing; an older snapshot
// of this id loses its name. What was not flushed is not durable in the snapshot
// either, until the next Flush.
func (s *Session) Snapshot(id uint32, generation uint64) error {
	return s.alone(func(r *Replica) error {
		err := r.files.Snapshot(id, generation)
		if errors.Is(err, layer.ErrTooMany) {
			return fmt.Errorf("%w: %w", volume.ErrTooManySnapshots, err)
		}
		return r.outcome(fmt.Sprintf("make snapshot %d", id), err)
	})
}

// ReadSnapshot fills p with what a snapshot has; zeros beyond its size.
func (s *Session) ReadSnapshot(id uint32, p []byte, off int64) error {
	return s.do(func(r *Replica) error {
		v, err := r.files.LastView(id)
		if err == nil {
			err = r.check(off, int64(len(p)))
		}
		if err == nil {
			err = r.read(v.ReadAt(p, off))
		}
		if err != nil {
			return fmt.Errorf("read %d bytes at %d of snapshot %d: %w", len(p), off, id, err)
		}
		return nil
	})
}

// ChangedSnapshot is Changed, of what a snapshot has.
func (s *Session) ChangedSnapshot(id uint32, since uint64, off, n, grain int64, bits []byte) error {
	return s.do(func(r *Replica) error {
		if err := r.checkBits(off, n, grain, bits); err != nil {
			return err
		}
		v, err := r.files.LastView(id)
		switch {
		case err != nil:
			return err
		case since == 0:
			return r.read(v.HasData(off, n, grain, bits))
		}
		return r.read(v.Changed(since, off, n, grain, bits))
	})
}

// Revert makes the range what it is in a snapshot, zeros beyond its size.
func (s *Session) Revert(id uint32, off, n int64, generation uint64) error {
	return s.do(func(r *Replica) error {
		if err := r.check(off, n); err != nil {
			return err
		}
		v, err := r.files.LastView(id)
		if err != nil {
			return err
		}
		if err := r.haveRoom(n); err != nil {
			return err
		}
		return r.outcome(fmt.Sprintf("put %d bytes at %d back to snapshot %d", n, off, id), r.files.Revert(v, off, n, generation))
	})
}

// Resize makes the volume larger; the new space reads as zeros. That it is as
// large already is no error.
func (s *Session) Resize(size int64) error {
	r := s.r
	r.upkeep.Lock()
	defer r.upkeep.Unlock()
	return s.alone(func(r *Replica) error {
		if err := checkSize(size); err != nil {
			return err
		}
		return r.outcome(fmt.Sprintf("grow to %d bytes", size), r.files.Resize(size))
	})
}

// openSnapshot opens a snapshot for a replica that is based on it. That the
// disk failed later takes nothing from what was flushed with the snapshot.
func (r *Replica) openSnapshot(id uint32) (*layer.View, error) {
	if r.files.Lost() {
		return nil, fmt.Errorf("snapshot %d: %w", id, ErrFailed)
	}
	return r.files.View(id)
}
