package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// leaseState is the lease that this server has. Safe for concurrent use.
type leaseState struct {
	mu      sync.Mutex
	id      clientv3.LeaseID // NoLease: none
	until   time.Duration    // on the boottime clock
	changed chan struct{}
}

// get tells the lease, until when it is this server's for sure, and a channel
// that is closed at the next change.
func (l *leaseState) get() (clientv3.LeaseID, time.Duration, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.id, l.until, l.changed
}

func (l *leaseState) set(id clientv3.LeaseID, until time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.id, l.until = id, until
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// errLeaseLost: etcd does not know the lease any more.
var errLeaseLost = errors.New("the lease has ended")

// leaseTimes follow from how long a lease lasts.
type leaseTimes struct {
	ttl      time.Duration
	interval time.Duration // between renewals
	attempt  time.Duration // for one renewal
	// margin is kept between what this server believes and what others may:
	// for clocks that run at different speeds, and for guests to be ended in.
	margin time.Duration
}

func timesOf(s *argonv1.Settings) leaseTimes {
	ttl := time.Duration(withDefaults(s).GetLeaseSeconds()) * time.Second
	return leaseTimes{ttl: ttl, interval: ttl / 6, attempt: ttl / 4, margin: ttl / 10}
}

// leaseRetry is the pause after a renewal that failed at once.
const leaseRetry = 50 * time.Millisecond

// KeepLease holds this server's lease until ctx ends. After each renewal it
// calls onRenewed with the instant, on CLOCK_BOOTTIME, until which this server
// may run workloads: when the renewal was sent, plus the lease's time, less a
// margin. So others see the lease gone only after that instant, whatever the
// network and this process did in between. A lease that was lost is replaced
// by a new one. When ctx ends the lease is left to end by itself: guests may
// outlive the daemon.
//
// A lease takes the place of the one before it, which may have been longer
// (HoldLease). Before that, limit, if it is not nil, is called with the instant
// that guests may run until from then on. If it fails, nothing is changed.
func (m *Member) KeepLease(ctx context.Context, limit func(until time.Duration) error, onRenewed func(until time.Duration)) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	k := &leaseKeeper{
		member: m, parts: p, times: timesOf(p.cluster.GetSettings()), limit: limit, onRenewed: onRenewed,
		record:  &argonv1.Lease{ServerId: p.id.ServerID, RunId: catalog.NewID()},
		trouble: complaint{log: m.opts.Log, about: "the server's lease is not held; trying again"},
	}
	defer m.lease.set(clientv3.NoLease, 0)
	for ctx.Err() == nil {
		if k.trouble.tell(ctx, k.hold(ctx)) {
			m.lease.set(clientv3.NoLease, 0)
		}
		_ = sleep(ctx, leaseRetry)
	}
	return nil
}

// HoldLease makes this server's lease last for so long at least from now on,
// without anybody who renews it: for the time in which one daemon takes the place
// of another. If none does, the others wait that much longer before they take
// over. Call it at the end of KeepLease's time; it tells onRenewed the same.
func (m *Member) HoldLease(ctx context.Context, d time.Duration, onRenewed func(until time.Duration)) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	times := timesOf(p.cluster.GetSettings())
	// The margin of the usual lease will do: its time is what guests end in.
	times.ttl = max(times.ttl, d.Round(time.Second))
	k := &leaseKeeper{
		member: m, parts: p, times: times, onRenewed: onRenewed,
		record: &argonv1.Lease{ServerId: p.id.ServerID, RunId: catalog.NewID()},
	}
	ctx, cancel := context.WithTimeout(ctx, holdTime)
	defer cancel()
	_, err = k.grant(ctx)
	return err
}

// holdTime bounds how long a restart waits for its lease.
const holdTime = time.Second

type leaseKeeper struct {
	member    *Member
	parts     *parts
	times     leaseTimes
	record    *argonv1.Lease
	limit     func(until time.Duration) error // may be nil
	onRenewed func(until time.Duration)
	trouble   complaint
}

// hold gets a lease and renews it until it is lost.
func (k *leaseKeeper) hold(ctx context.Context) error {
	id, err := k.grant(ctx)
	if err != nil {
		return err
	}
	pause := k.times.interval
	for {
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		err := k.renew(ctx, id)
		if errors.Is(err, errLeaseLost) {
			return err
		}
		pause = k.times.interval
		if err != nil {
			k.member.opts.Log.Debug("the server's lease was not renewed", "err", err)
			pause = leaseRetry
		}
	}
}

// grant gets a lease and writes the record that goes with it.
func (k *leaseKeeper) grant(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, k.times.ttl)
	defer cancel()
	sent := k.member.opts.Boottime()
	res, err := k.parts.client.Grant(ctx, int64(k.times.ttl/time.Second))
	if err != nil {
		return clientv3.NoLease, fmt.Errorf("ask for the server's lease: %w", err)
	}
	k.record.Since = timestamppb.New(k.member.opts.Now())
	k.record.TtlSeconds = uint32(k.times.ttl / time.Second)
	if k.limit != nil {
		if err := k.limit(k.until(sent)); err != nil {
			return clientv3.NoLease, err
		}
	}
	if err := k.parts.store.PutLease(ctx, res.ID, k.record); err != nil {
		return clientv3.NoLease, err
	}
	k.held(res.ID, sent)
	k.trouble.last = ""
	return res.ID, nil
}

// renew renews the lease once. errLeaseLost if there is nothing to renew.
func (k *leaseKeeper) renew(ctx context.Context, id clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, k.times.attempt)
	defer cancel()
	sent := k.member.opts.Boottime()
	// One stream for each renewal: where the last one hung, the next goes
	// elsewhere. The client's own keep-alive does not tell when it sent.
	stream, err := etcdserverpb.NewLeaseClient(k.parts.client.ActiveConnection()).LeaseKeepAlive(clientv3.WithRequireLeader(ctx))
	if err != nil {
		return fmt.Errorf("renew the server's lease: %w", err)
	}
	if err := stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
		return fmt.Errorf("renew the server's lease: %w", err)
	}
	res, err := stream.Recv()
	switch {
	case err != nil && errors.Is(rpctypes.Error(err), rpctypes.ErrLeaseNotFound):
		return errLeaseLost
	case err != nil:
		return fmt.Errorf("renew the server's lease: %w", err)
	case res.TTL <= 0:
		return errLeaseLost
	}
	k.held(id, sent)
	return nil
}

// held tells everybody that a renewal that was sent then has succeeded.
func (k *leaseKeeper) held(id clientv3.LeaseID, sent time.Duration) {
	k.member.lease.set(id, k.until(sent))
	k.onRenewed(k.until(sent))
}

// until is how long a renewal that was sent then is good for.
func (k *leaseKeeper) until(sent time.Duration) time.Duration {
	return sent + k.times.ttl - k.times.margin
}
