package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file carries out what migrate.go decides.

// Carrier leads guests' states to other servers.
type Carrier interface {
	// Open connects to the guest that waits on another server. The connection
	// is one that the machine monitor takes (hypervisor.Guest.Send); it breaks
	// at the end of ctx, whatever waits for it.
	Open(ctx context.Context, serverID, guestID string) (net.Conn, error)
}

// planMigration plans the steps of the server that a machine runs on.
func (p *plan) planMigration(id string, m *argonv1.Machine, local *machine) {
	a, key := p.agent, "migration/"+id
	g := local.guests[m.GetPlacement()]
	seen := p.seeMigration(key, m, local)
	step, why := nextForMigration(m, a.ServerID, seen, p.allowed)
	j := job{step: step.String() + " " + m.GetMigration().GetId()}
	switch step {
	case stay:
		return
	case send:
		j.waits, j.run = true, func(ctx context.Context) error { return a.send(ctx, m, g) }
	case giveUp:
		j.run = func(ctx context.Context) error { return a.giveUp(ctx, m, g, why) }
	}
	p.add(key, j)
}

func (p *plan) seeMigration(key string, m *argonv1.Machine, local *machine) migrationSeen {
	to, g := m.GetMigration().GetToServerId(), local.guests[m.GetPlacement()]
	seen := migrationSeen{target: to, targetAlive: p.st.Leases[to] != nil}
	if s := p.st.Servers[to]; s != nil {
		seen.target = s.GetMeta().GetName()
	}
	if id := m.GetMigration().GetId(); id != local.migration {
		local.migration, local.orderedAt = id, p.now
	}
	seen.lasts = p.now.Sub(local.orderedAt)
	if g != nil {
		seen.guest = &g.guestSeen
	}
	for _, id := range placement.AsStarted(m).GetVolumeIds() {
		v := p.agent.volumes[id]
		seen.unattached = seen.unattached || v == nil || v.attachment == nil || v.attached.use != forMachine
	}
	if running := p.agent.jobs[key]; running != nil {
		seen.sending = running.step == send.String()+" "+m.GetMigration().GetId()
	}
	return seen
}

// send brings the machine's guest to the other server. What goes wrong ends the
// migration: the guest goes on here.
func (a *Agent) send(ctx context.Context, m *argonv1.Machine, g *guest) error {
	err := a.migrate(ctx, m, g)
	if err == nil || ctx.Err() != nil || errors.Is(err, ErrOvertaken) {
		return err // what then follows is decided anew
	}
	return a.giveUp(ctx, m, g, err.Error())
}

func (a *Agent) migrate(ctx context.Context, m *argonv1.Machine, g *guest) error {
	mig := m.GetMigration()
	unlock, err := a.lockDevices(ctx, m, g)
	if err != nil {
		return err
	}
	defer unlock()
	// QEMU hears nothing while it waits for the last of the state to be taken:
	// when this is given up, the connection goes first.
	line, cut := context.WithCancel(ctx)
	defer cut()
	conn, err := a.Carrier.Open(line, mig.GetToServerId(), GuestID(m.GetMeta().GetId(), mig.GetPlacement()))
	if err != nil {
		return err
	}
	a.note(func() { g.sentBy = mig.GetId() })
	progress, stop := a.reportProgress(ctx, m)
	err = g.handle.Send(ctx, conn, progress)
	stop()
	if err != nil {
		return err
	}
	paused := a.Now()
	// From here on its disks are let go of; the other server takes them once
	// the machine is its own.
	a.note(func() { g.status.State, g.handsOver = hypervisor.Leaving, true })
	if err := a.awaitReleased(ctx, m); err != nil {
		return err
	}
	sent, err := g.handle.Finish(ctx)
	if err != nil {
		return err
	}
	a.note(func() { g.status.State = hypervisor.Left })
	report := &argonv1.MigrationReport{
		Id: mig.GetId(), FromServerId: a.ServerID, ToServerId: mig.GetToServerId(), Since: mig.GetSince(),
		Progress: progressOf(sent), DowntimeMs: uint32(sent.Downtime.Milliseconds()), Paused: timestamppb.New(paused),
	}
	return a.handOver(ctx, m, report)
}

// handOver makes the guest on the other server the machine's own. Until that is
// recorded this one is, and nothing runs. It does not return before it knows,
// unless ctx ends: then the record has to be asked.
func (a *Agent) handOver(ctx context.Context, m *argonv1.Machine, report *argonv1.MigrationReport) error {
	mig := m.GetMigration()
	for {
		bounded, cancel := recording(ctx)
		_, err := a.Store.Machines.Update(bounded, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
			if last := now.GetLastMigration(); last.GetId() == report.GetId() && last.GetFailure() == "" {
				return catalog.ErrUnchanged // an earlier attempt came through
			}
			if !a.orders(now, m) || now.GetMigration().GetCancel() || now.GetWanted() != argonv1.Wanted_WANTED_RUNNING {
				return ErrOvertaken
			}
			report.Ended = timestamppb.New(a.Now())
			now.ServerId, now.Placement = mig.GetToServerId(), mig.GetPlacement()
			now.Migration, now.LastMigration = nil, report
			now.Status.ServerId, now.Status.Placement = now.GetServerId(), now.GetPlacement()
			return nil
		})
		cancel()
		switch {
		case err == nil:
			a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_INFO, "machine-migrated",
				fmt.Sprintf("runs on %s now", a.serverName(mig.GetToServerId()))))
			return nil
		case errors.Is(err, ErrOvertaken), errors.Is(err, catalog.ErrNotFound):
			return ErrOvertaken
		}
		a.Log.Warn("the catalog does not say whether a machine has moved; it stands still until it does", "machine", m.GetMeta().GetName(), "err", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(handOverPause):
		}
	}
}

// orders tells whether a record still has the order that a step was decided by.
func (a *Agent) orders(now, decided *argonv1.Machine) bool {
	return belongs(now, a.ServerID) && now.GetPlacement() == decided.GetPlacement() &&
		now.GetMigration() != nil && now.GetMigration().GetId() == decided.GetMigration().GetId()
}

// serverName is what users call a server.
func (a *Agent) serverName(id string) string {
	if s := a.View.State().Servers[id]; s != nil {
		return s.GetMeta().GetName()
	}
	return id
}

// giveUp ends a migration: the guest goes on here. The order goes first, so that
// nothing can make the other guest the machine's own any more.
func (a *Agent) giveUp(ctx context.Context, m *argonv1.Machine, g *guest, why string) error {
	// What is begun here is ended, whatever becomes of the daemon.
	ctx = context.WithoutCancel(ctx)
	if g != nil && g.handle != nil && !closed(g.handle.Done()) {
		bounded, cancel := context.WithTimeout(ctx, stopSendingTimeout)
		defer cancel()
		if err := a.stopSending(bounded, g); err != nil && !closed(g.handle.Done()) {
			return fmt.Errorf("give up sending the guest: %w", err)
		}
	}
	if err := a.decline(ctx, m, why); err != nil {
		return err
	}
	a.note(func() {
		if g != nil {
			g.handsOver = false
		}
	})
	return nil
}

// stopSending makes a guest go on that is being sent, and notes how it does: the
// next order may come before it is asked again.
func (a *Agent) stopSending(ctx context.Context, g *guest) error {
	err := g.handle.StopSending(ctx)
	if err != nil {
		return err
	}
	status, err := g.handle.Status(ctx)
	if err != nil {
		return err
	}
	a.observe(g, status)
	return nil
}

// decline takes the order off the record, and says why.
func (a *Agent) decline(ctx context.Context, m *argonv1.Machine, why string) error {
	ctx, cancel := recording(ctx)
	defer cancel()
	mig := m.GetMigration()
	_, err := a.Store.Machines.Update(ctx, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
		if now.GetMigration() == nil || now.GetMigration().GetId() != mig.GetId() {
			return ErrOvertaken
		}
		now.LastMigration = &argonv1.MigrationReport{
			Id: mig.GetId(), FromServerId: now.GetServerId(), ToServerId: mig.GetToServerId(), Since: mig.GetSince(),
			Ended: timestamppb.New(a.Now()), Failure: why, Progress: now.GetMigration().GetProgress(), Cancelled: now.GetMigration().GetCancel(),
			DrainSince: a.View.State().Servers[a.ServerID].GetDrain().GetSince(),
		}
		now.Migration = nil
		return nil
	})
	if errors.Is(err, ErrOvertaken) || errors.Is(err, catalog.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record that the machine stays: %w", err)
	}
	a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-migration-failed",
		fmt.Sprintf("did not go to %s: %s", a.serverName(mig.GetToServerId()), why)))
	return nil
}

// awaitReleased waits until no disk of the machine is attached here. Each must
// have been left clean: the other server then finds all that was written.
func (a *Agent) awaitReleased(ctx context.Context, m *argonv1.Machine) error {
	for {
		a.mu.Lock()
		passed, held := a.passed, false
		var unclean error
		for _, id := range m.GetVolumeIds() {
			v := a.volume(id)
			held = held || v.attachment != nil
			unclean = errors.Join(unclean, v.unclean)
		}
		a.mu.Unlock()
		switch {
		case unclean != nil:
			return fmt.Errorf("let go of its disks: %w", unclean)
		case !held:
			return nil
		}
		select {
		case <-passed:
		case <-ctx.Done():
			return fmt.Errorf("let go of its disks: %w", ctx.Err())
		}
	}
}

// reportProgress writes down how far a transfer is, when it is told, and not all
// the time. stop ends that.
func (a *Agent) reportProgress(ctx context.Context, m *argonv1.Machine) (tell func(hypervisor.Transfer), stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	latest := make(chan hypervisor.Transfer, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case t := <-latest:
				a.recordProgress(ctx, m, t)
			case <-ctx.Done():
				return
			}
			select {
			case <-time.After(transferEvery):
			case <-ctx.Done():
				return
			}
		}
	})
	tell = func(t hypervisor.Transfer) {
		select {
		case <-latest:
		default:
		}
		latest <- t // the only one that puts in
	}
	return tell, func() {
		cancel()
		wg.Wait()
	}
}

func (a *Agent) recordProgress(ctx context.Context, m *argonv1.Machine, t hypervisor.Transfer) {
	_, err := a.Store.Machines.Update(ctx, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
		if !a.orders(now, m) {
			return ErrOvertaken
		}
		now.Migration.Progress = progressOf(t)
		return nil
	})
	if err != nil && ctx.Err() == nil && !errors.Is(err, ErrOvertaken) {
		a.Log.Debug("how far a migration is was not recorded", "machine", m.GetMeta().GetName(), "err", err)
	}
}

func progressOf(t hypervisor.Transfer) *argonv1.MigrationProgress {
	return &argonv1.MigrationProgress{
		TransferredBytes: t.SentBytes, RemainingBytes: t.RemainingBytes, TotalBytes: t.TotalBytes,
		ExpectedDowntimeMs: uint32(t.Downtime.Milliseconds()), Passes: uint32(t.Passes), ThrottlePercent: uint32(t.Throttle),
	}
}

// receive makes a guest that waits for the state of the one on the other server.
// If that fails, the machine stays where it is.
func (a *Agent) receive(ctx context.Context, m *argonv1.Machine) error {
	id, number := m.GetMeta().GetId(), m.GetMigration().GetPlacement()
	g := newGuest(GuestID(id, number), guestSeen{
		placement: number, acceleration: hypervisor.Acceleration(m.GetStatus().GetAcceleration()),
		unshared: sharesOf(m) != hypervisor.Shares{},
	})
	spec, err := a.spec(ctx, placement.AsStarted(m), g)
	if err == nil {
		spec.Incoming, spec.Machine = true, m.GetStatus().GetMachineType()
		var handle hypervisor.Guest
		if handle, err = a.Monitor.Start(ctx, spec); err == nil {
			a.take(ctx, g, handle)
			a.note(func() {
				g.status, g.arriving = hypervisor.Status{State: hypervisor.Receiving}, true
				a.machine(id).guests[number] = g
			})
			return a.announceReceiver(ctx, m)
		}
	}
	a.clearAway(g)
	if ctx.Err() != nil || errors.Is(err, ErrOvertaken) {
		return err
	}
	return a.decline(ctx, m, fmt.Sprintf("server %s can't run it: %v", a.serverName(a.ServerID), err))
}

// announceReceiver writes down that the guest here waits: the other server sends
// from now on.
func (a *Agent) announceReceiver(ctx context.Context, m *argonv1.Machine) error {
	_, err := a.Store.Machines.Update(ctx, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
		mig := now.GetMigration()
		if mig == nil || mig.GetId() != m.GetMigration().GetId() || mig.GetPhase() != preparing {
			return ErrOvertaken
		}
		mig.Phase = copying
		return nil
	})
	if errors.Is(err, ErrOvertaken) || errors.Is(err, catalog.ErrNotFound) {
		return ErrOvertaken
	}
	if err != nil {
		return fmt.Errorf("announce that the guest waits: %w", err)
	}
	return nil
}

// goOn makes a guest run that a migration left standing.
func (a *Agent) goOn(ctx context.Context, g *guest) error {
	ctx, cancel := a.answering(ctx)
	defer cancel()
	if err := g.handle.StopSending(ctx); err != nil {
		return fmt.Errorf("guest %s: it goes on: %w", g.id, err)
	}
	status, err := g.handle.Status(ctx)
	if err == nil && status.State != hypervisor.Running && status.State != hypervisor.ShutDown {
		err, status = g.goOn(ctx, stop{}), hypervisor.Status{State: hypervisor.Running}
	}
	if err != nil {
		return fmt.Errorf("guest %s: it goes on: %w", g.id, err)
	}
	wentOn := a.Now()
	a.note(func() { g.wentOn, g.arriving, g.handsOver, g.status = wentOn, false, false, status })
	return nil
}

// planArrival plans to write down when a machine that came here went on.
func (p *plan) planArrival(id string, m *argonv1.Machine, local *machine) {
	a, g := p.agent, local.guests[m.GetPlacement()]
	if g == nil || !justArrived(m, a.ServerID, g.guestSeen) {
		return
	}
	at := g.wentOn
	if at.IsZero() {
		at = p.now // an earlier run of the daemon knew better
	}
	p.add("arrival/"+id, job{step: "record", run: func(ctx context.Context) error { return a.recordArrival(ctx, m, at) }})
}

func (a *Agent) recordArrival(ctx context.Context, m *argonv1.Machine, at time.Time) error {
	_, err := a.Store.Machines.Update(ctx, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
		last := now.GetLastMigration()
		if last.GetId() != m.GetLastMigration().GetId() || last.GetResumed() != nil {
			return ErrOvertaken
		}
		last.Resumed = timestamppb.New(at)
		return nil
	})
	if errors.Is(err, ErrOvertaken) || errors.Is(err, catalog.ErrNotFound) {
		return ErrOvertaken
	}
	if err != nil {
		return fmt.Errorf("record when the machine went on: %w", err)
	}
	return nil
}

const (
	// handOverPause is how long to wait before the catalog is asked again
	// whether a machine has moved.
	handOverPause = 50 * time.Millisecond
	// transferEvery is how often the progress of a transfer is written down.
	transferEvery = time.Second
	// stopSendingTimeout bounds how long a guest may take to send no more, before
	// it is tried again.
	stopSendingTimeout = 15 * time.Second
)
