package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// leaderKey holds the id of the server that leads, bound to its lease: a lost
// server loses its lease and the leadership in one step. It is not among the
// catalog's records, because no view needs it.
const leaderKey = "/argon-leader"

const (
	resignTimeout = time.Second
	// leadPause is the pause after the election could not go on.
	leadPause = 100 * time.Millisecond
	// stepDown is the pause after the leader's work failed: another server
	// may fare better.
	stepDown = time.Second
	// campaignTimeout bounds one attempt to become the leader, and one watch
	// of who is: where the etcd that was asked has lost its power, the next
	// attempt asks another.
	campaignTimeout = time.Second
)

// Lead runs fn while this server is the elected leader, again and again, until
// ctx ends. fn's context ends promptly when the leadership is lost, at the
// latest when the server's lease may have ended; fn must then return soon, and
// what it writes must be guarded by revisions all the same. KeepLease must be
// running.
func (m *Member) Lead(ctx context.Context, fn func(context.Context) error) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	trouble := complaint{log: m.opts.Log, about: "the election cannot go on; trying again"}
	for ctx.Err() == nil {
		pause := leadPause
		lease, err := m.waitForLease(ctx)
		if err != nil {
			return nil
		}
		won, err := p.campaign(ctx, lease)
		switch {
		case trouble.tell(ctx, err):
		case won:
			if err := m.reign(ctx, lease, fn); err != nil && ctx.Err() == nil {
				m.opts.Log.Warn("the leader's work ended; another server may take over", "err", err)
				pause = stepDown
			}
			p.resign(ctx, lease)
		default:
			continue // the key has changed
		}
		_ = sleep(ctx, pause)
	}
	return nil
}

// waitForLease waits until this server has a lease.
func (m *Member) waitForLease(ctx context.Context) (clientv3.LeaseID, error) {
	for {
		id, until, changed := m.lease.get()
		if id != clientv3.NoLease && until > m.opts.Boottime() {
			return id, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return clientv3.NoLease, ctx.Err()
		}
	}
}

// campaign tries to become the leader; where another server is, it waits until
// that changes.
func (p *parts) campaign(ctx context.Context, lease clientv3.LeaseID) (won bool, err error) {
	bounded, cancel := context.WithTimeout(ctx, campaignTimeout)
	defer cancel()
	res, err := p.client.Txn(bounded).
		If(clientv3.Compare(clientv3.CreateRevision(leaderKey), "=", 0)).
		Then(clientv3.OpPut(leaderKey, p.id.ServerID, clientv3.WithLease(lease))).
		Else(clientv3.OpGet(leaderKey)).
		Commit()
	if err != nil {
		return false, fmt.Errorf("campaign for the leadership: %w", err)
	}
	if res.Succeeded {
		return true, nil
	}
	kv := res.Responses[0].GetResponseRange().Kvs[0]
	if string(kv.Value) == p.id.ServerID {
		return p.succeedMyself(bounded, lease, kv)
	}
	return false, p.awaitChange(ctx, res.Header.Revision+1)
}

// succeedMyself takes over from this server under an older lease, from an
// earlier run or from before it was lost: that leader has ended.
func (p *parts) succeedMyself(ctx context.Context, lease clientv3.LeaseID, kv *mvccpb.KeyValue) (bool, error) {
	res, err := p.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(leaderKey), "=", kv.ModRevision)).
		Then(clientv3.OpPut(leaderKey, p.id.ServerID, clientv3.WithLease(lease))).
		Commit()
	if err != nil {
		return false, fmt.Errorf("take the leadership up again: %w", err)
	}
	return res.Succeeded, nil
}

// awaitChange waits until somebody gives the leadership up or takes it, or for
// a while.
func (p *parts) awaitChange(ctx context.Context, revision int64) error {
	ctx, cancel := context.WithTimeout(ctx, campaignTimeout)
	defer cancel()
	for res := range p.client.Watch(clientv3.WithRequireLeader(ctx), leaderKey, clientv3.WithRev(revision)) {
		if err := res.Err(); err != nil && ctx.Err() == nil {
			return fmt.Errorf("watch the leadership: %w", err)
		}
		if len(res.Events) > 0 {
			return nil
		}
	}
	if ctx.Err() == nil {
		return errors.New("watch the leadership: it ended")
	}
	return nil
}

// reign runs fn for as long as this server has the lease.
func (m *Member) reign(ctx context.Context, lease clientv3.LeaseID, fn func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer cancel()
		m.whileHeld(ctx, lease)
	}()
	defer func() { <-ended }()
	defer cancel()
	m.opts.Log.Info("this server leads the cluster")
	defer m.opts.Log.Info("this server does not lead the cluster any more")
	return fn(ctx)
}

// whileHeld returns when the lease may have ended, or ctx has.
func (m *Member) whileHeld(ctx context.Context, lease clientv3.LeaseID) {
	for {
		id, until, changed := m.lease.get()
		left := until - m.opts.Boottime()
		if id != lease || left <= 0 {
			return
		}
		t := time.NewTimer(left)
		select {
		case <-changed:
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		t.Stop()
	}
}

// resign lets another server lead at once. If it fails, the lease's end does
// the same.
func (p *parts) resign(ctx context.Context, lease clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
	defer cancel()
	_, _ = p.client.Txn(ctx).
		If(clientv3.Compare(clientv3.LeaseValue(leaderKey), "=", lease)).
		Then(clientv3.OpDelete(leaderKey)).
		Commit()
}

// LeaderID is the server that leads; empty if none does or none is known.
func (m *Member) LeaderID(ctx context.Context) string {
	p, err := m.running()
	if err != nil {
		return ""
	}
	res, err := p.client.Get(ctx, leaderKey)
	if err != nil || len(res.Kvs) == 0 {
		return ""
	}
	return string(res.Kvs[0].Value)
}
