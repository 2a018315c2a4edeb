package replica

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
)

// Replica is one copy of a volume. Safe for concurrent use.
type Replica struct {
	opts  Options
	store *Store
	files *layer.Files

	// upkeep is held by whoever changes the layers other than by a snapshot: one
	// at a time, for more than one operation. It is taken before ops.
	upkeep sync.Mutex
	closed bool // guarded by upkeep
	// Operations hold it shared, so that a new session, which takes it alone,
	// finds none of an older session under way.
	ops     sync.RWMutex
	current *Session
	sealed  uint64

	failure sync.Mutex // one reports a failure
	failed  bool       // guarded by failure
	// unreadable: the disk did not give back what it holds. That takes nothing
	// from the rest; but a copy of what was written since would leave it so.
	unreadable atomic.Bool
	// room is how many more bytes may be written before the free space is
	// looked at again.
	room atomic.Int64
}

// roomStep is how many bytes are written between two looks at the free space.
const roomStep = 16 << 20

// Info is what the replica says of itself.
func (r *Replica) Info() Info {
	sb := r.files.Superblock()
	return Info{
		VolumeID: sb.VolumeID, ReplicaID: sb.ReplicaID, Size: int64(sb.Size), SealedEpoch: sb.SealedEpoch,
		Incarnation: sb.Incarnation, Health: r.health(sb.Health),
	}
}

func (r *Replica) health(onDisk layer.Health) layer.Health {
	r.failure.Lock()
	defer r.failure.Unlock()
	if r.failed {
		return layer.Failed
	}
	return onDisk
}

// Seal begins a session for the holder of the epoch. When it returns, the
// epoch is on disk, lower ones are refused for ever, and nothing of an earlier
// session is under way or can begin (I4). The newest session of an epoch wins.
func (r *Replica) Seal(epoch uint64) (*Session, Info, error) {
	if isClosed(r.store.suspension()) {
		return nil, Info{}, ErrSuspended
	}
	r.ops.Lock()
	defer r.ops.Unlock()
	if epoch < r.sealed && !r.opts.Hooks.AcceptOldEpoch {
		return nil, Info{}, &SealedError{Epoch: r.sealed}
	}
	if !r.opts.Hooks.ForgetSeal {
		err := r.files.Update(func(sb *layer.Superblock) {
			sb.SealedEpoch = max(sb.SealedEpoch, epoch)
			// Whoever has a session may write.
			sb.Clean = false
		})
		if err = r.judge(err); err != nil {
			return nil, Info{}, err
		}
	}
	r.sealed = max(r.sealed, epoch)
	r.current = &Session{r: r}
	return r.current, r.Info(), nil
}

// close ends the session, if there is one, when nothing of it is under way, and
// closes the files.
func (r *Replica) close() error {
	r.upkeep.Lock()
	defer r.upkeep.Unlock()
	r.ops.Lock()
	defer r.ops.Unlock()
	r.current, r.closed = nil, true
	return r.files.Close()
}

// judge marks the replica as failed if there is an error, on disk if that
// still takes it (I8).
func (r *Replica) judge(err error) error {
	if err == nil || r.opts.Hooks.IgnoreFailure {
		return nil
	}
	r.failure.Lock()
	defer r.failure.Unlock()
	if !r.failed {
		r.failed = true
		sb := r.files.Superblock()
		r.opts.Log.Error("a replica's disk failed; the copy is not used any more", "volume", sb.VolumeID, "replica", sb.ReplicaID, "err", err)
		if uerr := r.files.Update(func(sb *layer.Superblock) { sb.Health = layer.Failed }); uerr != nil {
			r.opts.Log.Error("and that could not be written down", "volume", sb.VolumeID, "replica", sb.ReplicaID, "err", uerr)
		}
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}

// Session is a holder's right to use a replica, until the next one. Safe for
// concurrent use on ranges that do not overlap.
type Session struct{ r *Replica }

// do runs an operation unless the session is over or the disk has failed.
func (s *Session) do(op func(*Replica) error) error {
	s.r.ops.RLock()
	defer s.r.ops.RUnlock()
	if s.r.current != s {
		return ErrFenced
	}
	if s.r.health(layer.Good) == layer.Failed {
		return ErrFailed
	}
	return op(s.r)
}

// alone runs an operation as do does, while no other is under way.
func (s *Session) alone(op func(*Replica) error) error {
	s.r.ops.Lock()
	defer s.r.ops.Unlock()
	if s.r.current != s {
		return ErrFenced
	}
	if s.r.health(layer.Good) == layer.Failed {
		return ErrFailed
	}
	return op(s.r)
}

// ReadAt fills p.
func (s *Session) ReadAt(p []byte, off int64) error {
	return s.do(func(r *Replica) error {
		if err := r.check(off, int64(len(p))); err != nil {
			return err
		}
		if err := r.read(r.files.ReadAt(p, off)); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
		}
		return nil
	})
}

// read notes an error of reading, if it is the disk's.
func (r *Replica) read(err error) error {
	if err == nil || errors.Is(err, layer.ErrBase) || errors.Is(err, volume.ErrNoSnapshot) || errors.Is(err, volume.ErrDamaged) || errors.Is(err, volume.ErrRange) {
		return err
	}
	if !r.unreadable.Swap(true) {
		sb := r.files.Superblock()
		r.opts.Log.Error("a replica's disk cannot read what it holds", "volume", sb.VolumeID, "replica", sb.ReplicaID, "err", err)
	}
	return err
}

// WriteAt writes p in a generation; with fua it survives a power cut.
// volume.ErrNoSpace means that there is no room and nothing else is wrong; the
// range may then have parts of p.
func (s *Session) WriteAt(p []byte, off int64, generation uint64, fua bool) error {
	return s.do(func(r *Replica) error { return r.write(p, off, generation, fua) })
}

// atOnce bounds, in bytes, what TryReadAt and TryWriteAt do: a copy within
// memory that takes no longer than waking a goroutine.
const atOnce = 64 << 10

// TryReadAt fills p if that does not wait for the disk; otherwise done is false.
func (s *Session) TryReadAt(p []byte, off int64) (done bool, err error) {
	if len(p) > atOnce {
		return false, nil
	}
	err = s.do(func(r *Replica) error {
		if err := r.check(off, int64(len(p))); err != nil {
			return err
		}
		// Errors are for ReadAt to find.
		done = r.files.ReadCached(p, off)
		return nil
	})
	return done || err != nil, err
}

// TryWriteAt writes p if that most likely does not wait for the disk: nothing
// has to be put on disk before, there is room, and no page has to be read to write a
// part of it. Otherwise done is false.
func (s *Session) TryWriteAt(p []byte, off int64, generation uint64) (done bool, err error) {
	n := int64(len(p))
	if n == 0 || n > atOnce || (off|n)%pageSize != 0 {
		return false, nil
	}
	err = s.do(func(r *Replica) error {
		if err := r.check(off, n); err != nil {
			return err
		}
		if done = r.files.Ready(off, n, generation); !done {
			return nil
		}
		return r.write(p, off, generation, false)
	})
	return done || err != nil, err
}

// pageSize is that of the kernel's page cache, or a multiple of it.
const pageSize = 4096

// Zero makes the range zeros, and gives its space back.
func (s *Session) Zero(off, n int64, generation uint64, fua bool) error {
	return s.do(func(r *Replica) error {
		return r.change(off, n, generation, fua, func(generation uint64) error {
			if err := r.haveRoom(r.files.CopyUp(off, n)); err != nil {
				return err
			}
			return r.files.Zero(off, n, generation)
		})
	})
}

// Trim does the same: replicas must stay equal, so what is not needed any more
// reads as zeros on all.
func (s *Session) Trim(off, n int64, generation uint64, fua bool) error {
	return s.Zero(off, n, generation, fua)
}

// write writes p. While the replica is copied to, what is zeros becomes holes: the
// copy would otherwise take all that a region has room for where the source has a
// page of it.
func (r *Replica) write(p []byte, off int64, generation uint64, fua bool) error {
	n := int64(len(p))
	return r.change(off, n, generation, fua, func(generation uint64) error {
		write, takes := r.files.Write, n
		if r.files.Superblock().Health == layer.Syncing {
			write, takes = r.files.WriteThin, layer.DataBytes(p, off)
		}
		if err := r.haveRoom(takes + r.files.CopyUp(off, n)); err != nil {
			return err
		}
		return write(p, off, generation)
	})
}

// change changes the range; op stamps it before: if the power goes in between, a
// region that is unchanged counts as changed, and never the other way round.
func (r *Replica) change(off, n int64, generation uint64, fua bool, op func(generation uint64) error) error {
	if err := r.check(off, n); err != nil {
		return err
	}
	if r.opts.Hooks.AckBeforeWrite {
		return nil
	}
	if r.opts.Hooks.ForgetStamp {
		generation = 0
	}
	err := op(generation)
	if err == nil && fua {
		return r.judge(r.sync())
	}
	if err != nil {
		return r.outcome(fmt.Sprintf("write %d bytes at %d", n, off), err)
	}
	return nil
}

// outcome judges the error of a change. A full disk, a base that cannot be read,
// and a damage that was found in time take nothing from what the replica holds.
func (r *Replica) outcome(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, volume.ErrNoSpace), layer.IsFull(err):
		r.room.Store(0)
		return fmt.Errorf("%s: %w", what, volume.ErrNoSpace)
	case errors.Is(err, layer.ErrBase), errors.Is(err, volume.ErrNoSnapshot), errors.Is(err, volume.ErrDamaged):
		return fmt.Errorf("%s: %w", what, err)
	}
	return r.judge(err)
}

// Changed sets a bit for each grain of the range, in bytes, that may have been
// written in the generation since or later; if since is 0, for each that may
// hold anything but zeros.
func (s *Session) Changed(since uint64, off, n, grain int64, bits []byte) error {
	return s.do(func(r *Replica) error {
		if err := r.checkBits(off, n, grain, bits); err != nil {
			return err
		}
		if since == 0 {
			return r.read(r.files.HasData(off, n, grain, bits))
		}
		r.files.Changed(since, off, n, grain, bits)
		return nil
	})
}

// Extents calls found for each stretch of the range, hole or data, until that
// returns false. Holes read as zeros.
func (s *Session) Extents(off, n int64, found func(n int64, hole bool) bool) error {
	return s.do(func(r *Replica) error {
		if err := r.check(off, n); err != nil {
			return err
		}
		return r.files.Extents(off, n, found)
	})
}

// Flush makes everything that was answered before survive a power cut.
func (s *Session) Flush() error {
	return s.do(func(r *Replica) error {
		return r.judge(r.sync())
	})
}

func (r *Replica) sync() error {
	if r.opts.Hooks.FlushWithoutSync {
		return nil
	}
	return r.files.SyncData()
}

// BeginSync marks the replica as not to be trusted; a copy from the holder
// follows, of a volume of this size, 0: as it is. Its incarnation is a new one:
// whatever was agreed on before does not count.
//
// base is the generation before which nothing can differ from the source; 0 if
// there is none. Without one, after a failed read, write or sync, when it was
// emptied later than that, or when what it begins with cannot be read, the replica is
// emptied, and begins on new files, without snapshots; generation, that of the
// first copies, is then what all of it counts as stamped with, or what follows the
// base, if that is later. ErrInUse as long as
// other volumes' replicas here read its snapshots.
func (s *Session) BeginSync(base, generation uint64, size int64) (Info, error) {
	r := s.r
	r.store.basing.Lock()
	defer r.store.basing.Unlock()
	r.upkeep.Lock()
	defer r.upkeep.Unlock()
	r.ops.Lock()
	defer r.ops.Unlock()
	if r.current != s {
		return Info{}, ErrFenced
	}
	if err := checkSize(size); err != nil {
		return Info{}, err
	}
	sb := r.files.Superblock()
	begin := func(sb *layer.Superblock) {
		sb.Incarnation++
		sb.Health = layer.Syncing
	}
	emptied := base == 0 || sb.Generation > base || r.health(sb.Health) == layer.Failed || r.unreadable.Load() || !r.files.BaseReadable()
	var err error
	if emptied {
		if err := r.store.inUse(sb.VolumeID); err != nil {
			return Info{}, err
		}
		err = r.files.Reset(func(sb *layer.Superblock) {
			begin(sb)
			// Later than the base: if this holder is lost before it has recorded
			// that nothing was kept, the next one comes with the same base.
			sb.Generation = max(generation, base+1)
			sb.Size = max(sb.Size, uint64(size))
		})
	} else if err = r.files.Update(begin); err == nil {
		err = r.files.Resize(size)
	}
	if err = r.outcome("begin a copy", err); err != nil {
		return Info{}, err
	}
	r.failure.Lock()
	r.failed = false
	r.failure.Unlock()
	r.unreadable.Store(false)
	info := r.Info()
	info.Emptied = emptied
	return info, nil
}

// EndSync flushes the replica and marks it good, durably.
func (s *Session) EndSync() error {
	return s.do(func(r *Replica) error {
		err := r.sync()
		if err == nil {
			err = r.files.Update(func(sb *layer.Superblock) { sb.Health = layer.Good })
		}
		return r.judge(err)
	})
}

// Close ends the session. clean: the holder has flushed and wrote nothing
// since; the replica makes sure and notes it, so that a reboot costs nothing.
func (s *Session) Close(clean bool) error {
	r := s.r
	r.ops.Lock()
	defer r.ops.Unlock()
	if r.current != s {
		return nil
	}
	r.current = nil
	if !clean || r.health(layer.Good) == layer.Failed {
		return nil
	}
	if err := r.judge(r.sync()); err != nil {
		return err
	}
	return r.judge(r.files.Update(func(sb *layer.Superblock) { sb.Clean = sb.Health == layer.Good }))
}

func (r *Replica) check(off, n int64) error {
	size := r.files.Size()
	if off < 0 || n < 0 || off%volume.SectorSize != 0 || n%volume.SectorSize != 0 || off > size-n {
		return fmt.Errorf("%d bytes at %d of %d: %w", n, off, size, volume.ErrRange)
	}
	return nil
}

// checkSize refuses what no volume has: what is kept in memory of each region would
// take all there is.
func checkSize(size int64) error {
	if size < 0 || size > volume.MaxSize || size%volume.SectorSize != 0 {
		return fmt.Errorf("a size of %d: %w", size, volume.ErrRange)
	}
	return nil
}

func (r *Replica) checkBits(off, n, grain int64, bits []byte) error {
	if grain <= 0 || int64(len(bits))*8*grain < n {
		return fmt.Errorf("%d bytes of bits for %d bytes by %d: %w", len(bits), n, grain, volume.ErrRange)
	}
	return r.check(off, n)
}

// haveRoom looks after the reserve: a file system that is full to the last
// block makes an fsync fail, which costs the replica. What takes nothing, and may
// give something back, needs no room.
func (r *Replica) haveRoom(n int64) error {
	if n == 0 || r.room.Add(-n) > 0 {
		return nil
	}
	free, err := r.files.Free()
	if err != nil {
		return err
	}
	if free < r.opts.ReserveBytes+uint64(n) {
		r.room.Store(0)
		return volume.ErrNoSpace
	}
	r.room.Store(int64(min(free-r.opts.ReserveBytes, roomStep)))
	return nil
}
