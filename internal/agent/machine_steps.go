package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file carries out what machine.go and status.go decide.

// machine is what is known here of a machine.
type machine struct {
	guests map[uint64]*guest // by placement
	// crashes counts the guests in a row that went without being told to.
	crashes   int
	crashedAt time.Time
	crash     string
	// doing says what is done that takes long before there is a guest.
	doing string
	// migration is the order that was seen last, orderedAt when it was seen first.
	migration string
	orderedAt time.Time
	// waitingSince is when a disk of the running guest was first seen not to
	// serve; zero while all do.
	waitingSince time.Time
}

// guest is one process that runs, or ran, a machine here.
type guest struct {
	id     string
	handle hypervisor.Guest // nil until adopted
	since  time.Time
	// watched: a goroutine follows it.
	watched bool
	// found: it ran before this daemon did.
	found bool
	// killed: by us, so its end is no crash.
	killed bool
	// wentOn is when it was told to go on after a migration.
	wentOn time.Time
	// forwarded is what leads to its ports.
	forwarded []hypervisor.Port
	// changing is held by who changes its devices, and by whom they must stay the
	// same for.
	changing chan struct{}
	// stood has how its clock came to be behind, for who sets it: the last time.
	stood chan stop
	guestSeen
}

// newGuest is one that is to run, or was found running.
func newGuest(id string, seen guestSeen) *guest {
	return &guest{id: id, guestSeen: seen, stood: make(chan stop, 1), changing: make(chan struct{}, 1)}
}

// machine finds or makes the entry of a machine. The caller holds mu.
func (a *Agent) machine(id string) *machine {
	m := a.machines[id]
	if m == nil {
		m = &machine{guests: map[uint64]*guest{}}
		a.machines[id] = m
	}
	return m
}

// ErrNotHere: the machine has no guest on this server.
var ErrNotHere = errors.New("the machine does not run on this server")

// Guest is the machine's guest on this server, for its console. ErrNotHere if
// there is none.
func (a *Agent) Guest(machineID string) (hypervisor.Guest, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if m := a.machines[machineID]; m != nil {
		for _, g := range m.guests {
			if g.adopted && !g.exited {
				return g.handle, nil
			}
		}
	}
	return nil, ErrNotHere
}

// guestFates says for each machine that has guests here whether they may stay:
// all are of the placement that the catalog shows.
func (p *plan) guestFates() map[string]bool {
	fates := map[string]bool{}
	for id, local := range p.agent.machines {
		m := p.st.Machines[id]
		for placement := range local.guests {
			stays := belongs(m, p.agent.ServerID) && m.GetPlacement() == placement
			if before, ok := fates[id]; ok {
				stays = stays && before
			}
			fates[id] = stays
		}
	}
	return fates
}

// forgetConsoles deletes what was kept of machines that are no more.
func (p *plan) forgetConsoles() {
	for id := range p.agent.consoles {
		if p.st.Machines[id] == nil && p.agent.machines[id] == nil {
			p.agent.Dirs.Forget(id)
			delete(p.agent.consoles, id)
		}
	}
}

func (p *plan) planMachines() {
	a := p.agent
	p.forgetConsoles()
	for id, m := range p.st.Machines {
		if belongs(m, a.ServerID) || receives(m, a.ServerID) {
			a.machine(id)
		}
	}
	for id, local := range a.machines {
		m := p.st.Machines[id]
		if len(local.guests) == 0 && !belongs(m, a.ServerID) && !receives(m, a.ServerID) {
			delete(a.machines, id)
			continue
		}
		p.planMachine(id, m, local)
	}
}

func (p *plan) planMachine(id string, m *argonv1.Machine, local *machine) {
	a, key := p.agent, "machine/"+id
	seen := p.seeMachine(key, m, local)
	if o, ok := observe(m, a.ServerID, seen, p.allowed); ok && a.differs(o, m, p.now) {
		name := p.serverName()
		p.add("status/"+id, job{step: fmt.Sprint(o), run: func(ctx context.Context) error { return a.report(ctx, m, name, o) }})
	}
	p.planMigration(id, m, local)
	p.planArrival(id, m, local)
	step, placement := nextForMachine(m, a.ServerID, seen, p.allowed, p.now)
	if step == rest {
		return
	}
	key, j := p.machineJob(id, step, m, local.guests[placement], seen)
	j.step = step.String() + " " + strconv.FormatUint(placement, 10) + j.step
	p.add(key, j)
}

// machineJob is what carries a step out, and its key. Its step is only what tells it
// from others of the same name.
func (p *plan) machineJob(id string, step machineStep, m *argonv1.Machine, g *guest, seen machineSeen) (key string, j job) {
	a, key := p.agent, "machine/"+id
	switch step {
	case adopt:
		j.run = func(ctx context.Context) error { return a.adopt(ctx, id, m, g) }
	case start:
		j.waits, j.run = true, func(ctx context.Context) error { return a.start(ctx, m) }
	case pressPower:
		j.waits, j.run = true, func(ctx context.Context) error { return a.pressPower(ctx, g) }
	case pressAgain:
		j.waits, j.run = true, func(ctx context.Context) error { return a.pressAgain(ctx, g) }
	case kill:
		why := seen.disks.over
		if why == "" && g.isHalted(p.now) {
			why = "its process was " + g.status.Detail + ", and another takes its place"
		}
		j.urgent = true
		j.run = func(ctx context.Context) error { return a.kill(ctx, m, g, why) }
	case resume:
		j.run = func(ctx context.Context) error { return a.resume(ctx, g) }
	case share:
		// A failure must not hold up what else there is to do.
		key = "shares/" + id
		j.step = fmt.Sprint(sharesOf(m))
		j.run = func(ctx context.Context) error { return a.share(ctx, g, sharesOf(m)) }
	case forward:
		key = "ports/" + id
		j.step = fmt.Sprint(portsOf(m))
		j.run = func(ctx context.Context) error { return a.forward(ctx, m, g) }
	case grow:
		key = "disks/" + id
		sizes := seen.disks.sizes
		j.step = fmt.Sprint(sizes)
		j.run = func(ctx context.Context) error { return a.growDisks(ctx, m, g, sizes) }
	case change:
		key = "devices/" + id
		c := placement.Changing(m)
		j.step = fmt.Sprint(c)
		j.run = func(ctx context.Context) error { return a.changeGuest(ctx, m, g) }
	case check:
		c, st := p.st.Checkpoints[m.GetWake().GetCheckpointId()], p.st
		j.waits, j.run = true, func(ctx context.Context) error { return a.check(ctx, st, m, c) }
	case wake:
		c := p.st.Checkpoints[m.GetWake().GetCheckpointId()]
		j.waits, j.run = true, func(ctx context.Context) error { return a.wakeUp(ctx, m, c) }
	case receive:
		j.waits, j.run = true, func(ctx context.Context) error { return a.receive(ctx, m) }
	case announceIt:
		j.run = func(ctx context.Context) error { return a.announceReceiver(ctx, m) }
	case goOn:
		j.run = func(ctx context.Context) error { return a.goOn(ctx, g) }
	case reap:
		allowed := p.allowed
		j.run = func(ctx context.Context) error { return a.reap(ctx, m, g, allowed) }
	}
	return key, j
}

// seeMachine gathers what the decisions are made from.
func (p *plan) seeMachine(key string, m *argonv1.Machine, local *machine) machineSeen {
	seen := machineSeen{doing: local.doing}
	suspending := beingSuspended(p.st, m)
	for _, g := range local.guests {
		g.noteStop(m, p.now)
		one := g.guestSeen
		one.saving = one.saving || suspending
		seen.guests = append(seen.guests, one)
	}
	if seen.disks = p.seeDisks(m); p.agent.leaves(m.GetMeta().GetId()) {
		seen.disks = disksSeen{waits: "they go to another server"} // as is wanted
	}
	seen.disks.spare = len(local.guests) > 0 && p.spare(m)
	if _, err := p.agent.accelerates(); errors.Is(err, errNotProbed) && len(local.guests) == 0 {
		seen.disks.ready, seen.disks.waits = false, cmp.Or(seen.disks.waits, err.Error())
	}
	switch {
	case seen.disks.waits == "" || len(local.guests) == 0:
		local.waitingSince = time.Time{}
	case local.waitingSince.IsZero():
		local.waitingSince = p.now
	}
	if len(local.guests) > 0 && !seen.disks.full && p.now.Sub(local.waitingSince) < patience {
		seen.disks.waits = ""
	}
	if r := p.agent.retries[key]; r.err != nil {
		seen.failure, seen.retryAt = r.err.Error(), r.at
	}
	if until := local.crashedAt.Add(pauseAfter(local.crashes)); local.crashes > 0 && p.now.Before(until) {
		seen.failure, seen.retryAt = local.crash, until
	}
	if running := p.agent.jobs[key]; running != nil && running.waits {
		seen.failure = "" // it is being started
	}
	return seen
}

// differs tells whether an observation would change the record.
func (a *Agent) differs(o observation, m *argonv1.Machine, now time.Time) bool {
	probe := &argonv1.Machine{Placement: m.GetPlacement(), Status: m.GetStatus()}
	return o.apply(probe, a.ServerID, now)
}

// report writes an observation to the machine's record, and tells of it. It does
// neither if the record is not the one any more that the observation was made
// from, in what an observation depends on: the placement, what is wanted, and what
// was observed before. A view that is behind shows a machine that has just powered
// itself off as one to be started; and one that was stopped, and is being started
// since, must not be called stopped any more: it would be given another server.
func (a *Agent) report(ctx context.Context, seen *argonv1.Machine, serverName string, o observation) error {
	var old *argonv1.MachineStatus
	m, err := a.Store.Machines.Update(ctx, seen.GetMeta().GetId(), func(m *argonv1.Machine) error {
		if !belongs(m, a.ServerID) || m.GetPlacement() != seen.GetPlacement() || wanted(m) != wanted(seen) ||
			!proto.Equal(m.GetStatus(), seen.GetStatus()) {
			return ErrOvertaken
		}
		old = m.GetStatus()
		if !o.apply(m, a.ServerID, a.Now()) {
			return ErrOvertaken
		}
		return nil
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return ErrOvertaken
	}
	if err != nil {
		return fmt.Errorf("report that the machine is %v: %w", o.state, err)
	}
	a.tell(ctx, tell(m, old, serverName))
	return nil
}

// adopt takes up a guest that was found running.
func (a *Agent) adopt(ctx context.Context, id string, m *argonv1.Machine, g *guest) error {
	ctx, cancel := a.answering(ctx)
	defer cancel()
	handle, err := a.Monitor.Adopt(ctx, g.id)
	if errors.Is(err, os.ErrNotExist) {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.machine(id).guests, g.placement)
		return nil
	}
	if err != nil {
		return fmt.Errorf("take up guest %s, which was found running: %w", g.id, err)
	}
	if m != nil {
		if _, err := a.Ports.Open(ctx, m, g.id); err != nil {
			a.Log.Warn("published ports do not lead to the guest", "machine", m.GetMeta().GetName(), "err", err)
		}
	}
	status, err := handle.Status(ctx)
	if err != nil {
		return fmt.Errorf("take up guest %s, which was found running: %w", g.id, err)
	}
	a.mu.Lock()
	g.found, g.unshared, g.unforwarded, g.asked, g.info = true, true, true, true, m.GetStatus().GetGuest()
	a.mu.Unlock()
	a.take(ctx, g, handle)
	a.note(func() {
		g.status = status
		// Whoever made it stand still is gone.
		g.arriving = status.State == hypervisor.Receiving || status.State == hypervisor.Paused && status.Detail == "paused"
	})
	return nil
}

// take makes a guest ours: the next pass begins to watch it.
func (a *Agent) take(ctx context.Context, g *guest, handle hypervisor.Guest) {
	about, err := handle.Platform(ctx)
	if err != nil {
		a.Log.Warn("a guest does not say what kind of machine it is", "guest", g.id, "err", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	g.handle, g.adopted, g.since, g.machineType = handle, true, a.Now(), about.Machine
	g.status = hypervisor.Status{State: hypervisor.Running}
}

// start starts the guest of a machine whose disks are all ready.
func (a *Agent) start(ctx context.Context, m *argonv1.Machine) error {
	id, placement := m.GetMeta().GetId(), m.GetPlacement()
	probe, err := a.probed()
	if err != nil {
		return err
	}
	accel := probe.Acceleration
	switch want := hypervisor.Acceleration(m.GetAcceleration()); {
	case want == hypervisor.TCG:
		accel = want
	case want == hypervisor.KVM && accel != hypervisor.KVM:
		return fmt.Errorf("the machine wants KVM, which this server can't give: %s", probe.Reason)
	}
	m, err = a.announce(ctx, id, placement, nil)
	if err != nil {
		return err
	}
	g := newGuest(GuestID(id, placement), guestSeen{placement: placement, acceleration: accel, unshared: sharesOf(m) != hypervisor.Shares{}})
	spec, err := a.spec(ctx, m, g)
	if err == nil {
		var handle hypervisor.Guest
		if handle, err = a.Monitor.Start(ctx, spec); err == nil {
			a.take(ctx, g, handle)
			a.mu.Lock()
			defer a.mu.Unlock()
			a.machine(id).guests[placement] = g
			return nil
		}
	}
	a.clearAway(g)
	return fmt.Errorf("start the guest: %w", err)
}

// clearAway removes what a guest leaves that does not run any more, or never did.
func (a *Agent) clearAway(g *guest) {
	a.Ports.Close(g.id)
	machineID, _, _ := parseGuestID(g.id)
	a.Dirs.Remove(g.id, machineID)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.consoles[machineID] = true
}

// announce writes that the machine is being started, right before it is: so
// the record never shows a run that is over as if it went on, and a machine
// that was moved or stopped in the meantime is not started. It also writes what the
// guest is made of, nil for what is wanted now, and returns the machine as that.
func (a *Agent) announce(ctx context.Context, id string, number uint64, hardware *argonv1.Hardware) (*argonv1.Machine, error) {
	m, err := a.Store.Machines.Update(ctx, id, func(m *argonv1.Machine) error {
		if !belongs(m, a.ServerID) || m.GetPlacement() != number || wanted(m) != argonv1.Wanted_WANTED_RUNNING {
			return ErrOvertaken
		}
		if m.InForce = hardware; hardware == nil {
			placement.Settle(m)
			m.InForce = placement.HardwareOf(m)
		}
		observation{state: stateStarting}.apply(m, a.ServerID, a.Now())
		return nil
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return nil, ErrOvertaken
	}
	if err != nil {
		return nil, fmt.Errorf("announce the start: %w", err)
	}
	return placement.AsStarted(m), nil
}

// spec is what the machine's guest is made of.
func (a *Agent) spec(ctx context.Context, m *argonv1.Machine, g *guest) (hypervisor.Spec, error) {
	dir, err := a.Dirs.Make(g.id)
	if err != nil {
		return hypervisor.Spec{}, fmt.Errorf("make the guest's directory: %w", err)
	}
	ports, err := a.Ports.Open(ctx, m, g.id)
	if err != nil {
		return hypervisor.Spec{}, fmt.Errorf("open its published ports: %w", err)
	}
	spec := hypervisor.Spec{
		ID: g.id, Name: m.GetMeta().GetName(), CPUs: int(m.GetCpus()), MemoryBytes: int64(m.GetMemoryBytes()),
		Acceleration: g.acceleration, Shares: sharesOf(m), Ports: ports, Dir: dir, Firmware: hypervisor.Firmware(m.GetFirmware()),
		Generation: m.GetGenerationId(),
	}
	g.forwarded, g.ports = ports, portsOf(m)
	h := placement.InForce(m)
	for _, d := range h.GetNetworks() {
		spec.Networks = append(spec.Networks, hypervisor.Network{Slot: int(d.GetSlot()), MAC: d.GetId()})
	}
	if m.GetFirstBoot() != nil {
		whole, err := a.Store.Whole(ctx, m)
		if err != nil {
			return hypervisor.Spec{}, err
		}
		if spec.Seed, err = a.Seeds.Write(dir, whole); err != nil {
			return hypervisor.Spec{}, err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, d := range h.GetDisks() {
		disk, err := a.diskOf(m, d)
		if err != nil {
			return hypervisor.Spec{}, err
		}
		spec.Disks = append(spec.Disks, disk)
	}
	return spec, nil
}

// diskOf is a volume of a machine that is attached here, as its guest has it. The
// caller holds mu.
func (a *Agent) diskOf(m *argonv1.Machine, d *argonv1.Device) (hypervisor.Disk, error) {
	v := a.volumes[d.GetId()]
	if v == nil || v.attachment == nil || v.attached.machineID != m.GetMeta().GetId() {
		return hypervisor.Disk{}, ErrOvertaken
	}
	disk := v.attachment.Disk()
	disk.Slot = int(d.GetSlot())
	return disk, nil
}

// share gives a guest its shares. What this server or this guest can't have is
// told in its status, and not tried again until it is wanted otherwise.
func (a *Agent) share(ctx context.Context, g *guest, shares hypervisor.Shares) error {
	detail := ""
	err := g.handle.SetShares(ctx, shares)
	switch {
	case errors.Is(err, hypervisor.ErrCannotLimit), errors.Is(err, hypervisor.ErrOldGuest):
		detail = err.Error()
	case err != nil:
		return fmt.Errorf("set its shares: %w", err)
	}
	a.note(func() { g.shares, g.unshared, g.sharesDetail = shares, false, detail })
	return nil
}

// forward gives a guest that runs the ports that are published now.
func (a *Agent) forward(ctx context.Context, m *argonv1.Machine, g *guest) error {
	ports, err := a.Ports.Open(ctx, m, g.id)
	if err == nil {
		ctx, cancel := a.answering(ctx)
		defer cancel()
		a.mu.Lock()
		stale := g.forwarded
		a.mu.Unlock()
		err = g.handle.SetPorts(ctx, stale, ports)
	}
	if err != nil {
		return fmt.Errorf("publish its ports: %w", err)
	}
	a.note(func() { g.forwarded, g.ports, g.unforwarded = ports, portsOf(m), false })
	return nil
}

// growDisks tells a guest how large its disks are.
func (a *Agent) growDisks(ctx context.Context, m *argonv1.Machine, g *guest, sizes []uint64) error {
	select {
	case g.changing <- struct{}{}:
		defer func() { <-g.changing }()
	default:
		return ErrOvertaken
	}
	for i, d := range placement.InForce(m).GetDisks() {
		a.mu.Lock()
		disk, err := a.diskOf(m, d)
		a.mu.Unlock()
		if err != nil {
			return err
		}
		err = g.handle.GrowDisk(ctx, disk, int64(sizes[i]))
		if errors.Is(err, hypervisor.ErrOldGuest) {
			a.Log.Warn("a guest sees its disk grow when it is started again", "machine", m.GetMeta().GetName(), "volume", d.GetId(), "err", err)
		} else if err != nil {
			return fmt.Errorf("let it see that a disk has grown: %w", err)
		}
	}
	a.note(func() { g.diskSizes = sizes })
	return nil
}

// answering is the time that a guest's monitor gets to answer. One that hangs must
// not keep the guest from being ended: that is a step like this one.
func (a *Agent) answering(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, answerWithin*a.Tick)
}

func (a *Agent) pressPower(ctx context.Context, g *guest) error {
	ctx, cancel := a.answering(ctx)
	defer cancel()
	if err := g.handle.PowerDown(ctx); err != nil {
		return fmt.Errorf("press the power button: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	g.powerDownAt = a.Now()
	return nil
}

func (a *Agent) pressAgain(ctx context.Context, g *guest) error {
	ctx, cancel := a.answering(ctx)
	defer cancel()
	if err := g.handle.PressPower(ctx); err != nil {
		return fmt.Errorf("press the power button again: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	g.pressedAgain = true
	return nil
}

// kill ends a guest at once. restarts says why another is to take its place; empty
// if none is.
func (a *Agent) kill(ctx context.Context, m *argonv1.Machine, g *guest, restarts string) error {
	a.mu.Lock()
	// One that has powered itself off already ended by its own will.
	g.killed = g.status.State != hypervisor.ShutDown
	deaf := g.killed && !g.stopSince.IsZero() && !neverRan(g.guestSeen) && !m.GetForceStop()
	a.mu.Unlock()
	if err := g.handle.Kill(ctx); err != nil {
		return fmt.Errorf("kill guest %s: %w", g.id, err)
	}
	if deaf {
		a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-stop-forced", "it did not obey its power button in time, and was ended"))
	}
	if restarts != "" && belongs(m, a.ServerID) && m.GetPlacement() == g.placement {
		a.tell(ctx, machineEvent(m, argonv1.Severity_SEVERITY_WARNING, "machine-restarted", restarts))
	}
	return nil
}

func (a *Agent) resume(ctx context.Context, g *guest) error {
	a.mu.Lock()
	g.resumedAt = a.Now()
	a.mu.Unlock()
	ctx, cancel := a.answering(ctx)
	defer cancel()
	if err := g.goOn(ctx, stop{}); err != nil {
		return fmt.Errorf("resume guest %s: %w", g.id, err)
	}
	return nil
}
