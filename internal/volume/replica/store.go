package replica

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
)

// Errors that callers decide by.
var (
	ErrNotFound = errors.New("no such replica on this server")
	// ErrFailed: a write or an fsync failed; the copy is not trusted until it
	// was copied to anew (rule I8).
	ErrFailed = errors.New("the replica's disk failed")
	// ErrFenced: another session began, or this one was closed.
	ErrFenced = errors.New("the session with the replica is over")
	// ErrSuspended: the disk answers nothing at the moment.
	ErrSuspended = errors.New("the disk does not answer")
	// ErrForeign: the directory belongs to another cluster.
	ErrForeign = errors.New("belongs to another cluster")
)

// SealedError refuses a holder: the replica has seen a higher epoch (I4).
type SealedError struct{ Epoch uint64 }

func (e *SealedError) Error() string { return fmt.Sprintf("sealed in epoch %d", e.Epoch) }

// Options are what a Store needs.
type Options struct {
	FS layer.FS
	// Dir holds the replicas, DIR/<volume id>/<replica id>.
	Dir       string
	ClusterID string
	// BootID names the kernel's boot: while it is the same, nothing that was
	// handed to the kernel is lost, whatever happened to this process.
	BootID string
	// ReserveBytes of the disk are left free.
	ReserveBytes uint64
	// RegionSize of new replicas in bytes; 0: layer.RegionSize.
	RegionSize uint32
	// Images finds the file of an image that replicas begin with.
	Images func(id string) (path string)
	Log    *slog.Logger
	// Hooks break rules. For tests only.
	Hooks Hooks
}

// Hooks switch rules off, so that tests can see the checker notice. All false
// outside of tests.
type Hooks struct {
	ForgetSeal       bool // I4: the sealed epoch is not kept on disk
	AcceptOldEpoch   bool // I4: a lower epoch is not refused
	KeepIncarnation  bool // I7: a power cut goes unnoticed
	IgnoreFailure    bool // I8: go on after a failed write or fsync
	FlushWithoutSync bool // I1: a flush is answered without fdatasync
	AckBeforeWrite   bool // I1: a write is answered and never carried out
	ForgetStamp      bool // a write is not stamped
	LazyStamp        bool // a stamp is not durable before its data
	HoldBeforeData   bool // a block counts as held before its content is durable
	ForgetCopyUp     bool // a block counts as held without the rest of its content
	ForgetFrozen     bool // what was written before a snapshot is not flushed after it
	ForgetSettle     bool // a flush leaves pages of tables provisional
	StampLater       bool // a stamp may be provisional where blocks are written in place
	MoveUnsynced     bool // a block leaves its layer before it is durable in the one below
	StaleSums        bool // a recorded checksum counts when its region was written since
}

func (h Hooks) layers() layer.Hooks {
	return layer.Hooks{
		LazyStamps: h.LazyStamp, HoldBeforeData: h.HoldBeforeData, ForgetCopyUp: h.ForgetCopyUp,
		ForgetFrozen: h.ForgetFrozen, MoveUnsynced: h.MoveUnsynced, StaleSums: h.StaleSums,
		ForgetSettle: h.ForgetSettle, StampLater: h.StampLater,
	}
}

// Info is what a replica says of itself.
type Info struct {
	VolumeID    string
	ReplicaID   uint32
	Size        int64
	SealedEpoch uint64
	Incarnation uint64
	Health      layer.Health
	// Emptied: BeginSync found nothing that could be kept.
	Emptied bool
}

// Store is all replicas of one server. Safe for concurrent use.
type Store struct {
	opts Options

	// basing is held by whoever makes a replica that reads another's snapshot,
	// and by whoever takes snapshots away. It is taken before a replica's locks.
	basing sync.Mutex

	mu       sync.Mutex
	replicas map[key]*Replica
	// suspended is closed while the disk answers nothing, and ends connections.
	suspended chan struct{}
}

type key struct {
	volumeID string
	id       uint32
}

// Open finds the replicas in the directory. One that cannot be read is left
// alone and logged: it counts as not there.
func Open(opts Options) (*Store, error) {
	s := &Store{opts: opts, replicas: map[key]*Replica{}, suspended: make(chan struct{})}
	if err := opts.FS.MkdirAll(opts.Dir); err != nil {
		return nil, fmt.Errorf("replicas: %w", err)
	}
	volumes, err := opts.FS.ReadDir(opts.Dir)
	if err != nil {
		return nil, fmt.Errorf("replicas: %w", err)
	}
	for _, v := range volumes {
		names, err := opts.FS.ReadDir(path.Join(opts.Dir, v))
		if err != nil {
			return nil, fmt.Errorf("replicas: %w", err)
		}
		for _, n := range names {
			if err := s.adopt(v, n); err != nil {
				return nil, errors.Join(err, s.Close())
			}
		}
	}
	return s, nil
}

// adopt opens what was found in the directory.
func (s *Store) adopt(volumeID, name string) error {
	dir := path.Join(s.opts.Dir, volumeID, name)
	if strings.HasPrefix(name, ".") { // never finished, or half deleted
		if err := s.opts.FS.RemoveAll(dir); err != nil {
			return fmt.Errorf("replicas: %w", err)
		}
		return nil
	}
	id, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		s.opts.Log.Warn("not a replica; left alone", "path", dir)
		return nil
	}
	r, err := s.open(dir)
	switch {
	case errors.Is(err, ErrForeign), errors.Is(err, layer.ErrNewerFormat):
		return err
	case err != nil:
		s.opts.Log.Error("a replica cannot be opened; it counts as lost", "volume", volumeID, "replica", id, "err", err)
		return nil
	}
	s.replicas[key{volumeID, uint32(id)}] = r
	return nil
}

func (s *Store) open(dir string) (*Replica, error) {
	f, err := layer.Open(s.opts.FS, dir, s.opts.BootID, s.base)
	if err != nil {
		return nil, err
	}
	sb := f.Superblock()
	if sb.ClusterID != s.opts.ClusterID {
		return nil, errors.Join(fmt.Errorf("replica %s %w (%s)", dir, ErrForeign, sb.ClusterID), f.Close())
	}
	// I7: was anything lost that had been acknowledged?
	err = f.Update(func(sb *layer.Superblock) {
		if same := sb.Enter(s.opts.BootID); !same && !sb.Clean && !s.opts.Hooks.KeepIncarnation {
			sb.Incarnation++
		}
	})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	f.Break(s.opts.Hooks.layers())
	r := &Replica{opts: s.opts, store: s, files: f, sealed: sb.SealedEpoch, failed: sb.Health == layer.Failed && !s.opts.Hooks.IgnoreFailure}
	if n := f.DamagedSectors(); n > 0 {
		s.opts.Log.Warn("sectors of a replica's tables are damaged; their regions count as changed", "volume", sb.VolumeID, "replica", sb.ReplicaID, "sectors", n)
	}
	if f.Lost() {
		_ = r.judge(fmt.Errorf("its tables do not say any more which layer holds what: %w", volume.ErrDamaged))
	}
	return r, nil
}

// CreateSpec describes a new replica.
type CreateSpec struct {
	VolumeID  string
	ReplicaID uint32
	Size      int64
	// Base is what it begins with; none: zeros.
	Base layer.BaseRef
	// Behind: the volume was attached before, so this replica has nothing in
	// common with the others and must be copied to whole.
	Behind bool
}

// Create makes a replica, whole or not at all. One that is here already stays
// as it is; what is here of one that could not be opened is deleted.
//
// Two calls for the same replica must not be under way at once.
func (s *Store) Create(spec CreateSpec) (Info, error) {
	s.basing.Lock()
	defer s.basing.Unlock()
	if r, err := s.Get(spec.VolumeID, spec.ReplicaID); err == nil {
		return r.Info(), nil
	}
	r, err := s.create(spec)
	if err != nil {
		return Info{}, fmt.Errorf("make replica %d of volume %s: %w", spec.ReplicaID, spec.VolumeID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replicas[key{spec.VolumeID, spec.ReplicaID}] = r
	return r.Info(), nil
}

func (s *Store) create(spec CreateSpec) (*Replica, error) {
	dir := s.dirOf(spec.VolumeID, spec.ReplicaID)
	if err := s.opts.FS.MkdirAll(path.Dir(dir)); err != nil {
		return nil, err
	}
	sb := layer.Superblock{
		Sequence: 1, ClusterID: s.opts.ClusterID, VolumeID: spec.VolumeID, ReplicaID: spec.ReplicaID,
		RegionSize: cmp.Or(s.opts.RegionSize, layer.RegionSize), Size: uint64(spec.Size), Incarnation: 1, Generation: 1,
		Health: layer.Good, Clean: true, BootID: s.opts.BootID,
	}
	switch {
	case spec.Behind: // it is emptied before it is copied to
		sb.Generation = layer.Unknown
	case spec.Base != layer.BaseRef{}:
		sb.Base, sb.BaseSize = spec.Base, uint64(spec.Size)
		// Before the first generation: what is never written counts as older than
		// all changes, and need not be copied to one that is made later.
		sb.Generation = 0
		base, err := s.base(spec.Base)
		if err = errors.Join(err, closeBase(base)); err != nil {
			return nil, err
		}
	}
	// One that could not be opened may be in the way: it counts as lost.
	if err := s.discard(spec.VolumeID, spec.ReplicaID); err != nil {
		return nil, err
	}
	if err := layer.Create(s.opts.FS, dir, sb); err != nil {
		return nil, err
	}
	return s.open(dir)
}

// Suspend ends the sessions of holders elsewhere, and refuses all that would begin:
// whoever waits for a disk that hangs had better do without it. What is under way
// ends when the disk goes on.
func (s *Store) Suspend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !isClosed(s.suspended) {
		close(s.suspended)
	}
}

// Resume ends that.
func (s *Store) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if isClosed(s.suspended) {
		s.suspended = make(chan struct{})
	}
}

// suspension is closed when Suspend is called.
func (s *Store) suspension() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.suspended
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Get finds a replica.
func (s *Store) Get(volumeID string, replicaID uint32) (*Replica, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.replicas[key{volumeID, replicaID}]
	if r == nil {
		return nil, fmt.Errorf("replica %d of volume %s: %w", replicaID, volumeID, ErrNotFound)
	}
	return r, nil
}

// List is every replica here.
func (s *Store) List() []Info {
	s.mu.Lock()
	list := slices.Collect(maps.Values(s.replicas))
	s.mu.Unlock()
	// One whose disk hangs must not hold up those that ask for another.
	var infos []Info
	for _, r := range list {
		infos = append(infos, r.Info())
	}
	return infos
}

// Remove deletes a replica and ends its session. That there is none is no
// error. ErrInUse as long as other volumes' replicas here read its snapshots.
func (s *Store) Remove(volumeID string, replicaID uint32) error {
	s.basing.Lock()
	defer s.basing.Unlock()
	if err := s.inUse(volumeID); err != nil {
		return err
	}
	k := key{volumeID, replicaID}
	s.mu.Lock()
	r := s.replicas[k]
	delete(s.replicas, k)
	s.mu.Unlock()
	if r != nil {
		if err := r.close(); err != nil {
			s.opts.Log.Warn("closing a replica that is deleted", "volume", volumeID, "replica", replicaID, "err", err)
		}
	}
	if err := s.discard(volumeID, replicaID); err != nil {
		return fmt.Errorf("delete replica %d of volume %s: %w", replicaID, volumeID, err)
	}
	parent := path.Join(s.opts.Dir, volumeID)
	// The volume's folder goes with its last replica.
	if names, err := s.opts.FS.ReadDir(parent); err == nil && len(names) == 0 {
		return s.opts.FS.RemoveAll(parent)
	}
	return nil
}

// discard deletes a replica's files, if there are any. A half of them is never found
// under its name.
func (s *Store) discard(volumeID string, replicaID uint32) error {
	dir := s.dirOf(volumeID, replicaID)
	gone := path.Join(path.Dir(dir), ".old-"+path.Base(dir))
	// What an earlier attempt left would be in the way.
	if err := s.opts.FS.RemoveAll(gone); err != nil {
		return err
	}
	err := s.opts.FS.Rename(dir, gone)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(err, s.opts.FS.RemoveAll(gone))
}

func (s *Store) dirOf(volumeID string, replicaID uint32) string {
	return path.Join(s.opts.Dir, volumeID, strconv.FormatUint(uint64(replicaID), 10))
}

// Close ends every session and closes the files. What was not flushed stays
// with the kernel.
func (s *Store) Close() error {
	s.mu.Lock()
	list := s.replicas
	s.replicas = map[key]*Replica{}
	s.mu.Unlock()
	var errs []error
	for _, r := range list {
		errs = append(errs, r.close())
	}
	return errors.Join(errs...)
}
