package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// Options are what an agent works with. All are required, except Tick.
type Options struct {
	ServerID string
	Store    *catalog.Store
	// View must be running.
	View     *catalog.View
	Gate     Gate
	Volumes  Volumes
	Replicas Replicas
	Space    Space
	Images   Images
	Ports    Ports
	Dirs     Dirs
	Seeds    Seeds
	Monitor  hypervisor.Monitor
	Carrier  Carrier
	Now      func() time.Time
	// Tick bounds how long something waits that only time brings about, and
	// is how often guests are asked how they do. 0: a second.
	Tick time.Duration
	Log  *slog.Logger
}

// Agent is a server's own loop. Its methods are safe for concurrent use.
type Agent struct {
	Options
	// wake asks for a pass.
	wake chan struct{}
	wg   sync.WaitGroup
	// mover is taken by the one work on the disk that may go on for long.
	mover chan struct{}

	// mu guards what follows: all that is known of what is here.
	mu       sync.Mutex
	machines map[string]*machine
	// consoles are the machines of which a console's end is kept here.
	consoles map[string]bool
	volumes  map[string]*volume
	replicas map[string][]uint32 // by volume
	// leftovers are replicas that are to be deleted when their disk can be used.
	leftovers map[string][]uint32
	images    map[string]bool
	probe     *hypervisor.Probe
	jobs      map[string]*job
	retries   map[string]retry
	// measured is when the disk was looked at last, fill what was found.
	measured time.Time
	fill     fill
	// passed is closed at the end of each pass.
	passed chan struct{}
	// leaving: what runs here is shut down; see ShutDown.
	leaving bool
}

// New makes an agent; Run runs it.
func New(o Options) *Agent {
	if o.Tick == 0 {
		o.Tick = defaultTick
	}
	return &Agent{
		Options:   o,
		wake:      make(chan struct{}, 1),
		mover:     make(chan struct{}, 1),
		machines:  map[string]*machine{},
		consoles:  map[string]bool{},
		volumes:   map[string]*volume{},
		replicas:  map[string][]uint32{},
		leftovers: map[string][]uint32{},
		images:    map[string]bool{},
		jobs:      map[string]*job{},
		retries:   map[string]retry{},
		passed:    make(chan struct{}),
	}
}

// Run makes this server equal to the catalog until ctx ends, whose error it
// returns. Guests go on running after it: the next run takes them up again.
// Volumes are detached, which a guest sees as slow disks.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.takeStock(ctx); err != nil {
		return err
	}
	timer := time.NewTimer(a.Tick)
	defer timer.Stop()
	for {
		changed := a.View.Changed()
		next := a.Tick
		if st := a.View.State(); st != nil {
			next = min(next, a.pass(ctx, st))
		}
		timer.Reset(next)
		select {
		case <-ctx.Done():
			a.wg.Wait()
			a.detachAll(context.WithoutCancel(ctx))
			return ctx.Err()
		case <-changed:
		case <-a.wake:
		case <-timer.C:
		}
	}
}

// takeStock finds out what is here already. Nothing may be done before: a
// guest that was not found might be started twice.
func (a *Agent) takeStock(ctx context.Context) error {
	for {
		err := a.look(ctx)
		if err == nil {
			return nil
		}
		a.Log.Error("can't find out what runs and lies on this server; it is tried again", "err", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(a.Tick):
		}
	}
}

func (a *Agent) look(ctx context.Context) error {
	guests, err := a.Monitor.List(ctx)
	if err != nil {
		return fmt.Errorf("list guests: %w", err)
	}
	replicas, err := a.Replicas.List(ctx)
	if err != nil {
		return fmt.Errorf("list replicas: %w", err)
	}
	leftovers, err := a.Replicas.Leftovers()
	if err != nil {
		return fmt.Errorf("list replicas that are to be deleted: %w", err)
	}
	images, err := a.Images.List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range guests {
		machineID, placement, ok := parseGuestID(id)
		if !ok {
			a.Log.Error("a guest with a strange name runs here; it is left alone", "guest", id)
			continue
		}
		m := a.machine(machineID)
		m.guests[placement] = newGuest(id, guestSeen{placement: placement})
	}
	if replicas != nil {
		a.replicas = replicas
	}
	if leftovers != nil {
		a.leftovers = leftovers
	}
	for _, id := range images {
		a.images[id] = true
	}
	for _, id := range a.Dirs.Kept() {
		a.consoles[id] = true
	}
	return nil
}

// pass compares everything here with the records, and starts or cancels
// steps. It returns after what time the next one is due.
func (a *Agent) pass(ctx context.Context, st *catalog.State) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.leaving {
		st = withNobodyHere(st, a.ServerID)
	}
	p := &plan{agent: a, st: st, now: a.Now(), allowed: a.Gate.Allowed(st.Revision), jobs: map[string]job{}}
	p.planDisk()
	p.planProbe()
	p.planVolumes()
	p.planMachines()
	p.planCheckpoints()
	p.planReplicas()
	p.planUpkeep()
	p.planUsage()
	p.planImages()
	next := a.carryOut(ctx, p)
	p.watchGuests(ctx)
	p.watchAttachments(ctx)
	close(a.passed)
	a.passed = make(chan struct{})
	return next
}

// plan is one pass: what is known at its beginning, and the steps found.
type plan struct {
	agent   *Agent
	st      *catalog.State
	now     time.Time
	allowed bool
	// bad: the disk can't be used.
	bad  bool
	jobs map[string]job
}

// job is a step of one object. Two of the same key never run at once.
type job struct {
	// step names what is done; a running job whose object has another next
	// step by now is cancelled, if it can be.
	step string
	// waits: it may wait for long and can be cancelled.
	waits bool
	// urgent: that another step of the object has failed is no reason to wait.
	urgent bool
	run    func(context.Context) error
	cancel context.CancelFunc
}

// retry remembers the failures in a row of a key's jobs, and the last one's step.
type retry struct {
	step     string
	failures int
	at       time.Time
	err      error
}

func (p *plan) add(key string, j job) { p.jobs[key] = j }

// carryOut starts the planned jobs that do not run yet, and cancels those that
// run and are not planned any more. It returns after what time the first one
// that pauses is due.
func (a *Agent) carryOut(ctx context.Context, p *plan) time.Duration {
	next := a.Tick
	for key, running := range a.jobs {
		if next, ok := p.jobs[key]; running.waits && (!ok || next.step != running.step) {
			running.cancel()
		}
	}
	for key, r := range a.retries {
		if _, ok := p.jobs[key]; !ok && a.jobs[key] == nil && p.now.Sub(r.at) > longestPause {
			delete(a.retries, key)
		}
	}
	for key, j := range p.jobs {
		if a.jobs[key] != nil || ctx.Err() != nil {
			continue
		}
		if pause := a.pause(key, j, p.now); pause > 0 {
			next = min(next, pause)
			continue
		}
		a.launch(ctx, key, &j)
	}
	return next
}

// pause is for how long a job still waits after what has failed before it. The
// caller holds mu.
func (a *Agent) pause(key string, j job, now time.Time) time.Duration {
	r := a.retries[key]
	if j.urgent && r.step != j.step {
		return 0
	}
	return r.at.Sub(now)
}

// launch runs a job. The caller holds mu.
func (a *Agent) launch(ctx context.Context, key string, j *job) {
	ctx, j.cancel = context.WithCancel(ctx)
	a.jobs[key] = j
	a.wg.Go(func() {
		err := j.run(ctx)
		cancelled := ctx.Err() != nil
		j.cancel()
		a.finish(key, j.step, err, cancelled)
	})
}

// finish notes how a job ended. A failed one is tried again after a pause that
// grows.
func (a *Agent) finish(key, step string, err error, cancelled bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.jobs, key)
	switch {
	case err == nil:
		delete(a.retries, key)
	case errors.Is(err, ErrOvertaken):
		// The view will show the change soon.
		a.retries[key] = retry{step: step, at: a.Now().Add(overtakenPause)}
	case !cancelled:
		r := retry{step: step, failures: a.retries[key].failures + 1, err: err}
		r.at = a.Now().Add(pauseAfter(r.failures))
		a.retries[key] = r
		a.Log.Warn("a step failed; it is tried again", "object", key, "step", step, "failures", r.failures, "err", err)
	}
	a.nudge()
}

// recording is the time that a change of a record gets. The view may show the
// change before its answer is here: then nobody plans the step any more that makes
// it, and what follows from the answer is still to be done.
func recording(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
}

// nudge asks for a pass.
func (a *Agent) nudge() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// tell appends an event, also when its job is cancelled meanwhile: what it is
// about has happened. A lost event is no reason to stop.
func (a *Agent) tell(ctx context.Context, e *argonv1.Event) {
	if e == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), eventTimeout)
	defer cancel()
	e.ServerId = a.ServerID
	if err := a.Store.Events.Append(ctx, e); err != nil {
		a.Log.Warn("an event could not be recorded", "reason", e.GetReason(), "subject", e.GetSubjectName(), "err", err)
	}
}

// serverName is what users call this server.
func (p *plan) serverName() string {
	return p.st.Servers[p.agent.ServerID].GetMeta().GetName()
}
