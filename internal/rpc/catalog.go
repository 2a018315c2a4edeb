package rpc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/argon-cluster/argon/internal/catalog"
)

const (
	// catalogTimeout bounds how long a call waits for a majority of the
	// voters. A change of etcd's leader takes about a second.
	catalogTimeout = 5 * time.Second
	// tries bounds how often a change is begun anew because others changed
	// the same records.
	tries = 20
)

// fresh is the catalog at or after the call's beginning.
func (p *Parts) fresh(ctx context.Context) (*catalog.State, error) {
	bounded, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	if err := p.View.Sync(bounded); err != nil {
		return nil, noMajority(ctx, err)
	}
	return p.View.State(), nil
}

// noMajority explains why the catalog could not be read or written.
func noMajority(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !errors.Is(err, context.DeadlineExceeded) && !catalog.Unavailable(err) {
		return err
	}
	return connect.NewError(connect.CodeUnavailable,
		fmt.Errorf("the cluster has no majority of its voters, so nothing can be read or changed: start the servers that are down (see `argon status`); if they are gone for good, see `argon help cluster recover`"))
}

// change makes one transaction of what plan puts into it, and begins anew when
// the records that it was planned from have changed. What plan only read must
// be put as well if the change depends on it.
func (p *Parts) change(ctx context.Context, plan func(st *catalog.State, txn *catalog.Txn) error) error {
	for range tries {
		st, err := p.fresh(ctx)
		if err != nil {
			return err
		}
		txn := p.Store.Txn()
		if err := plan(st, txn); err != nil {
			return err
		}
		txn.LimitGrowth(st)
		bounded, cancel := context.WithTimeout(ctx, catalogTimeout)
		err = txn.Commit(bounded)
		cancel()
		if err == nil {
			return nil
		}
		if !errors.Is(err, catalog.ErrConflict) && !errors.Is(err, catalog.ErrNotFound) {
			return noMajority(ctx, err)
		}
	}
	return connect.NewError(connect.CodeAborted, errors.New("the records change all the time: try again"))
}

// await looks at the catalog, from a state that has what this call changed on,
// until done says true.
func (p *Parts) await(ctx context.Context, done func(*catalog.State) bool) (*catalog.State, error) {
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	for {
		changed := p.View.Changed()
		if newer := p.View.State(); newer.Revision > st.Revision {
			st = newer
		}
		if done(st) {
			return st, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return st, ctx.Err()
		}
	}
}
