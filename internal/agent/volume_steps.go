package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
	device "github.com/argon-cluster/argon/internal/volume"
)

// This file carries out what volume.go decides.

// volume is what is known here of a volume's attachment.
type volume struct {
	attached   demand
	attachment Attachment // nil if not attached
	watched    bool
	// ending: it is being detached, and nobody else's any more.
	ending bool
	// why it is not attached although it should be.
	why string
	// afresh: attaching it again was refused because the running guest must
	// end first.
	afresh      bool
	connections int
	// unclean is how detaching it failed last; nil once it is attached anew.
	unclean error
	// yielded is when it made way for a user on another server.
	yielded time.Time
	// reported is when its status was written down last.
	reported time.Time
}

// volume finds or makes the entry of a volume. The caller holds mu.
func (a *Agent) volume(id string) *volume {
	v := a.volumes[id]
	if v == nil {
		v = &volume{}
		a.volumes[id] = v
	}
	return v
}

func (v *volume) see(now time.Time) volumeSeen {
	s := volumeSeen{attached: v.attached, connections: v.connections, yields: now.Sub(v.yielded) < yieldTime}
	if v.attachment != nil {
		s.ready, s.over = closed(v.attachment.Ready()), closed(v.attachment.Done())
	}
	return s
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (p *plan) planVolumes() {
	a := p.agent
	guests := p.guestFates()
	for id := range p.st.Volumes {
		a.volume(id)
	}
	for id, local := range a.volumes {
		v := p.st.Volumes[id]
		if v == nil && local.attachment == nil && local.connections == 0 {
			delete(a.volumes, id)
			continue
		}
		p.planVolume(id, v, local, guests)
	}
}

func (p *plan) planVolume(id string, v *argonv1.Volume, local *volume, guests map[string]bool) {
	a, key := p.agent, "volume/"+id
	seen := local.see(p.now)
	for _, m := range machinesOf(p.st, id) {
		seen.leaves = seen.leaves || a.leaves(m.GetMeta().GetId())
	}
	want := demandFor(p.st, v, a.ServerID, seen, guests)
	var step volumeStep
	step, local.why = nextForVolume(p.st, v, a.ServerID, seen, want, guests, p.allowed)
	j := job{step: fmt.Sprint(step, want)}
	switch step {
	case leave:
		if local.attachment != nil && local.attached.use != forArrival {
			p.reportVolume(id, local)
			p.planConnected(v, local)
		}
		return
	case standBy:
		size := int64(v.GetSizeBytes())
		j.run = func(ctx context.Context) error { return a.standBy(ctx, id, size, want) }
	case askFor:
		j.run = func(ctx context.Context) error { return a.askForVolume(ctx, id) }
	case attach:
		if local.afresh && want.guestRuns {
			return // the guest is killed first
		}
		if r := a.retries[key]; r.err != nil {
			local.why = r.err.Error()
		}
		local.afresh = false
		req := AttachRequest{VolumeID: id, MachineID: want.machineID, Epoch: v.GetEpoch(), GuestRuns: want.guestRuns}
		if local.attached.use == forArrival {
			req.Standby = local.attachment
		}
		j.waits, j.run = true, func(ctx context.Context) error { return a.attach(ctx, req, want) }
	case detach:
		if by := v.GetAttachment().GetWantedBy(); by != "" && by != a.ServerID {
			local.yielded = p.now
		}
		users := local.connections
		j.run = func(ctx context.Context) error { return a.detach(ctx, id, local, users) }
	case drop:
		j.run = func(context.Context) error { return a.drop(id, local) }
	case letGo:
		epoch := v.GetEpoch()
		j.run = func(ctx context.Context) error { return a.letGo(ctx, id, epoch) }
	}
	p.add(key, j)
}

// letGo takes an attachment that nobody has any more off the record of a volume
// that is being removed, so that no other can follow.
func (a *Agent) letGo(ctx context.Context, id string, epoch uint64) error {
	_, err := a.Store.Volumes.Update(ctx, id, func(v *argonv1.Volume) error {
		if !v.GetRemoving() || v.GetEpoch() != epoch || v.GetAttachment().GetServerId() != a.ServerID {
			return ErrOvertaken
		}
		v.Attachment = nil
		return nil
	})
	if err != nil {
		return fmt.Errorf("let go of a volume that is being removed: %w", err)
	}
	return nil
}

func (a *Agent) attach(ctx context.Context, req AttachRequest, want demand) error {
	attachment, err := a.Volumes.Attach(ctx, req)
	a.mu.Lock()
	defer a.mu.Unlock()
	local := a.volume(req.VolumeID)
	if err != nil {
		local.afresh = errors.Is(err, ErrStartAfresh)
		return fmt.Errorf("attach the volume: %w", err)
	}
	local.attachment, local.attached, local.unclean = attachment, want, nil
	local.watched, local.reported = false, time.Time{}
	return nil
}

// standBy makes the socket of a volume whose machine is on its way here.
func (a *Agent) standBy(ctx context.Context, id string, size int64, want demand) error {
	attachment, err := a.Volumes.StandBy(ctx, id, want.machineID, size)
	if err != nil {
		return fmt.Errorf("make the volume's socket: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	local := a.volume(id)
	local.attachment, local.attached, local.watched = attachment, want, false
	return nil
}

// leaves tells whether a machine's guest here hands its disks over. The caller
// holds mu.
func (a *Agent) leaves(machineID string) bool {
	m := a.machines[machineID]
	if m == nil {
		return false
	}
	for _, g := range m.guests {
		if g.handsOver {
			return true
		}
	}
	return false
}

// detach ends an attachment clean. If that takes too long, because replicas do
// not answer, it ends unclean, and whoever attaches next finds out what is
// equal. A user who came after it was decided may stay: it is decided anew.
func (a *Agent) detach(ctx context.Context, id string, local *volume, users int) error {
	a.mu.Lock()
	again := local.connections > users
	local.ending = !again
	a.mu.Unlock()
	if again {
		return nil
	}
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachTimeout)
	defer cancel()
	// At the daemon's end it may take a moment more to end clean.
	defer context.AfterFunc(ctx, func() { time.AfterFunc(shutdownTimeout, cancel) })()
	err := local.attachment.Detach(limited)
	a.note(func() { local.unclean = err })
	a.forget(local)
	if err != nil {
		a.Log.Warn("a volume was not detached clean", "volume", id, "err", err)
	}
	return nil
}

// drop forgets an attachment that is over.
func (a *Agent) drop(id string, local *volume) error {
	err := local.attachment.Err()
	local.attachment.Abandon()
	a.forget(local)
	if err != nil {
		a.Log.Warn("a volume's attachment has ended", "volume", id, "err", err)
	}
	return nil
}

// forget takes an attachment that is over off the books. The leader clears its
// status.
func (a *Agent) forget(local *volume) {
	a.mu.Lock()
	defer a.mu.Unlock()
	local.attachment, local.attached, local.ending = nil, demand{}, false
}

// detachAll ends all attachments at the end of the daemon, so that the next
// run need not copy anything. Guests that go on wait for it.
func (a *Agent) detachAll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	var wg sync.WaitGroup
	a.mu.Lock()
	for id, v := range a.volumes {
		if attachment := v.attachment; attachment != nil {
			wg.Go(func() {
				if err := attachment.Detach(ctx); err != nil {
					a.Log.Warn("a volume was not detached clean", "volume", id, "err", err)
				}
			})
		}
	}
	a.mu.Unlock()
	wg.Wait()
}

// watchAttachments asks for a pass when an attachment serves or is over.
func (p *plan) watchAttachments(ctx context.Context) {
	a := p.agent
	for _, v := range a.volumes {
		if v.attachment == nil || v.watched {
			continue
		}
		v.watched = true
		attachment := v.attachment
		a.wg.Go(func() {
			ready := attachment.Ready()
			for {
				select {
				case <-ready:
					ready = nil
				case <-attachment.Done():
					a.nudge()
					return
				case <-ctx.Done():
					return
				}
				a.nudge()
			}
		})
	}
}

// seeDisks sums up the attachments that a machine's guest needs or uses.
func (p *plan) seeDisks(m *argonv1.Machine) disksSeen {
	a, seen := p.agent, disksSeen{ready: true}
	wait := func(why string) {
		seen.ready = false
		seen.waits = cmp.Or(seen.waits, why)
	}
	for _, id := range p.disksOf(m) {
		v := a.volumes[id]
		name := cmp.Or(p.st.Volumes[id].GetMeta().GetName(), id)
		seen.sizes = append(seen.sizes, p.st.Volumes[id].GetSizeBytes())
		switch {
		case v == nil:
			wait(fmt.Sprintf("volume %s does not exist any more", name))
		case v.attachment == nil || v.attached.use < forMachine || v.attached.machineID != m.GetMeta().GetId():
			if v.afresh {
				seen.over = ErrStartAfresh.Error()
			}
			wait(cmp.Or(v.why, fmt.Sprintf("volume %s is being attached", name)))
		case v.ending:
			// By us: a guest that goes on all the same gets it again.
			seen.held = true
			wait(fmt.Sprintf("volume %s is being detached", name))
		case closed(v.attachment.Done()):
			seen.held = true
			seen.over = fmt.Sprintf("volume %s: %v", name, cmp.Or(v.attachment.Err(), errEnded))
			wait(seen.over)
		default:
			seen.held = true
			seeService(&seen, name, v.attachment, wait)
		}
	}
	return seen
}

// disksOf are the volumes that a machine's guest has or is to be started with. What
// a guest that runs is to be given is none of them yet.
func (p *plan) disksOf(m *argonv1.Machine) []string {
	c := p.st.Checkpoints[m.GetWake().GetCheckpointId()]
	switch local := p.agent.machines[m.GetMeta().GetId()]; {
	case local != nil && len(local.guests) > 0 || receives(m, p.agent.ServerID):
		return placement.AsStarted(m).GetVolumeIds()
	case c != nil:
		return placement.AsStarted(&argonv1.Machine{InForce: placement.Woken(m, c)}).GetVolumeIds()
	}
	return placement.WantedDisks(m)
}

// spare reports whether a volume serves that a machine's guest is to be given.
func (p *plan) spare(m *argonv1.Machine) bool {
	return slices.ContainsFunc(placement.Changing(m).Attach, func(id string) bool {
		v := p.agent.volumes[id]
		return v != nil && v.attachment != nil && v.attached.use == forMachine && v.attached.machineID == m.GetMeta().GetId() &&
			!v.ending && !closed(v.attachment.Done()) && closed(v.attachment.Ready())
	})
}

var errEnded = errors.New("the attachment has ended")

// seeService looks at an attachment that is not over.
func seeService(seen *disksSeen, name string, attachment Attachment, wait func(string)) {
	st := attachment.Status()
	switch {
	case st.GetCondition() == "full":
		seen.full = true
		wait(fmt.Sprintf("volume %s is full: %s", name, st.GetDetail()))
	case st.GetCondition() == "waiting" || !closed(attachment.Ready()):
		wait(fmt.Sprintf("volume %s waits %s", name, st.GetDetail()))
	}
}

// progressEvery is how often the progress of a copy is written down.
const progressEvery = 3 * time.Second

// reportVolume writes down what the holder sees, when it has changed.
func (p *plan) reportVolume(id string, local *volume) {
	a := p.agent
	now := local.attachment.Status()
	now.VolumeId = id
	old := p.st.VolumeStatus[id]
	now.Updated = old.GetUpdated()
	if proto.Equal(old, now) {
		return
	}
	onlyProgress := old.GetCondition() == now.GetCondition() && len(old.GetResyncs()) == len(now.GetResyncs())
	if onlyProgress && p.now.Sub(local.reported) < progressEvery {
		return
	}
	now.Updated = timestamppb.New(p.now)
	p.add("volume-status/"+id, job{step: "report", run: func(ctx context.Context) error {
		a.mu.Lock()
		local.reported = a.Now()
		a.mu.Unlock()
		if err := a.Store.PutVolumeStatus(ctx, now); err != nil {
			return fmt.Errorf("report the volume's status: %w", err)
		}
		return nil
	}})
}

// planConnected keeps it in the record whether a user has the volume here: that
// keeps others from what a user would not expect. A volume that is being rolled
// back is nobody's until that is done.
func (p *plan) planConnected(v *argonv1.Volume, local *volume) {
	a, at := p.agent, v.GetAttachment()
	want := local.connections > 0
	if at.GetServerId() != a.ServerID || at.GetMachineId() != "" || at.GetConnected() == want || want && v.GetRollbackTo() != 0 {
		return
	}
	id, epoch := v.GetMeta().GetId(), v.GetEpoch()
	p.add("volume-connected/"+id, job{step: "record", run: func(ctx context.Context) error {
		_, err := a.Store.Volumes.Update(ctx, id, func(v *argonv1.Volume) error {
			if v.GetEpoch() != epoch || v.GetAttachment() == nil || want && v.GetRollbackTo() != 0 {
				return ErrOvertaken
			}
			v.Attachment.Connected = want
			return nil
		})
		if err != nil {
			return fmt.Errorf("record that the volume is connected: %w", err)
		}
		return nil
	}})
}

// askForVolume asks the server that has a volume attached for upkeep to make
// way for a user here.
func (a *Agent) askForVolume(ctx context.Context, id string) error {
	_, err := a.Store.Volumes.Update(ctx, id, func(v *argonv1.Volume) error {
		at := v.GetAttachment()
		if at == nil || at.GetConnected() || at.GetMachineId() != "" || at.GetWantedBy() == a.ServerID {
			return ErrOvertaken
		}
		at.WantedBy = a.ServerID
		return nil
	})
	if err != nil {
		return fmt.Errorf("ask for the volume: %w", err)
	}
	return nil
}

// Connection is a volume that a user has attached on this server.
type Connection struct {
	agent      *Agent
	id         string
	attachment Attachment
	once       sync.Once
}

// Disk is where the volume is served.
func (c *Connection) Disk() hypervisor.Disk { return c.attachment.Disk() }

// Device is the volume itself.
func (c *Connection) Device() device.Device { return c.attachment.Device() }

// Done is closed when the attachment is over.
func (c *Connection) Done() <-chan struct{} { return c.attachment.Done() }

// Err is why it is over.
func (c *Connection) Err() error { return c.attachment.Err() }

// Close ends the connection; the volume is detached once nobody uses it.
func (c *Connection) Close() {
	c.once.Do(func() {
		c.agent.mu.Lock()
		defer c.agent.mu.Unlock()
		c.agent.volume(c.id).connections--
		c.agent.nudge()
	})
}

// Connect attaches a volume on this server for a user and returns once it
// serves. Several users may have it connected here at once. It fails when a
// machine or another server uses the volume.
func (a *Agent) Connect(ctx context.Context, volumeID string) (*Connection, error) {
	a.mu.Lock()
	a.volume(volumeID).connections++
	a.mu.Unlock()
	c := &Connection{agent: a, id: volumeID}
	a.nudge()
	for {
		a.mu.Lock()
		passed := a.passed
		ready, err := a.connected(c)
		a.mu.Unlock()
		if err == nil && closed(ready) {
			return c, nil
		}
		if err != nil {
			c.Close()
			return nil, err
		}
		select {
		case <-passed:
		case <-ready:
		case <-ctx.Done():
			c.Close()
			return nil, fmt.Errorf("connect volume: %w", ctx.Err())
		}
	}
}

// connected looks whether a connection has its attachment. The channel is
// closed when it serves.
func (a *Agent) connected(c *Connection) (ready <-chan struct{}, err error) {
	st := a.View.State()
	v, local := st.Volumes[c.id], a.volume(c.id)
	switch {
	case v == nil:
		return nil, fmt.Errorf("connect volume %s: %w", c.id, catalog.ErrNotFound)
	case inUse(st, v):
		return nil, fmt.Errorf("volume %s is used by machine %s: stop the machine first",
			v.GetMeta().GetName(), machinesOf(st, c.id)[0].GetMeta().GetName())
	case local.why != "" && a.jobs["volume/"+c.id] == nil:
		// While it is tried again, why it failed before says nothing: who left
		// then would end the attempt, each time.
		return nil, errors.New(local.why)
	case local.attachment == nil || local.ending || !v.GetAttachment().GetConnected():
		return nil, nil
	}
	c.attachment = local.attachment
	return c.attachment.Ready(), nil
}
