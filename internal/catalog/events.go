package catalog

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const (
	events = prefix + "events/"
	// MaxEvents bounds how many events are read at once.
	MaxEvents = 10_000
	// leaseSpan is how long one etcd lease takes events: it is made for
	// leaseSpan longer than they are kept, and shared, since a lease for each
	// would be a load of its own.
	leaseSpan = 6 * time.Hour
)

// Events is what happened in the cluster, kept for a week. Safe for concurrent
// use.
type Events struct {
	cli *clientv3.Client

	mu    sync.Mutex
	lease clientv3.LeaseID
	until time.Time
}

// Append writes an event. It fills the id and, where it is empty, the time.
func (e *Events) Append(ctx context.Context, ev *argonv1.Event) error {
	if ev.Time == nil {
		ev.Time = timestamppb.Now()
	}
	id, err := ulid.New(ulid.Timestamp(ev.Time.AsTime()), ulid.DefaultEntropy())
	if err != nil {
		return fmt.Errorf("catalog: an id for event %s: %w", ev.GetReason(), err)
	}
	ev.Id = id.String()
	lease, err := e.grant(ctx)
	if err != nil {
		return fmt.Errorf("catalog: write event %s: %w", ev.GetReason(), err)
	}
	value, err := proto.Marshal(ev)
	if err != nil {
		return fmt.Errorf("catalog: encode event %s: %w", ev.GetReason(), err)
	}
	if _, err := e.cli.Put(ctx, events+ev.Id, string(value), clientv3.WithLease(lease)); err != nil {
		e.forget(lease)
		return fmt.Errorf("catalog: write event %s: %w", ev.GetReason(), err)
	}
	return nil
}

// grant is the lease that events of this time are bound to.
func (e *Events) grant(ctx context.Context) (clientv3.LeaseID, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lease != clientv3.NoLease && time.Now().Before(e.until) {
		return e.lease, nil
	}
	res, err := e.cli.Grant(ctx, int64((eventTTL + leaseSpan).Seconds()))
	if err != nil {
		return 0, err
	}
	e.lease, e.until = res.ID, time.Now().Add(leaseSpan)
	return e.lease, nil
}

// forget makes the next event ask for a new lease: this one may be gone.
func (e *Events) forget(lease clientv3.LeaseID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lease == lease {
		e.lease = clientv3.NoLease
	}
}

// List reads the newest events, oldest first: at most limit (0: MaxEvents), not
// older than since, about this kind and name where they are given.
func (e *Events) List(ctx context.Context, limit int, since time.Time, kind, name string) ([]*argonv1.Event, error) {
	list, _, err := e.list(ctx, limit, since, kind, name)
	return list, err
}

func (e *Events) list(ctx context.Context, limit int, since time.Time, kind, name string) ([]*argonv1.Event, int64, error) {
	opts := []clientv3.OpOption{
		clientv3.WithRange(clientv3.GetPrefixRangeEnd(events)),
		clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend),
		clientv3.WithLimit(MaxEvents),
	}
	from := events
	if !since.IsZero() {
		var id ulid.ULID
		if err := id.SetTime(ulid.Timestamp(since)); err != nil {
			return nil, 0, fmt.Errorf("catalog: events since %s: %w", since, err)
		}
		from += id.String()
	}
	res, err := e.cli.Get(ctx, from, opts...)
	if err != nil {
		return nil, 0, fmt.Errorf("catalog: list events: %w", err)
	}
	var list []*argonv1.Event
	for i := len(res.Kvs) - 1; i >= 0; i-- {
		ev, err := decodeEvent(res.Kvs[i].Value)
		if err != nil {
			return nil, 0, err
		}
		if about(ev, kind, name) {
			list = append(list, ev)
		}
	}
	return newest(list, limit), res.Header.Revision, nil
}

func about(ev *argonv1.Event, kind, name string) bool {
	return (kind == "" || ev.GetKind() == kind) && (name == "" || ev.GetSubjectName() == name)
}

func decodeEvent(b []byte) (*argonv1.Event, error) {
	ev := &argonv1.Event{}
	if err := proto.Unmarshal(b, ev); err != nil {
		return nil, fmt.Errorf("catalog: an event is damaged: %w", err)
	}
	return ev, nil
}

// Watch calls tell with so many old events and then with each new one, in
// order, until ctx ends or tell returns an error, which Watch returns.
func (e *Events) Watch(ctx context.Context, backlog int, kind, name string, tell func(*argonv1.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	list, revision, err := e.list(ctx, max(backlog, 1), time.Time{}, kind, name)
	if err != nil {
		return err
	}
	for _, ev := range list[max(0, len(list)-backlog):] {
		if err := tell(ev); err != nil {
			return err
		}
	}
	w := e.cli.Watch(clientv3.WithRequireLeader(ctx), events, clientv3.WithPrefix(), clientv3.WithRev(revision+1), clientv3.WithFilterDelete())
	for res := range w {
		if err := res.Err(); err != nil {
			return fmt.Errorf("catalog: watch events: %w", err)
		}
		for _, x := range res.Events {
			ev, err := decodeEvent(x.Kv.Value)
			if err != nil {
				return err
			}
			if !about(ev, kind, name) {
				continue
			}
			if err := tell(ev); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}
