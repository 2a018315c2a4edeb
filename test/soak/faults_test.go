package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
)

// leave is what a full disk has left, in bytes: less than replicas keep free,
// and enough for the catalog.
const leave = 40 << 20

// event is a fault's beginning or end.
type event struct {
	at   time.Duration
	step Step
	ends bool
}

// carryOut lets the faults of a schedule happen and undoes each, then waits
// until the time is over.
func (w *world) carryOut(ctx context.Context, steps []Step, during time.Duration) error {
	var events []event
	for _, s := range steps {
		events = append(events, event{at: s.At, step: s})
		if s.Fault != Daemon {
			events = append(events, event{at: s.At + s.Lasts, step: s, ends: true})
		}
	}
	slices.SortStableFunc(events, func(a, b event) int { return int(a.at - b.at) })
	began := time.Now()
	for _, e := range events {
		if !sleep(ctx, e.at-time.Since(began)) {
			return ctx.Err()
		}
		if err := w.happen(ctx, e); err != nil {
			return fmt.Errorf("%v (end: %v): %w", e.step, e.ends, err)
		}
	}
	sleep(ctx, during-time.Since(began))
	return nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (w *world) happen(ctx context.Context, e event) error {
	var on []*devcluster.Server
	for _, n := range e.step.Servers {
		on = append(on, w.Servers()[n])
	}
	if e.ends {
		w.say("end of: %v", e.step)
		if err := w.undo(ctx, e.step, on); err != nil {
			return err
		}
		w.note(on, -1)
		return nil
	}
	w.say("%v", e.step)
	if e.step.Fault != Daemon {
		w.note(on, +1)
	}
	return w.do(ctx, e.step, on)
}

func (w *world) note(on []*devcluster.Server, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range on {
		w.struck[s.Name] += n
	}
}

func (w *world) do(ctx context.Context, step Step, on []*devcluster.Server) error {
	switch step.Fault {
	case Kill, Majority:
		return each(on, func(s *devcluster.Server) error { return s.Kill(ctx) })
	case Daemon:
		return on[0].Kill(ctx, devcluster.Daemon)
	case Pause:
		return on[0].Pause(ctx)
	case Cut:
		return on[0].Cut(ctx)
	case Part:
		return errors.Join(on[0].Mute(ctx, on[1]), on[1].Mute(ctx, on[0]))
	case Mute:
		return on[0].Mute(ctx, on[1])
	case Full:
		return on[0].Fill(leave)
	case Power, PowerAll:
		return w.cutPower(ctx, on)
	}
	return fmt.Errorf("nobody knows how to make this fault: %s", step.Fault)
}

func (w *world) undo(ctx context.Context, step Step, on []*devcluster.Server) error {
	switch step.Fault {
	case Kill, Majority, Power, PowerAll:
		// In any order, not all at the same instant.
		rng := rand.New(rand.NewPCG(w.seed, uint64(step.At)))
		rng.Shuffle(len(on), func(i, k int) { on[i], on[k] = on[k], on[i] })
		return w.start(ctx, rng, on)
	case Pause:
		return on[0].Resume()
	case Cut:
		return on[0].Heal(ctx)
	case Part:
		return errors.Join(on[0].Unmute(ctx, on[1]), on[1].Unmute(ctx, on[0]))
	case Mute:
		return on[0].Unmute(ctx, on[1])
	case Full:
		return on[0].Empty()
	}
	return nil
}

func each(on []*devcluster.Server, do func(*devcluster.Server) error) error {
	var err error
	for _, s := range on {
		err = errors.Join(err, do(s))
	}
	return err
}

// start starts servers one after the other. One that waits for others to
// answer must not keep these from starting.
func (w *world) start(ctx context.Context, rng *rand.Rand, on []*devcluster.Server) error {
	errs := make(chan error, len(on))
	for _, s := range on {
		w.say("%s starts", s.Name)
		go func() { errs <- s.Start(ctx) }()
		sleep(ctx, time.Duration(rng.IntN(2000))*time.Millisecond)
	}
	var err error
	for range on {
		err = errors.Join(err, <-errs)
	}
	return err
}

// cutPower cuts the power of servers. Acknowledged writes must survive that
// without a flush if another replica in sync has them and is not struck; where
// that is not sure, only flushed ones must.
func (w *world) cutPower(ctx context.Context, on []*devcluster.Server) error {
	sure := len(on) == 1 && !w.othersStruck(on[0])
	for _, j := range w.jobs {
		sure = sure && w.allInSync(j.name)
	}
	if !sure {
		w.cuts.Add(1)
	}
	w.say("only flushed writes must survive this: %v", !sure)
	err := w.PowerCut(ctx, on...)
	if !sure {
		w.cuts.Add(1) // for who connected in between
	}
	return err
}

func (w *world) othersStruck(not *devcluster.Server) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, n := range w.struck {
		if n > 0 && name != not.Name {
			return true
		}
	}
	return false
}
