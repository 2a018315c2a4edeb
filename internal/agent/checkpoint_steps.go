package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/checkpoint"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
	device "github.com/argon-cluster/argon/internal/volume"
)

// This file takes checkpoints: it carries out what checkpoint.go decides.

func (p *plan) planCheckpoints() {
	a := p.agent
	for id, c := range p.st.Checkpoints {
		m, key := p.st.Machines[c.GetMachineId()], "checkpoint/"+id
		var seen machineSeen
		local := a.machines[c.GetMachineId()]
		if local != nil {
			seen = p.seeMachine("machine/"+c.GetMachineId(), m, local)
		}
		step := nextForCheckpoint(c, m, a.ServerID, seen, a.jobs[key] != nil, p.allowed)
		j := job{step: step.String()}
		switch step {
		case letBe:
			continue
		case take:
			var g *guest
			if local != nil {
				g = local.guests[m.GetPlacement()]
			}
			j.waits, j.run = true, func(ctx context.Context) error { return a.takeCheckpoint(ctx, c, m, g) }
		case abandon:
			j.run = func(ctx context.Context) error {
				return a.failCheckpoint(ctx, c, errors.New("the server's daemon ended before it was taken"))
			}
		}
		p.add(key, j)
	}
}

// taken is what there is to say of a checkpoint that was taken.
type taken struct {
	mode     hypervisor.SaveMode
	platform hypervisor.Platform
	stopped  time.Time
	pause    time.Duration
	totals   checkpoint.Totals
}

// takeCheckpoint takes one from its beginning to its end, or gives it up.
func (a *Agent) takeCheckpoint(ctx context.Context, c *argonv1.Checkpoint, m *argonv1.Machine, g *guest) error {
	if g == nil {
		return ErrOvertaken
	}
	unlock, err := a.lockDevices(ctx, m, g)
	if err != nil {
		return err
	}
	defer unlock()
	c, err = a.beginCheckpoint(ctx, c, m)
	if err != nil {
		return err
	}
	a.note(func() { g.saving = true })
	defer a.note(func() { g.saving = false })
	t, err := a.save(ctx, c, m, g)
	if err == nil {
		if err = a.commitCheckpoint(ctx, c, m, g, t); err == nil {
			return nil
		}
	}
	// Only once it is recorded that it was not taken may a guest go on whose
	// memory was saved to be suspended.
	ferr := a.failCheckpoint(context.WithoutCancel(ctx), c, err)
	if ferr == nil || c.GetPurpose() != forSuspend {
		ferr = errors.Join(ferr, a.letGoOn(ctx, g, stop{}))
	}
	return errors.Join(err, ferr)
}

// letGoOn makes a guest run again; one that runs does not mind.
func (a *Agent) letGoOn(ctx context.Context, g *guest, after stop) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), goOnTimeout)
	defer cancel()
	select {
	case <-g.handle.Done():
		return nil
	default:
	}
	if err := g.goOn(ctx, after); err != nil {
		return fmt.Errorf("let the guest go on: %w", err)
	}
	return nil
}

const goOnTimeout = 10 * time.Second

// beginCheckpoint records that this server takes it.
func (a *Agent) beginCheckpoint(ctx context.Context, c *argonv1.Checkpoint, m *argonv1.Machine) (*argonv1.Checkpoint, error) {
	now, err := a.Store.Checkpoints.Update(ctx, c.GetMeta().GetId(), func(c *argonv1.Checkpoint) error {
		if c.GetState() != cpWanted {
			return ErrOvertaken
		}
		c.State, c.ServerId, c.Placement = cpTaking, a.ServerID, m.GetPlacement()
		c.Machine = proto.CloneOf(m)
		c.Machine.Status = nil
		return nil
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return nil, ErrOvertaken
	}
	if err != nil {
		return nil, fmt.Errorf("record that the checkpoint is being taken: %w", err)
	}
	return now, nil
}

// save writes the guest's memory to the store; the snapshots of its disks are of
// the instant that it is of. A guest that is to be suspended stands still
// afterwards.
func (a *Agent) save(ctx context.Context, c *argonv1.Checkpoint, m *argonv1.Machine, g *guest) (taken, error) {
	var t taken
	suspend := c.GetPurpose() == forSuspend
	memory, err := a.connectMemory(ctx, c)
	if err != nil {
		return t, err
	}
	defer memory.Close()
	if t.platform, err = g.handle.Platform(ctx); err != nil {
		return t, err
	}
	defer a.dropSave(ctx, g)
	if t.mode, err = g.handle.PrepareSave(ctx); err != nil {
		return t, err
	}
	var epochs map[string]uint64
	if suspend {
		err = g.handle.Pause(ctx)
	} else {
		epochs, err = a.snapshotDisks(ctx, c, m, g)
	}
	if err != nil {
		return t, fmt.Errorf("stop the guest: %w", err)
	}
	saved, err := g.handle.Save(ctx, t.mode.Live && !suspend)
	if err != nil {
		return t, err
	}
	defer saved.Memory.Close()
	t.stopped, t.pause = saved.Stopped, saved.Pause
	if !t.mode.Live && !suspend {
		if err := g.goOn(ctx, stop{}); err != nil {
			return t, fmt.Errorf("let the guest go on: %w", err)
		}
		t.pause = time.Since(saved.Stopped)
	}
	if t.totals, err = writeMemory(ctx, memory, c.GetMeta().GetId(), saved.Memory); err != nil {
		return t, err
	}
	return t, a.awaitSnapshots(ctx, c, epochs)
}

// dropSave gives back what a guest took to be saved, if it was not.
func (a *Agent) dropSave(ctx context.Context, g *guest) {
	ctx, cancel := a.answering(context.WithoutCancel(ctx))
	defer cancel()
	if err := g.handle.DropSave(ctx); err != nil && !closed(g.handle.Done()) {
		a.Log.Warn("what a guest took to be saved was not given back", "guest", g.id, "err", err)
	}
}

// writeMemory writes a stream of the memory to its volume, flushed.
func writeMemory(ctx context.Context, c *Connection, id string, memory io.Reader) (checkpoint.Totals, error) {
	dev, err := c.device()
	if err != nil {
		return checkpoint.Totals{}, err
	}
	sink := checkpoint.NewSink(ctx, dev)
	w, err := checkpoint.NewWriter(sink, id)
	if err != nil {
		return checkpoint.Totals{}, err
	}
	defer w.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{w}, memory, make([]byte, 256<<10)); err != nil {
		return checkpoint.Totals{}, fmt.Errorf("write the memory: %w", err)
	}
	totals, err := w.Finish()
	if err == nil {
		err = sink.Flush()
	}
	if err != nil {
		return totals, fmt.Errorf("write the memory: %w", err)
	}
	return totals, nil
}

// device is what the connection leads to.
func (c *Connection) device() (device.Device, error) {
	dev, ok := c.attachment.(device.Device)
	if !ok {
		return nil, fmt.Errorf("volume %s is not attached here itself", c.id)
	}
	return dev, nil
}

// memoryPatience is how long the volume for a checkpoint's memory may take to be
// made and attached.
const memoryPatience = time.Minute

// connectMemory attaches the volume of a checkpoint's memory here. It waits until
// all its replicas are made: what came later would have to be copied.
func (a *Agent) connectMemory(ctx context.Context, c *argonv1.Checkpoint) (*Connection, error) {
	ctx, cancel := context.WithTimeout(ctx, memoryPatience)
	defer cancel()
	err := a.await(ctx, func(st *catalog.State) (bool, error) {
		v := st.Volumes[c.GetMemoryVolumeId()]
		if v == nil || v.GetRemoving() {
			return false, errors.New("the volume for the memory is gone")
		}
		for _, r := range v.GetReplicas() {
			if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_CREATING && placement.Alive(st, r.GetServerId()) {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return nil, fmt.Errorf("wait for the volume for the memory: %w", err)
	}
	for {
		conn, err := a.Connect(ctx, c.GetMemoryVolumeId())
		if err == nil {
			return conn, nil
		}
		// It may be in use for a moment: to be repaired, or by another machine
		// that goes on from it.
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("attach the volume for the memory: %w", err)
		case <-time.After(overtakenPause):
		}
	}
}

// await looks at the catalog until something is so, or has failed.
func (a *Agent) await(ctx context.Context, so func(*catalog.State) (bool, error)) error {
	for {
		changed := a.View.Changed()
		if ok, err := so(a.View.State()); ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// snapshotDisks asks for a snapshot of each disk, all at one instant, and stops
// the guest for that. It returns the epochs of the attachments that take them.
func (a *Agent) snapshotDisks(ctx context.Context, c *argonv1.Checkpoint, m *argonv1.Machine, g *guest) (map[string]uint64, error) {
	epochs, err := a.askForSnapshots(ctx, c, m)
	if err != nil {
		return nil, err
	}
	return epochs, a.Volumes.Instant(ctx, c.GetMeta().GetId(), len(epochs), func(ctx context.Context) error {
		// To stop, a guest flushes its disks: that is short when they just were.
		if err := a.flushDisks(ctx, m); err != nil {
			return err
		}
		return g.handle.Pause(ctx)
	})
}

// flushDisks makes what a machine has written to its disks durable.
func (a *Agent) flushDisks(ctx context.Context, m *argonv1.Machine) error {
	disks := placement.AsStarted(m).GetVolumeIds()
	flushed := make(chan error, len(disks))
	for _, id := range disks {
		a.mu.Lock()
		dev, ok := a.volume(id).attachment.(device.Device)
		a.mu.Unlock()
		if !ok {
			return fmt.Errorf("volume %s is not attached here any more", id)
		}
		dev.Submit(&device.Request{Op: device.OpFlush, Done: func(err error) { flushed <- err }})
	}
	for range disks {
		select {
		case err := <-flushed:
			if err != nil {
				return fmt.Errorf("flush the disks: %w", err)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// askForSnapshots records the snapshots as being taken, of all the machine's
// disks or of none, and their ids in the checkpoint.
func (a *Agent) askForSnapshots(ctx context.Context, c *argonv1.Checkpoint, m *argonv1.Machine) (map[string]uint64, error) {
	for {
		txn, epochs := a.Store.Txn(), map[string]uint64{}
		next, err := a.Store.Checkpoints.Get(ctx, c.GetMeta().GetId())
		if err != nil {
			return nil, err
		}
		if next.GetState() != cpTaking {
			return nil, ErrOvertaken
		}
		next.Snapshots = map[string]uint32{}
		for _, id := range placement.AsStarted(m).GetVolumeIds() {
			v, err := a.Store.Volumes.Get(ctx, id)
			if err != nil {
				return nil, err
			}
			if v.GetAttachment().GetMachineId() != m.GetMeta().GetId() || v.GetAttachment().GetServerId() != a.ServerID {
				return nil, fmt.Errorf("volume %s is not attached here for the machine", v.GetMeta().GetName())
			}
			next.Snapshots[id] = addSnapshot(v, c, len(placement.AsStarted(m).GetVolumeIds())+1, a.Now())
			epochs[id] = v.GetEpoch()
			txn.Put(v)
		}
		txn.Put(next)
		err = txn.Commit(ctx)
		if errors.Is(err, catalog.ErrConflict) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ask for the snapshots: %w", err)
		}
		c.Snapshots = maps.Clone(next.Snapshots)
		return epochs, nil
	}
}

func addSnapshot(v *argonv1.Volume, c *argonv1.Checkpoint, size int, now time.Time) uint32 {
	v.NextSnapshotId = max(v.GetNextSnapshotId(), 1)
	s := &argonv1.Snapshot{
		Id: v.GetNextSnapshotId(), Name: "checkpoint-" + strings.ToLower(c.GetMeta().GetId()),
		State: argonv1.SnapshotState_SNAPSHOT_STATE_CREATING, SizeBytes: v.GetSizeBytes(), Created: timestamppb.New(now),
		Group: c.GetMeta().GetId(), GroupSize: uint32(size), Labels: map[string]string{"checkpoint": c.GetMeta().GetName()},
	}
	v.NextSnapshotId++
	v.Snapshots = append(v.Snapshots, s)
	return s.Id
}

// awaitSnapshots waits until the snapshots are whole and flushed. Those that
// another attachment takes are of another instant.
func (a *Agent) awaitSnapshots(ctx context.Context, c *argonv1.Checkpoint, epochs map[string]uint64) error {
	err := a.await(ctx, func(st *catalog.State) (bool, error) {
		for id, epoch := range epochs {
			v := st.Volumes[id]
			s := placement.Snapshot(v, c.GetSnapshots()[id])
			switch {
			case v.GetEpoch() > epoch:
				return false, fmt.Errorf("volume %s was attached anew meanwhile", v.GetMeta().GetName())
			case s == nil && st.Revision > 0 && v.GetNextSnapshotId() > c.GetSnapshots()[id]:
				return false, fmt.Errorf("the snapshot of volume %s was removed", v.GetMeta().GetName())
			case s.GetState() != argonv1.SnapshotState_SNAPSHOT_STATE_READY:
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("wait for the snapshots: %w", err)
	}
	return nil
}

// commitCheckpoint records that it is whole. From then on a machine that is
// suspended goes on from it, and its guest must not.
func (a *Agent) commitCheckpoint(ctx context.Context, c *argonv1.Checkpoint, m *argonv1.Machine, g *guest, t taken) error {
	// This step ends when the view shows the change, which may be before its
	// answer is here.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), goOnTimeout)
	defer cancel()
	err := a.change(bounded, c, func(c *argonv1.Checkpoint, now *argonv1.Machine) error {
		if c.GetState() != cpTaking || c.GetServerId() != a.ServerID || !belongs(now, a.ServerID) || now.GetPlacement() != m.GetPlacement() {
			return ErrOvertaken
		}
		c.State, c.Taken, c.PauseMicroseconds = cpReady, timestamppb.New(t.stopped), uint64(t.pause.Microseconds())
		c.MemoryBytes, c.StoredBytes, c.PausedBecause = t.totals.Raw, t.totals.Stored, t.mode.Reason
		c.Platform = &argonv1.Platform{Acceleration: string(g.acceleration), MonitorVersion: t.platform.Version, MachineType: t.platform.Machine}
		if c.GetPurpose() != forSuspend {
			return nil
		}
		if now.GetWanted() != argonv1.Wanted_WANTED_SUSPENDED || now.GetWake() != nil {
			return ErrOvertaken
		}
		now.Wake = &argonv1.Wake{CheckpointId: c.GetMeta().GetId()}
		return nil
	})
	if err != nil {
		return fmt.Errorf("record that the checkpoint is taken: %w", err)
	}
	if c.GetPurpose() != forSuspend {
		a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_INFO, "checkpoint-taken",
			fmt.Sprintf("checkpoint %s was taken; the machine stood still for %d ms", c.GetMeta().GetName(), t.pause.Milliseconds())))
	}
	return nil
}

// failCheckpoint records that one was not taken. A machine that was to be
// suspended to it is wanted running again.
func (a *Agent) failCheckpoint(ctx context.Context, c *argonv1.Checkpoint, why error) error {
	ctx, cancel := context.WithTimeout(ctx, goOnTimeout)
	defer cancel()
	var told *argonv1.Machine
	err := a.change(ctx, c, func(c *argonv1.Checkpoint, m *argonv1.Machine) error {
		if c.GetState() != cpTaking {
			return ErrOvertaken
		}
		c.State, c.Reason = cpFailed, why.Error()
		if c.GetPurpose() == forSuspend && m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED && m.GetWake() == nil {
			m.Wanted = argonv1.Wanted_WANTED_RUNNING
		}
		told = m
		return nil
	})
	if err != nil {
		return fmt.Errorf("record that the checkpoint was not taken: %w", err)
	}
	if told != nil {
		a.tell(ctx, machineEvent(told, argonv1.Severity_SEVERITY_WARNING, "checkpoint-failed",
			fmt.Sprintf("checkpoint %s was not taken: %v", c.GetMeta().GetName(), why)))
	}
	return nil
}

// change changes a checkpoint and its machine together; m is nil if the machine
// is gone.
func (a *Agent) change(ctx context.Context, c *argonv1.Checkpoint, change func(c *argonv1.Checkpoint, m *argonv1.Machine) error) error {
	for {
		now, err := a.Store.Checkpoints.Get(ctx, c.GetMeta().GetId())
		if err != nil {
			return err
		}
		m, err := a.Store.Machines.Get(ctx, c.GetMachineId())
		if errors.Is(err, catalog.ErrNotFound) {
			m, err = nil, nil
		}
		if err != nil {
			return err
		}
		old := proto.CloneOf(m)
		if err := change(now, m); err != nil {
			return err
		}
		txn := a.Store.Txn().Put(now)
		if m != nil && !proto.Equal(old, m) {
			txn.Put(m)
		}
		if err := txn.Commit(ctx); !errors.Is(err, catalog.ErrConflict) {
			return err
		}
	}
}
