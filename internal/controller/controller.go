// Package controller holds the loops that only the elected leader runs: it
// places machines, moves those of lost servers, replaces lost replicas and
// image copies, finishes removals, and has volumes scrubbed now and then.
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
	"github.com/argon-cluster/argon/internal/placement"
)

// Options are what a leader works with.
type Options struct {
	// ServerID is the leader's; events carry it.
	ServerID string
	Store    *catalog.Store
	// Observer is of the same catalog, and runs for as long as this server does.
	Observer *Observer
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
	told := map[string]bool{}
	for {
		changed := o.Observer.view.Changed()
		if st, now, seen := o.Observer.look(); st != nil {
			if err := o.act(ctx, Plan(st, now, seen, told)); err != nil {
				o.Log.Warn("the catalog did not take a change; it is planned again", "err", err)
			} else {
				told = nowTold(told, st, seen)
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

// nowTold are the servers that the cluster was told are lost, after a plan was
// carried out: who came back is news only once, and so is who is lost again.
func nowTold(told map[string]bool, st *catalog.State, seen Observation) map[string]bool {
	next := map[string]bool{}
	for id := range st.Servers {
		_, lost := seen.Lost[id]
		next[id] = lost || told[id] && !placement.Alive(st, id)
	}
	return next
}

// act makes the changes first and tells of them afterwards: a machine does not
// wait for the events about another one.
func (o Options) act(ctx context.Context, actions []Action) error {
	var done []Action
	var failed error
	for _, a := range actions {
		ok, err := o.change(ctx, a)
		if err != nil {
			failed = fmt.Errorf("%s: %w", a.Why, err)
			break
		}
		if ok {
			done = append(done, a)
		}
	}
	for _, a := range done {
		if err := o.tell(ctx, a); err != nil {
			return errors.Join(failed, err)
		}
	}
	return failed
}

// change makes an action's changes and reports whether they were made: not
// when a record has changed meanwhile. Then the next plan is made from the new
// ones.
func (o Options) change(ctx context.Context, a Action) (ok bool, err error) {
	txn := o.Store.Txn()
	for _, rec := range a.Create {
		txn.Create(rec)
	}
	for _, rec := range a.Put {
		txn.Put(rec)
	}
	for _, rec := range a.Delete {
		txn.Delete(rec)
	}
	err = txn.Commit(ctx)
	if errors.Is(err, catalog.ErrFull) { // what does not make it larger goes on
		o.Log.Debug("the catalog has no room for a change", "change", a.Why, "err", err)
		return false, nil
	}
	if errors.Is(err, catalog.ErrConflict) || errors.Is(err, catalog.ErrNotFound) || errors.Is(err, catalog.ErrExists) {
		o.Log.Debug("a change was overtaken", "change", a.Why)
		return false, nil
	}
	if err == nil && a.ClearStatus != "" {
		err = o.Store.DeleteVolumeStatus(ctx, a.ClearStatus)
	}
	if err == nil && a.ClearUsage != "" {
		err = o.Store.DeleteUsage(ctx, a.ClearUsage)
	}
	if err == nil && !a.OnlyNews {
		o.Log.Info(a.Why)
	}
	return err == nil, err
}

// tell appends an action's events.
func (o Options) tell(ctx context.Context, a Action) error {
	for _, e := range a.Events {
		if a.OnlyNews {
			if told, err := o.told(ctx, e); err != nil || told {
				return err
			}
		}
		e.ServerId = o.ServerID
		if err := o.Store.Events.Append(ctx, e); err != nil {
			return fmt.Errorf("event %s about %s: %w", e.GetReason(), e.GetSubjectName(), err)
		}
	}
	return nil
}

// told tells whether the newest event about a subject says the same already: a
// new leader sees for the first time what the last one has told.
func (o Options) told(ctx context.Context, e *argonv1.Event) (bool, error) {
	last, err := o.Store.Events.List(ctx, 1, catalog.EventFilter{Kind: e.GetKind(), Name: e.GetSubjectName()})
	if err != nil {
		return false, fmt.Errorf("events about %s: %w", e.GetSubjectName(), err)
	}
	return len(last) > 0 && last[0].GetReason() == e.GetReason(), nil
}
