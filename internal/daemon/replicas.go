package daemon

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/agent"
	"github.com/argon-cluster/argon/internal/rpc"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// bootID names this boot of the kernel.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("finding out which boot this is: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// replicas is this server's store of replicas as the agent sees it.
type replicas struct {
	store *replica.Store
	// leftovers is a directory, on another disk if there is one, with an empty file
	// for each replica that is to be deleted when its disk can be used.
	leftovers string
}

// Leave implements agent.Replicas.
func (r replicas) Leave(volumeID string, replicaID uint32) error {
	name := filepath.Join(r.leftovers, fmt.Sprintf("%s.%d", volumeID, replicaID))
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		return fmt.Errorf("noting a replica that is to be deleted: %w", err)
	}
	return nil
}

// Leftovers implements agent.Replicas.
func (r replicas) Leftovers() (map[string][]uint32, error) {
	entries, err := os.ReadDir(r.leftovers)
	if err != nil {
		return nil, fmt.Errorf("looking for replicas that are to be deleted: %w", err)
	}
	list := map[string][]uint32{}
	for _, e := range entries {
		volumeID, number, _ := strings.Cut(e.Name(), ".")
		if id, err := strconv.ParseUint(number, 10, 32); err == nil {
			list[volumeID] = append(list[volumeID], uint32(id))
		}
	}
	return list, nil
}

// RemoveLeftover implements agent.Replicas.
func (r replicas) RemoveLeftover(volumeID string, replicaID uint32) error {
	if err := r.store.Remove(volumeID, replicaID); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(r.leftovers, fmt.Sprintf("%s.%d", volumeID, replicaID))); err != nil {
		return fmt.Errorf("noting that a replica was deleted: %w", err)
	}
	return nil
}

// List implements agent.Replicas.
func (r replicas) List(context.Context) (map[string][]uint32, error) {
	list := map[string][]uint32{}
	for _, i := range r.store.List() {
		list[i.VolumeID] = append(list[i.VolumeID], i.ReplicaID)
	}
	return list, nil
}

// Create implements agent.Replicas.
func (r replicas) Create(_ context.Context, req agent.CreateReplica) (agent.Made, error) {
	spec := replica.CreateSpec{VolumeID: req.VolumeID, ReplicaID: req.ReplicaID, Size: int64(req.SizeBytes), Behind: req.Behind}
	if b := req.Base; b != nil {
		spec.Base = layer.BaseRef{Image: b.GetImageId(), Volume: b.GetVolumeId(), Snapshot: b.GetSnapshotId()}
	}
	info, err := r.store.Create(spec)
	made := agent.Made{Incarnation: info.Incarnation}
	if req.Base != nil && !req.Behind {
		made.EqualBefore = mirror.FirstGeneration
	}
	return made, err
}

// Remove implements agent.Replicas.
func (r replicas) Remove(_ context.Context, volumeID string, replicaID uint32) error {
	return r.store.Remove(volumeID, replicaID)
}

// Inside implements agent.Replicas.
func (r replicas) Inside(volumeID string, replicaID uint32) (agent.Inside, error) {
	rep, err := r.store.Get(volumeID, replicaID)
	if err != nil {
		return agent.Inside{}, err
	}
	in := agent.Inside{Based: rep.Based(), Untidy: rep.Untidy()}
	for _, s := range rep.Snapshots() {
		in.Snapshots = append(in.Snapshots, s.ID)
	}
	return in, nil
}

// Forget implements agent.Replicas.
func (r replicas) Forget(volumeID string, replicaID, snapshotID uint32) error {
	rep, err := r.store.Get(volumeID, replicaID)
	if err != nil {
		return err
	}
	return rep.Forget(snapshotID)
}

// Tidy implements agent.Replicas.
func (r replicas) Tidy(ctx context.Context, volumeID string, replicaID uint32) (more bool, err error) {
	rep, err := r.store.Get(volumeID, replicaID)
	if err != nil {
		return false, err
	}
	return rep.Tidy(ctx)
}

// DetachBase implements agent.Replicas.
func (r replicas) DetachBase(ctx context.Context, volumeID string, replicaID uint32) (more bool, err error) {
	rep, err := r.store.Get(volumeID, replicaID)
	if err != nil {
		return false, err
	}
	return rep.DetachBase(ctx)
}

// OpenSnapshot implements rpc.Volumes.
func (v *volumes) OpenSnapshot(volumeID string, replicaID, snapshotID uint32) (rpc.SnapshotView, error) {
	rep, err := v.replicas.Get(volumeID, replicaID)
	if err != nil {
		return nil, err
	}
	view, err := rep.OpenSnapshot(snapshotID)
	if err != nil {
		return nil, err
	}
	return snapshotView{view}, nil
}

// snapshotView is a snapshot in the words of a stream.
type snapshotView struct{ *layer.View }

// ReadAt implements stream.Snapshot: what is damaged is not handed out.
func (v snapshotView) ReadAt(p []byte, off int64) error { return v.ReadVerified(p, off) }

// Changed implements stream.Snapshot.
func (v snapshotView) Changed(since uint64, off, n, grain int64, bits []byte) error {
	if since == 0 {
		return v.HasData(off, n, grain, bits)
	}
	return v.View.Changed(since, off, n, grain, bits)
}

// space measures this server's disk; see agent.Space.
type space struct {
	disk     *disk
	replicas *replica.Store
	images   string // their directory
}

// Disk implements agent.Space.
func (s space) Disk() *argonv1.Disk { return s.disk.State() }

// Measure implements agent.Space.
func (s space) Measure() (*argonv1.Usage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.disk.path, &st); err != nil {
		return nil, fmt.Errorf("finding out the free space of %s: %w", s.disk.path, err)
	}
	block := uint64(st.Bsize)
	u := &argonv1.Usage{
		FreeBytes: st.Bavail * block, TotalBytes: (st.Blocks - st.Bfree + st.Bavail) * block, ReserveBytes: reserveBytes,
	}
	list := s.replicas.List()
	slices.SortFunc(list, func(a, b replica.Info) int {
		return cmp.Or(cmp.Compare(a.VolumeID, b.VolumeID), cmp.Compare(a.ReplicaID, b.ReplicaID))
	})
	for _, i := range list {
		rep, err := s.replicas.Get(i.VolumeID, i.ReplicaID)
		if err != nil {
			continue // removed meanwhile
		}
		used, snapshots, err := rep.Usage()
		if err != nil {
			continue // 〃
		}
		u.Replicas = append(u.Replicas, &argonv1.ReplicaUsage{
			VolumeId: i.VolumeID, ReplicaId: i.ReplicaID, UsedBytes: used, SnapshotBytes: snapshots, DetachedBytes: rep.Detached(),
		})
	}
	var err error
	u.ImagesBytes, err = diskUsage(s.images)
	return u, err
}

// diskUsage is what the files of a directory take on the disk.
func diskUsage(dir string) (uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("measuring the images: %w", err)
	}
	var sum uint64
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			sum += uint64(st.Blocks) * 512
		}
	}
	return sum, nil
}

// dialer reaches replicas, here and on other servers; see mirror.Dialer.
type dialer struct {
	serverID, clusterID string
	store               *replica.Store
	connect             func(ctx context.Context, serverID string, protocols ...string) (*tls.Conn, error)
}

// Dial implements mirror.Dialer.
func (d dialer) Dial(ctx context.Context, v *argonv1.Volume, r *argonv1.Replica, epoch uint64) (mirror.Link, mirror.Info, error) {
	if r.GetServerId() == d.serverID {
		return d.here(v.GetMeta().GetId(), r.GetId(), epoch)
	}
	conn, err := d.connect(ctx, r.GetServerId(), wire.Protocol, wire.ProtocolV1)
	if err != nil {
		return nil, mirror.Info{}, err
	}
	old := conn.ConnectionState().NegotiatedProtocol == wire.ProtocolV1
	link, info, err := mirror.NewRemoteLink(ctx, conn, wire.Greeting{
		ClusterID: d.clusterID, VolumeID: v.GetMeta().GetId(), ReplicaID: r.GetId(), Epoch: epoch,
	})
	info.Old = old
	return link, info, err
}

// here reaches a replica without a network between.
func (d dialer) here(volumeID string, replicaID uint32, epoch uint64) (mirror.Link, mirror.Info, error) {
	r, err := d.store.Get(volumeID, replicaID)
	if err != nil {
		return nil, mirror.Info{}, err
	}
	session, info, err := r.Seal(epoch)
	var sealed *replica.SealedError
	if errors.As(err, &sealed) {
		return nil, mirror.Info{}, &mirror.SealedError{Epoch: sealed.Epoch}
	}
	if err != nil {
		return nil, mirror.Info{}, err
	}
	return mirror.NewLocalLink(localCopy{session}), mirrorInfo(info), nil
}

func mirrorInfo(i replica.Info) mirror.Info {
	health := mirror.Failed
	switch i.Health {
	case layer.Good:
		health = mirror.Good
	case layer.Syncing:
		health = mirror.Syncing
	}
	return mirror.Info{Incarnation: i.Incarnation, Health: health, Emptied: i.Emptied}
}

// localCopy is a session with a replica here, in the words of the holder.
type localCopy struct{ s *replica.Session }

func (c localCopy) ReadAt(p []byte, off int64) error { return over(c.s.ReadAt(p, off)) }

func (c localCopy) WriteAt(p []byte, off int64, generation uint64, fua bool) error {
	return over(c.s.WriteAt(p, off, generation, fua))
}

func (c localCopy) Zero(off, n int64, generation uint64, fua bool) error {
	return over(c.s.Zero(off, n, generation, fua))
}

func (c localCopy) Trim(off, n int64, generation uint64, fua bool) error {
	return over(c.s.Trim(off, n, generation, fua))
}

func (c localCopy) Changed(since uint64, off, n, grain int64, bits []byte) error {
	return over(c.s.Changed(since, off, n, grain, bits))
}

func (c localCopy) TryReadAt(p []byte, off int64) (bool, error) {
	done, err := c.s.TryReadAt(p, off)
	return done, over(err)
}

func (c localCopy) TryWriteAt(p []byte, off int64, generation uint64) (bool, error) {
	done, err := c.s.TryWriteAt(p, off, generation)
	return done, over(err)
}

func (c localCopy) Extents(off, n int64, found func(n int64, hole bool) bool) error {
	return over(c.s.Extents(off, n, found))
}

func (c localCopy) Flush() error           { return over(c.s.Flush()) }
func (c localCopy) EndSync() error         { return over(c.s.EndSync()) }
func (c localCopy) Close(clean bool) error { return c.s.Close(clean) }

func (c localCopy) ReadVerified(p []byte, off int64) error { return over(c.s.ReadVerified(p, off)) }

func (c localCopy) Sums(off, n int64, generation uint64, sums []wire.Sum) error {
	return over(c.s.Sums(off, n, generation, sums))
}

func (c localCopy) ReadSnapshotVerified(id uint32, p []byte, off int64) error {
	return over(c.s.ReadSnapshotVerified(id, p, off))
}

func (c localCopy) SnapshotSums(id uint32, off, n int64, sums []wire.Sum) error {
	return over(c.s.SnapshotSums(id, off, n, sums))
}

func (c localCopy) Mend(id uint32, p []byte, off int64) error { return over(c.s.Mend(id, p, off)) }

func (c localCopy) PrepareSnapshot() error { return over(c.s.PrepareSnapshot()) }

func (c localCopy) Snapshot(id uint32, generation uint64) error {
	return over(c.s.Snapshot(id, generation))
}

func (c localCopy) ReadSnapshot(id uint32, p []byte, off int64) error {
	return over(c.s.ReadSnapshot(id, p, off))
}

func (c localCopy) ChangedSnapshot(id uint32, since uint64, off, n, grain int64, bits []byte) error {
	return over(c.s.ChangedSnapshot(id, since, off, n, grain, bits))
}

func (c localCopy) Revert(id uint32, off, n int64, generation uint64) error {
	return over(c.s.Revert(id, off, n, generation))
}

func (c localCopy) Resize(size int64) error { return over(c.s.Resize(size)) }

func (c localCopy) BeginSync(base, generation uint64, size int64) (mirror.Info, error) {
	info, err := c.s.BeginSync(base, generation, size)
	return mirrorInfo(info), over(err)
}

// over translates the end of a session.
func over(err error) error {
	if errors.Is(err, replica.ErrFenced) {
		return mirror.ErrSessionOver
	}
	return err
}
