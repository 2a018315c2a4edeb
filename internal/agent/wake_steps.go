package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/dustin/go-humanize"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/checkpoint"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file makes machines go on from checkpoints.

// unusable is why nothing can go on from a checkpoint, now or later.
type unusable struct{ error }

func (e unusable) Unwrap() error { return e.error }

// check reads the whole memory of the checkpoint that a machine is to go on from
// and has its disks made what they were. Before that nothing of the machine is
// changed: a damaged checkpoint costs nothing.
func (a *Agent) check(ctx context.Context, st *catalog.State, m *argonv1.Machine, c *argonv1.Checkpoint) error {
	err := a.checkMemory(ctx, st, m, c)
	if err == nil {
		err = a.rollDisksBack(ctx, m, c)
	}
	var useless unusable
	if errors.As(err, &useless) {
		return a.refuse(ctx, m, useless)
	}
	return err
}

func (a *Agent) checkMemory(ctx context.Context, st *catalog.State, m *argonv1.Machine, c *argonv1.Checkpoint) error {
	if c == nil {
		return unusable{errors.New("the checkpoint is gone")}
	}
	if why := placement.Unusable(st, c); why != "" {
		return unusable{fmt.Errorf("checkpoint %s: %s", c.GetMeta().GetName(), why)}
	}
	return a.withMemory(ctx, m, c, "checked", func(r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		return err
	})
}

// withMemory reads a checkpoint's memory for a machine. what is done with it is told
// in the machine's status.
func (a *Agent) withMemory(ctx context.Context, m *argonv1.Machine, c *argonv1.Checkpoint, what string, use func(io.Reader) error) error {
	conn, err := a.connectMemory(ctx, c)
	if err != nil {
		return err
	}
	defer conn.Close()
	dev, err := conn.device()
	if err != nil {
		return err
	}
	r, err := checkpoint.NewReader(checkpoint.NewSource(ctx, dev), c.GetMeta().GetId())
	if err == nil {
		defer r.Close()
		defer a.say(m.GetMeta().GetId(), "")
		err = use(&followed{
			Reader: r, now: a.Now, total: c.GetMemoryBytes(), told: a.Now(),
			tell: func(far string) {
				a.say(m.GetMeta().GetId(), fmt.Sprintf("the memory of checkpoint %s is %s: %s", c.GetMeta().GetName(), what, far))
			},
		})
	}
	if errors.Is(err, checkpoint.ErrDamaged) || errors.Is(err, checkpoint.ErrVersion) {
		return unusable{fmt.Errorf("checkpoint %s: %w", c.GetMeta().GetName(), err)}
	}
	return err
}

// say notes what is done for a machine that has no guest yet; empty: nothing that
// takes long.
func (a *Agent) say(machineID, what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if m := a.machine(machineID); m.doing != what {
		m.doing = what
		a.nudge()
	}
}

// followed is a reader that tells now and then how far it is.
type followed struct {
	io.Reader
	now         func() time.Time
	tell        func(far string)
	done, total uint64
	told        time.Time
}

// Read implements io.Reader.
func (f *followed) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	f.done += uint64(n)
	if now := f.now(); now.Sub(f.told) >= progressEvery {
		f.told = now
		f.tell(fmt.Sprintf("%s of %s", humanize.IBytes(f.done), humanize.IBytes(f.total)))
	}
	return n, err
}

// rollDisksBack records that the memory was found whole, and, in the same change,
// tells the disks of the checkpoint to be what they were.
func (a *Agent) rollDisksBack(ctx context.Context, m *argonv1.Machine, c *argonv1.Checkpoint) error {
	for {
		now, err := a.Store.Machines.Get(ctx, m.GetMeta().GetId())
		if err != nil {
			return err
		}
		if !a.still(now, m) || now.GetWake().GetChecked() {
			return ErrOvertaken
		}
		now.Wake.Checked = true
		txn := a.Store.Txn().Put(now)
		for _, id := range now.GetVolumeIds() {
			snapshot, ok := c.GetSnapshots()[id]
			if !ok {
				continue
			}
			v, err := a.Store.Volumes.Get(ctx, id)
			if err != nil {
				return err
			}
			if s := placement.Snapshot(v, snapshot); s.GetState() != argonv1.SnapshotState_SNAPSHOT_STATE_READY {
				return unusable{fmt.Errorf("checkpoint %s: the snapshot of its disk %s is gone", c.GetMeta().GetName(), v.GetMeta().GetName())}
			}
			v.RollbackTo = snapshot
			txn.Put(v)
		}
		if err := txn.Commit(ctx); !errors.Is(err, catalog.ErrConflict) {
			return err
		}
	}
}

// still tells whether a machine's record gives the same order as it did.
func (a *Agent) still(now, m *argonv1.Machine) bool {
	return belongs(now, a.ServerID) && now.GetPlacement() == m.GetPlacement() && now.GetWanted() == argonv1.Wanted_WANTED_RUNNING &&
		now.GetWake() != nil && now.GetWake().GetCheckpointId() == m.GetWake().GetCheckpointId()
}

// refuse ends the order to go on from a checkpoint that can't be used. The
// machine is started, if it was lost and its policy falls back to that; stopped,
// if somebody asked for it; and stays suspended if there is nothing else of it.
func (a *Agent) refuse(ctx context.Context, m *argonv1.Machine, why error) error {
	var what string
	bounded, cancel := recording(ctx)
	defer cancel()
	_, err := a.Store.Machines.Update(bounded, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
		if !a.still(now, m) {
			return ErrOvertaken
		}
		switch {
		case now.GetWake().GetOrStart():
			what, now.Wake = "it is started instead", nil
		case a.View.State().Checkpoints[now.GetWake().GetCheckpointId()].GetPurpose() == forSuspend:
			what, now.Wanted = "it stays suspended", argonv1.Wanted_WANTED_SUSPENDED
		case now.GetWake().GetChecked():
			what, now.Wake, now.Wanted = "nothing was started, and its disks are those of the checkpoint", nil, argonv1.Wanted_WANTED_STOPPED
			observation{state: stateStopping, reason: why.Error()}.apply(now, a.ServerID, a.Now())
		default:
			what, now.Wake, now.Wanted = "nothing was started or changed", nil, argonv1.Wanted_WANTED_STOPPED
			observation{state: stateStopping, reason: why.Error()}.apply(now, a.ServerID, a.Now())
		}
		return nil
	})
	if errors.Is(err, ErrOvertaken) || errors.Is(err, catalog.ErrNotFound) {
		return ErrOvertaken
	}
	if err != nil {
		return fmt.Errorf("record that the machine can't go on from its checkpoint: %w", err)
	}
	a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_ERROR, "machine-not-resumed", fmt.Sprintf("%v: %s", why, what)))
	return nil
}

// wakeUp makes a guest of a checkpoint's memory. The order is consumed right
// before its processors run: until then it is the memory that counts, from then
// on the guest.
func (a *Agent) wakeUp(ctx context.Context, m *argonv1.Machine, c *argonv1.Checkpoint) error {
	id, number := m.GetMeta().GetId(), m.GetPlacement()
	m, err := a.announce(ctx, id, number, placement.Woken(m, c))
	if err != nil {
		return err
	}
	accel := hypervisor.Acceleration(c.GetPlatform().GetAcceleration())
	g := newGuest(GuestID(id, number), guestSeen{placement: number, acceleration: accel, wokenFrom: c.GetMeta().GetId()})
	spec, err := a.spec(ctx, m, g)
	if err == nil {
		spec.Machine = c.GetPlatform().GetMachineType()
		err = a.withMemory(ctx, m, c, "read", func(r io.Reader) (err error) {
			g.handle, err = a.Monitor.Wake(ctx, spec, r)
			return err
		})
	}
	if err != nil {
		if g.handle != nil {
			err = errors.Join(err, g.handle.Kill(context.WithoutCancel(ctx)))
		}
		a.clearAway(g)
		var useless unusable
		if errors.As(err, &useless) { // it was whole when it was checked
			return a.refuse(ctx, m, useless)
		}
		return fmt.Errorf("go on from checkpoint %s: %w", c.GetMeta().GetName(), err)
	}
	err = a.consume(ctx, m, c, g)
	if errors.Is(err, ErrOvertaken) {
		return err
	}
	a.take(ctx, g, g.handle)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		// The record says whether it may go on.
		g.wokenFrom, g.status = "", hypervisor.Status{State: hypervisor.Paused, Detail: "paused"}
	}
	a.machine(id).guests[number] = g
	return err
}

// consume takes the order off the record, and lets the guest run. Where nobody
// can tell whether that was recorded, the guest stands still until it is known.
func (a *Agent) consume(ctx context.Context, m *argonv1.Machine, c *argonv1.Checkpoint, g *guest) error {
	for {
		bounded, cancel := recording(ctx)
		_, err := a.Store.Machines.Update(bounded, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
			if now.GetWake() == nil && belongs(now, a.ServerID) && now.GetPlacement() == m.GetPlacement() {
				return catalog.ErrUnchanged // an attempt whose outcome was not known
			}
			if !a.still(now, m) {
				return ErrOvertaken
			}
			now.Wake = nil
			return nil
		})
		cancel()
		switch {
		case err == nil:
			if err := a.letGoOn(ctx, g, stop{m, c.GetTaken().AsTime()}); err != nil {
				a.Log.Warn("a guest does not go on; it is tried again", "guest", g.id, "err", err)
			}
			a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-woken",
				fmt.Sprintf("goes on from %s", c.GetTaken().AsTime().UTC().Format("2006-01-02 15:04:05 MST"))))
			return nil
		case errors.Is(err, ErrOvertaken), errors.Is(err, catalog.ErrNotFound):
			killed := g.handle.Kill(context.WithoutCancel(ctx))
			a.clearAway(g)
			return errors.Join(ErrOvertaken, killed)
		}
		select {
		case <-ctx.Done(): // whoever comes next finds the guest, and what is recorded
			return err
		case <-time.After(overtakenPause):
		}
	}
}
