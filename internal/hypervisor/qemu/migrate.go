package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
)

// The words of this file are those of QEMU's qapi/migration.json.

const (
	// shortest and longest are how long QEMU may take a guest to stand still
	// for the last of its memory: a guest that changes it too fast is given
	// more, pass by pass, besides being slowed down.
	shortest = 30 * time.Millisecond
	longest  = 500 * time.Millisecond
	// passesEach is after how many passes over the memory it gets twice as long.
	passesEach = 8
	// maxBandwidth is what a transfer may use, in bytes a second: all there is.
	maxBandwidth = 1 << 40
	// lookAtTransfer is how often progress is asked for.
	lookAtTransfer = 100 * time.Millisecond
	// stopSendingTimeout bounds how long QEMU may take to give up.
	stopSendingTimeout = 10 * time.Second
	// streamName is what QEMU knows the transfer's socket by.
	streamName = "migration"
)

// sending and receiving are what the two sides must be able to do.
var (
	sending   = []string{"pause-before-switchover", "auto-converge", "return-path", "events"}
	receiving = []string{"late-block-activate", "return-path", "events"}
)

// migration is QEMU's MigrationInfo.
type migration struct {
	Status           string `json:"status"`
	Error            string `json:"error-desc"`
	Downtime         int64  `json:"downtime"`
	ExpectedDowntime int64  `json:"expected-downtime"`
	Throttle         int    `json:"cpu-throttle-percentage"`
	RAM              struct {
		Transferred uint64 `json:"transferred"`
		Remaining   uint64 `json:"remaining"`
		Total       uint64 `json:"total"`
		Passes      int    `json:"dirty-sync-count"`
	} `json:"ram"`
}

func (m *migration) transfer() hypervisor.Transfer {
	t := hypervisor.Transfer{
		SentBytes: m.RAM.Transferred, RemainingBytes: m.RAM.Remaining, TotalBytes: m.RAM.Total,
		Passes: m.RAM.Passes, Throttle: m.Throttle,
		Downtime: time.Duration(m.ExpectedDowntime) * time.Millisecond,
	}
	if m.Status == "completed" {
		t.Downtime = time.Duration(m.Downtime) * time.Millisecond
	}
	return t
}

// over tells whether nothing is being sent.
func (m *migration) over() bool {
	switch m.Status {
	case "", "none", "completed", "failed", "cancelled":
		return true
	}
	return false
}

// receive makes a new QEMU wait for another one's state.
func (g *guest) receive(ctx context.Context) error {
	if err := g.enable(ctx, receiving); err != nil {
		return err
	}
	return g.executeWith(ctx, "migrate-incoming", map[string]any{"uri": "unix:" + hypervisor.IncomingSocket(g.dir)}, nil)
}

func (g *guest) enable(ctx context.Context, capabilities []string) error {
	type capability struct {
		Name  string `json:"capability"`
		State bool   `json:"state"`
	}
	var list []capability
	for _, c := range capabilities {
		list = append(list, capability{c, true})
	}
	return g.executeWith(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// Send implements hypervisor.Guest.
func (g *guest) Send(ctx context.Context, conn net.Conn, progress func(hypervisor.Transfer)) error {
	emulated, err := g.emulated(ctx)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	if err = g.beginSending(ctx, conn, emulated); err == nil {
		allowed := shortest
		_, err = g.await(ctx, "pre-switchover", func(t hypervisor.Transfer) (err error) {
			progress(t)
			if !emulated {
				allowed, err = g.allow(ctx, allowed, t.Passes)
			}
			return err
		})
	}
	if err == nil {
		return nil
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopSendingTimeout)
	defer cancel()
	return errors.Join(err, g.StopSending(bounded))
}

// beginSending hands the connection over and tells QEMU to begin.
func (g *guest) beginSending(ctx context.Context, conn net.Conn, emulated bool) error {
	defer conn.Close()
	held, ok := conn.(interface{ File() (*os.File, error) })
	if !ok {
		return fmt.Errorf("guest %s: a %T can't be handed to QEMU", g.id, conn)
	}
	f, err := held.File()
	if err != nil {
		return fmt.Errorf("guest %s: handing the connection to QEMU: %w", g.id, err)
	}
	defer f.Close()
	if err := g.settle(ctx); err != nil {
		return err
	}
	if err := g.enable(ctx, sending); err != nil {
		return err
	}
	allowed := shortest
	if emulated {
		allowed = 0
	}
	if err := g.executeWith(ctx, "migrate-set-parameters", map[string]any{
		"max-bandwidth": int64(maxBandwidth), "downtime-limit": allowed.Milliseconds(),
	}, nil); err != nil {
		return err
	}
	client, err := g.monitor(ctx)
	if err == nil {
		err = client.ExecuteWith(ctx, f, "getfd", map[string]any{"fdname": streamName}, nil)
	}
	if err != nil {
		return fmt.Errorf("guest %s: handing the connection to QEMU: %w", g.id, err)
	}
	start := func() error {
		return g.executeWith(ctx, "migrate", map[string]any{"uri": "fd:" + streamName}, nil)
	}
	if emulated {
		return g.standingStill(ctx, start)
	}
	return start()
}

// emulated tells whether the guest's processors are TCG's. QEMU's record of the
// memory that such a guest changes has two holes. What is in a processor's
// translation buffer when the record begins is changed without a trace; and so
// is, after a later look at the record, what was due to be sent already. So the
// guest stands still for a moment at the beginning, and there is one pass over
// its memory, without a look, before it stands still for the rest.
func (g *guest) emulated(ctx context.Context) (bool, error) {
	var answer struct {
		Enabled bool `json:"enabled"`
	}
	err := g.execute(ctx, "query-kvm", &answer)
	return !answer.Enabled, err
}

// standingStill starts a transfer of a guest that stands still until QEMU records
// what it changes.
func (g *guest) standingStill(ctx context.Context, start func() error) error {
	before, err := g.Status(ctx)
	if err != nil {
		return err
	}
	if before.State != hypervisor.Running {
		return start()
	}
	if err := g.execute(ctx, "stop", nil); err != nil {
		return err
	}
	err = start()
	for begun := false; err == nil && !begun; {
		var m *migration
		if m, err = g.migration(ctx); err != nil {
			break
		}
		if begun = m.Status != "setup" && m.Status != "none"; !begun {
			err = g.awaitNews(ctx)
		}
	}
	// It may be about to stand still for the rest: then it stays so.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopSendingTimeout)
	defer cancel()
	if now, serr := g.Status(bounded); serr != nil || now.State == hypervisor.Paused {
		err = errors.Join(err, serr, g.contUnless(bounded, hypervisor.Leaving))
	}
	return err
}

// contUnless makes a guest go on, unless it has come to a state meanwhile.
func (g *guest) contUnless(ctx context.Context, state hypervisor.RunState) error {
	err := g.Resume(ctx)
	if err == nil {
		return nil
	}
	if now, serr := g.Status(ctx); serr == nil && now.State == state {
		return nil
	}
	return err
}

// Finish implements hypervisor.Guest.
func (g *guest) Finish(ctx context.Context) (hypervisor.Transfer, error) {
	if err := g.executeWith(ctx, "migrate-continue", map[string]any{"state": "pre-switchover"}, nil); err != nil {
		return hypervisor.Transfer{}, err
	}
	// With the return path QEMU calls it complete only when the other one has
	// said that it has loaded everything.
	if t, err := g.await(ctx, "completed", nil); err != nil {
		return t, err
	}
	return g.settled(ctx)
}

// settled waits until QEMU has drawn the consequences of a transfer that it calls
// complete: only then does its guest count as gone, and are the times summed up
// (migration_iteration_finish of migration/migration.c). There is no event of that.
func (g *guest) settled(ctx context.Context) (hypervisor.Transfer, error) {
	for {
		s, err := g.Status(ctx)
		if err != nil {
			return hypervisor.Transfer{}, err
		}
		if s.State != hypervisor.Leaving {
			m, err := g.migration(ctx)
			if err != nil {
				return hypervisor.Transfer{}, err
			}
			return m.transfer(), nil
		}
		select {
		case <-ctx.Done():
			return hypervisor.Transfer{}, fmt.Errorf("guest %s: its state was sent, but it does not leave: %w", g.id, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// StopSending implements hypervisor.Guest.
func (g *guest) StopSending(ctx context.Context) error {
	// What it does for a checkpoint is not given up; see memory.go.
	cancelled, err := g.savesLive(ctx)
	if err != nil {
		return err
	}
	for {
		m, err := g.migration(ctx)
		if err != nil {
			return err
		}
		if m.over() {
			return g.goOnAfter(ctx, m)
		}
		if !cancelled {
			if err := g.execute(ctx, "migrate_cancel", nil); err != nil {
				return err
			}
			cancelled = true
			continue
		}
		if err := g.awaitNews(ctx); err != nil {
			return fmt.Errorf("guest %s: waiting until it sends nothing more: %w", g.id, err)
		}
	}
}

// goOnAfter makes a guest go on whose transfer came to nothing. QEMU does that
// only if it ran when the last of it was to be sent.
func (g *guest) goOnAfter(ctx context.Context, m *migration) error {
	if m.Status != "failed" && m.Status != "cancelled" {
		return nil
	}
	s, err := g.Status(ctx)
	if err != nil || s.State != hypervisor.Left && s.Detail != "paused" {
		return err
	}
	return g.Resume(ctx)
}

func (g *guest) migration(ctx context.Context) (*migration, error) {
	m := &migration{}
	return m, g.execute(ctx, "query-migrate", m)
}

// await waits until a transfer has come to a status. each, if it is not nil, is
// called while it has not.
func (g *guest) await(ctx context.Context, status string, each func(hypervisor.Transfer) error) (hypervisor.Transfer, error) {
	for {
		m, err := g.migration(ctx)
		if err != nil {
			return hypervisor.Transfer{}, err
		}
		t := m.transfer()
		switch {
		case m.Status == status:
			return t, nil
		case m.over():
			return t, fmt.Errorf("guest %s: sending its state: it is %s: %s", g.id, m.Status, m.Error)
		}
		if each != nil {
			if err := each(t); err != nil {
				return t, err
			}
		}
		if err := g.awaitNews(ctx); err != nil {
			return t, fmt.Errorf("guest %s: sending its state: %w", g.id, err)
		}
	}
}

// allow lets a guest stand still for longer when many passes were not enough.
func (g *guest) allow(ctx context.Context, allowed time.Duration, passes int) (time.Duration, error) {
	want := min(shortest<<min(passes/passesEach, 10), longest)
	if want == allowed {
		return allowed, nil
	}
	return want, g.executeWith(ctx, "migrate-set-parameters", map[string]any{"downtime-limit": want.Milliseconds()}, nil)
}

// awaitNews waits for QEMU to tell of a change, and not for long.
func (g *guest) awaitNews(ctx context.Context) error {
	timer := time.NewTimer(lookAtTransfer)
	defer timer.Stop()
	select {
	case <-g.news:
	case <-timer.C:
	case <-g.done:
		return errors.New("it has ended")
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// heard notes an event that is waited for.
func heard(news chan<- struct{}) func(qmp.Event) {
	return func(e qmp.Event) {
		if !tellsOfChange(e) {
			return
		}
		select {
		case news <- struct{}{}:
		default:
		}
	}
}
