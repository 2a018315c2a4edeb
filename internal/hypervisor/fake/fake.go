// Package fake is a machine monitor without machines, for tests of what uses
// one.
//
// What lives here: guests that are only an id and a state, and the ways in
// which a test makes them misbehave. What must not: anything that a program
// outside of tests could want.
package fake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// Monitor runs guests that do nothing. Like real ones they outlive the daemon:
// it is to the next one what it was to the last. The zero value is ready; safe
// for concurrent use.
type Monitor struct {
	mu     sync.Mutex
	guests map[string]*Guest
	starts int
	fail   error
	twice  []string
	kinds  []string
	// Census, if it is set, is told whose processors run.
	Census *Census
}

// Probe implements hypervisor.Monitor.
func (m *Monitor) Probe(context.Context) (hypervisor.Probe, error) {
	return hypervisor.Probe{Acceleration: hypervisor.TCG, Reason: "it is only a fake"}, nil
}

// Start implements hypervisor.Monitor.
func (m *Monitor) Start(_ context.Context, spec hypervisor.Spec) (hypervisor.Guest, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return nil, m.fail
	}
	kind, err := m.kind(spec.Machine)
	if err != nil {
		return nil, err
	}
	if len(m.guests) > 0 {
		m.twice = append(m.twice, spec.ID)
	}
	if m.guests == nil {
		m.guests = map[string]*Guest{}
	}
	m.starts++
	g := &Guest{monitor: m, id: spec.ID, kind: kind, pid: m.starts, done: make(chan struct{}), shares: spec.Shares, spec: spec}
	first := hypervisor.Running
	if spec.Incoming {
		first = hypervisor.Receiving
	}
	g.Set(hypervisor.Status{State: first})
	m.guests[spec.ID] = g
	return g, nil
}

// kind is the kind of machine that a guest becomes. The caller holds mu.
func (m *Monitor) kind(wanted string) (string, error) {
	known := m.kinds
	if len(known) == 0 {
		known = []string{"fake-1"}
	}
	if wanted == "" {
		return known[0], nil
	}
	if !slices.Contains(known, wanted) {
		return "", fmt.Errorf("unsupported machine type %q", wanted)
	}
	return wanted, nil
}

// Know makes it know these kinds of machine, the newest first. Else it knows
// "fake-1".
func (m *Monitor) Know(kinds ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kinds = kinds
}

// Adopt implements hypervisor.Monitor.
func (m *Monitor) Adopt(_ context.Context, id string) (hypervisor.Guest, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if g := m.guests[id]; g != nil {
		return g, nil
	}
	return nil, os.ErrNotExist
}

// List implements hypervisor.Monitor.
func (m *Monitor) List(context.Context) ([]string, error) {
	var ids []string
	for _, g := range m.Guests() {
		ids = append(ids, g.id)
	}
	return ids, nil
}

// Fail makes every start fail with err from now on; nil ends that.
func (m *Monitor) Fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

// Guests are those that run, by id.
func (m *Monitor) Guests() []*Guest {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []*Guest
	for _, g := range m.guests {
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b *Guest) int { return a.pid - b.pid })
	return all
}

// Starts is how many were ever started.
func (m *Monitor) Starts() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.starts
}

// Twice names the guests that were started while another ran.
func (m *Monitor) Twice() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.twice)
}

// KillAll ends all guests, as the loss of their server does.
func (m *Monitor) KillAll() {
	for _, g := range m.Guests() {
		g.Exit()
	}
}

// Guest runs until it is told otherwise.
type Guest struct {
	monitor *Monitor
	id      string
	kind    string
	pid     int
	done    chan struct{}
	once    sync.Once

	mu     sync.Mutex
	status hypervisor.Status
	deaf   bool
	shares hypervisor.Shares
	grown  map[int]int64
	info   *hypervisor.Info
	// clockSet is how often its clock was set.
	clockSet int
	ports    []hypervisor.Port
	spec     hypervisor.Spec // with the devices that it has now
	// clings: it lets go of no device.
	clings bool
	frozen bool
	line   *Line
	// resumed is how often it was told to go on.
	resumed int
	// mind is its memory; unsaveable is why that can't be written.
	mind       string
	unsaveable error
	pausedOnly bool
	prepared   bool
	// wedged: its monitor answers nothing until it is gone.
	wedged bool
}

// ID implements hypervisor.Guest.
func (g *Guest) ID() string { return g.id }

// PID implements hypervisor.Guest.
func (g *Guest) PID() int { return g.pid }

// Done implements hypervisor.Guest.
func (g *Guest) Done() <-chan struct{} { return g.done }

// Status implements hypervisor.Guest.
func (g *Guest) Status(ctx context.Context) (hypervisor.Status, error) {
	if err := g.answer(ctx); err != nil {
		return hypervisor.Status{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.status, nil
}

// Set makes it be in a state.
func (g *Guest) Set(s hypervisor.Status) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(s)
}

// set is Set for who holds mu.
func (g *Guest) set(s hypervisor.Status) {
	select {
	case <-g.done:
		return // it is gone
	default:
	}
	g.status = s
	g.monitor.Census.note(g, s.State == hypervisor.Running)
}

// Deafen makes it ignore its power button.
func (g *Guest) Deafen() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deaf = true
}

// Wedge makes its monitor answer nothing more; only Kill ends it.
func (g *Guest) Wedge() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wedged = true
}

// answer waits for as long as the monitor does not answer.
func (g *Guest) answer(ctx context.Context) error {
	g.mu.Lock()
	wedged := g.wedged
	g.mu.Unlock()
	if !wedged {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-g.done:
		return errors.New("it has ended")
	}
}

// PowerDown implements hypervisor.Guest: it obeys at once unless it is deaf.
func (g *Guest) PowerDown(ctx context.Context) error {
	if err := g.answer(ctx); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.deaf {
		g.set(hypervisor.Status{State: hypervisor.ShutDown})
	}
	return nil
}

// PressPower implements hypervisor.Guest.
func (g *Guest) PressPower(ctx context.Context) error { return g.PowerDown(ctx) }

// Resume implements hypervisor.Guest.
func (g *Guest) Resume(ctx context.Context) error {
	if err := g.answer(ctx); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.resumed++
	g.set(hypervisor.Status{State: hypervisor.Running})
	return nil
}

// Resumed is how often it was told to go on.
func (g *Guest) Resumed() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.resumed
}

// SetShares implements hypervisor.Guest. It has nothing to keep a
// cap of NoLimit with.
func (g *Guest) SetShares(_ context.Context, s hypervisor.Shares) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shares = s
	if s.CPUPercent == NoLimit {
		return hypervisor.ErrCannotLimit
	}
	return nil
}

// GrowDisk implements hypervisor.Guest.
func (g *Guest) GrowDisk(_ context.Context, d hypervisor.Disk, bytes int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.grown == nil {
		g.grown = map[int]int64{}
	}
	g.grown[d.Slot] = bytes
	return nil
}

// Grown is the size that a disk was told to have, in bytes; 0 if none.
func (g *Guest) Grown(disk int) int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.grown[disk]
}

// NoLimit is a cap that the fake has nothing to keep with.
const NoLimit = 13

// Shares are what was set last.
func (g *Guest) Shares() hypervisor.Shares {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shares
}

// Kill implements hypervisor.Guest.
func (g *Guest) Kill(context.Context) error {
	g.Exit()
	return nil
}

// Exit ends the guest's process.
func (g *Guest) Exit() {
	g.once.Do(func() {
		g.monitor.mu.Lock()
		defer g.monitor.mu.Unlock()
		delete(g.monitor.guests, g.id)
		g.monitor.Census.note(g, false)
		close(g.done)
	})
}

// Console implements hypervisor.Guest: what is typed is printed.
func (g *Guest) Console(context.Context) (io.ReadWriteCloser, error) {
	r, w := io.Pipe()
	return echo{r, w}, nil
}

// Display implements hypervisor.Guest: what is sent comes back.
func (g *Guest) Display(ctx context.Context) (io.ReadWriteCloser, error) { return g.Console(ctx) }

// Screenshot implements hypervisor.Guest. It is no picture.
func (g *Guest) Screenshot(context.Context) ([]byte, error) { return []byte("\x89PNG " + g.id), nil }

// Say makes it have an agent that says so; nil: none.
func (g *Guest) Say(info *hypervisor.Info) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.info = info
}

// Info implements hypervisor.Guest.
func (g *Guest) Info(context.Context) (hypervisor.Info, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.info == nil || g.frozen {
		return hypervisor.Info{}, hypervisor.ErrNoAgent
	}
	return *g.info, nil
}

// Freeze implements hypervisor.Guest.
func (g *Guest) Freeze(context.Context) error { return g.freeze(true) }

// Thaw implements hypervisor.Guest.
func (g *Guest) Thaw(context.Context) error { return g.freeze(false) }

func (g *Guest) freeze(frozen bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.info == nil {
		return hypervisor.ErrNoAgent
	}
	g.frozen = frozen
	return nil
}

// Reset implements hypervisor.Guest.
func (g *Guest) Reset(context.Context) error { return nil }

// SetPorts implements hypervisor.Guest.
func (g *Guest) SetPorts(_ context.Context, _, wanted []hypervisor.Port) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ports = wanted
	return nil
}

// Spec is what it is made of now.
func (g *Guest) Spec() hypervisor.Spec {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.spec
	s.Disks, s.Networks = slices.Clone(s.Disks), slices.Clone(s.Networks)
	return s
}

// Ports are those that were set last; nil: none were.
func (g *Guest) Ports() []hypervisor.Port {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ports
}

// SetClock implements hypervisor.Guest.
func (g *Guest) SetClock(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.info == nil {
		return hypervisor.ErrNoAgent
	}
	g.clockSet++
	return nil
}

// ClockSet is how often its clock was set.
func (g *Guest) ClockSet() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.clockSet
}

// Frozen tells whether its file systems rest.
func (g *Guest) Frozen() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.frozen
}

// echo is a console that prints what is typed.
type echo struct {
	*io.PipeReader
	w *io.PipeWriter
}

func (e echo) Write(p []byte) (int, error) { return e.w.Write(p) }

func (e echo) Close() error {
	_ = e.w.Close()
	return e.PipeReader.Close()
}
