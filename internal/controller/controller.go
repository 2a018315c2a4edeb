// Package controller holds the loops that only the elected leader runs: it
// places machines, moves those of lost servers, replaces lost replicas and
// image copies, and finishes removals.
//
// What lives here: Plan, a pure function from the catalog to changes of it,
// and Run, the thin loop that makes those changes by compare-and-swap. What
// must not: the choice of a server (placement), anything that touches guests,
// volumes or disks (agent).
//
// A plan made from old records does no harm: each action names the revisions
// it was made from and changes nothing if one of them is no longer true. So
// two leaders at once, a leader that was frozen for minutes, or one that dies
// between any two actions leave nothing half done.
package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// Options are what a leader works with.
type Options struct {
	// ServerID is the leader's; events carry it.
	ServerID string
	Store    *catalog.Store
	// View must be running.
	View *catalog.View
	Now  func() time.Time
	// Tick bounds how long something waits that only time brings about, such
	// as the end of a grace time. 0: a second.
	Tick time.Duration
	Log  *slog.Logger
}

// Run plans and acts until ctx ends, whose error it returns. Call it only
// while this server is the elected leader.
func Run(ctx context.Context, o Options) error {
	if o.Tick == 0 {
		o.Tick = time.Second
	}
	tick := time.NewTicker(o.Tick)
	defer tick.Stop()
	var seen Absences
	for {
		changed := o.View.Changed()
		if st := o.View.State(); st != nil {
			seen = seen.Observe(st, o.Now())
			for _, a := range Plan(st, o.Now(), seen) {
				if err := o.do(ctx, a); err != nil {
					o.Log.Warn("the catalog did not take a change; it is planned again", "change", a.Why, "err", err)
					break
				}
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-tick.C:
		}
	}
}

// do makes an action's changes and tells of them. That the records have
// changed meanwhile is no error: the next plan is made from the new ones.
func (o Options) do(ctx context.Context, a Action) error {
	if a.OnlyNews {
		old, err := o.news(ctx, a.Events[0])
		if err != nil || old {
			return err
		}
	}
	txn := o.Store.Txn()
	for _, rec := range a.Put {
		txn.Put(rec)
	}
	for _, rec := range a.Delete {
		txn.Delete(rec)
	}
	if len(a.Put)+len(a.Delete) > 0 {
		err := txn.Commit(ctx)
		if errors.Is(err, catalog.ErrConflict) || errors.Is(err, catalog.ErrNotFound) {
			o.Log.Debug("an action was overtaken", "change", a.Why)
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", a.Why, err)
		}
		o.Log.Info(a.Why)
	}
	if a.ClearStatus != "" {
		if err := o.Store.DeleteVolumeStatus(ctx, a.ClearStatus); err != nil {
			return fmt.Errorf("%s: %w", a.Why, err)
		}
	}
	for _, e := range a.Events {
		e.ServerId = o.ServerID
		if err := o.Store.Events.Append(ctx, e); err != nil {
			return fmt.Errorf("event %s about %s: %w", e.GetReason(), e.GetSubjectName(), err)
		}
	}
	return nil
}

// news tells whether the newest event about a subject says the same already:
// a new leader sees for the first time what the last one has told.
func (o Options) news(ctx context.Context, e *argonv1.Event) (old bool, err error) {
	last, err := o.Store.Events.List(ctx, 1, time.Time{}, e.GetKind(), e.GetSubjectName())
	if err != nil {
		return false, fmt.Errorf("events about %s: %w", e.GetSubjectName(), err)
	}
	return len(last) > 0 && last[0].GetReason() == e.GetReason(), nil
}
