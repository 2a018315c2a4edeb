package catalog

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const (
	// MaxEvents is about how many events are kept.
	MaxEvents = 10_000
	// trimEvery is after how many events a store deletes old ones.
	trimEvery = 64
)

// Events is what happened in the cluster. The newest MaxEvents are kept. Safe
// for concurrent use.
//
// Events are numbered by the catalog's revision, not by their time: a server's
// clock may be wrong by any amount, and what it tells must neither be taken for
// older nor outlive what comes later.
type Events struct {
	etcd     etcd
	now      func() time.Time
	appended atomic.Int64
}

// EventFilter chooses events; what is empty chooses nothing.
type EventFilter struct {
	Kind, Name string
	// ServerID: what this server told of, or what is about it.
	ServerID string
	// Since and Until are by the clocks of those who told.
	Since, Until time.Time
}

func (f EventFilter) has(ev *argonv1.Event) bool {
	at := ev.GetTime().AsTime()
	return (f.Kind == "" || ev.GetKind() == f.Kind) && (f.Name == "" || ev.GetSubjectName() == f.Name) &&
		(f.ServerID == "" || ev.GetServerId() == f.ServerID || ev.GetSubjectId() == f.ServerID) &&
		(f.Since.IsZero() || !at.Before(f.Since)) && (f.Until.IsZero() || !at.After(f.Until))
}

// Append writes an event. It fills the id and, where it is empty, the time.
func (e *Events) Append(ctx context.Context, ev *argonv1.Event) error {
	if ev.Time == nil {
		ev.Time = timestamppb.New(e.now())
	}
	// The number is that of a moment before the event is written. Those that are
	// written at the same time may be in any order.
	res, err := e.etcd.Get(ctx, schemaKey, clientv3.WithCountOnly())
	if err != nil {
		return fmt.Errorf("catalog: a number for event %s: %w", ev.GetReason(), err)
	}
	ev.Id = eventID(res.Header.Revision)
	value, err := proto.Marshal(ev)
	if err != nil {
		return fmt.Errorf("catalog: encode event %s: %w", ev.GetReason(), err)
	}
	if err := e.etcd.Put(ctx, eventsPrefix+ev.Id, string(value)); err != nil {
		return fmt.Errorf("catalog: write event %s: %w", ev.GetReason(), err)
	}
	if e.appended.Add(1)%trimEvery != 1 {
		return nil
	}
	return e.trim(ctx, MaxEvents)
}

// eventID makes an id that sorts by revision and is of one event only.
func eventID(revision int64) string {
	return fmt.Sprintf("%016x-%s", revision, rand.Text()[:8])
}

// eventKeyAt is where the keys of events begin that have this number or a
// higher one.
func eventKeyAt(revision int64) string {
	return fmt.Sprintf("%s%016x", eventsPrefix, max(revision, 0))
}

// trim deletes the oldest of what is too many.
func (e *Events) trim(ctx context.Context, most int64) error {
	res, err := e.etcd.Get(ctx, eventsPrefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return fmt.Errorf("catalog: count events: %w", err)
	}
	if res.Count <= most {
		return nil
	}
	res, err = e.etcd.Get(ctx, eventsPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(res.Count-most+1))
	if err != nil {
		return fmt.Errorf("catalog: find old events: %w", err)
	}
	firstKept := string(res.Kvs[len(res.Kvs)-1].Key)
	if err := e.etcd.Delete(ctx, eventsPrefix, clientv3.WithRange(firstKept)); err != nil {
		return fmt.Errorf("catalog: delete old events: %w", err)
	}
	return nil
}

// List reads the newest events, in the order in which they were written: at
// most limit (0: MaxEvents) of those that the filter chooses.
func (e *Events) List(ctx context.Context, limit int, of EventFilter) ([]*argonv1.Event, error) {
	list, _, err := e.list(ctx, limit, of)
	return list, err
}

// list also returns the revision that the list is of.
//
// It reads backwards in steps, so that a short list out of a long history is
// cheap: etcd itself reads a whole range to turn it round.
func (e *Events) list(ctx context.Context, limit int, of EventFilter) (list []*argonv1.Event, revision int64, err error) {
	if limit <= 0 {
		limit = MaxEvents
	}
	res, err := e.etcd.Get(ctx, schemaKey, clientv3.WithCountOnly())
	if err != nil {
		return nil, 0, fmt.Errorf("catalog: list events: %w", err)
	}
	revision = res.Header.Revision
	until := clientv3.GetPrefixRangeEnd(eventsPrefix)
	for _, back := range []int64{1_000, 30_000, revision} {
		from := eventKeyAt(revision - back)
		res, err := e.etcd.Get(ctx, from, clientv3.WithRange(until))
		if err != nil {
			return nil, 0, fmt.Errorf("catalog: list events: %w", err)
		}
		earlier, err := decodeEvents(res.Kvs, revision, of)
		if err != nil {
			return nil, 0, err
		}
		list, until = append(earlier, list...), from
		if len(list) >= limit || back >= revision {
			break
		}
	}
	return list[max(0, len(list)-limit):], revision, nil
}

// decodeEvents takes those up to a revision that the filter chooses.
func decodeEvents(kvs []*mvccpb.KeyValue, revision int64, of EventFilter) ([]*argonv1.Event, error) {
	var list []*argonv1.Event
	for _, kv := range kvs {
		if kv.ModRevision > revision {
			continue
		}
		ev := &argonv1.Event{}
		if err := proto.Unmarshal(kv.Value, ev); err != nil {
			return nil, fmt.Errorf("catalog: event %s is damaged: %w", kv.Key, err)
		}
		if of.has(ev) {
			list = append(list, ev)
		}
	}
	return list, nil
}

// Watch calls tell with so many old events and then with each new one, in
// order, until ctx ends or tell returns an error, which Watch returns. While
// etcd is away, it waits. begun, if it is not nil, is called as soon as it is
// settled which events are old; an error of it ends the watch, too.
func (e *Events) Watch(ctx context.Context, backlog int, of EventFilter, begun func() error, tell func(*argonv1.Event) error) error {
	list, seen, err := e.list(ctx, max(backlog, 1), of)
	if err == nil && begun != nil {
		err = begun()
	}
	if err != nil {
		return err
	}
	for _, ev := range list[max(0, len(list)-backlog):] {
		if err := tell(ev); err != nil {
			return err
		}
	}
	f := follower{etcd: e.etcd, seen: seen, tell: func(kvs []*mvccpb.KeyValue, revision int64) error {
		list, err := decodeEvents(kvs, revision, of)
		for _, ev := range list {
			if err == nil {
				err = tell(ev)
			}
		}
		return err
	}}
	return f.run(ctx)
}

// follower tells of the events that were written after a revision.
type follower struct {
	etcd etcd
	// seen is the revision up to which everything was told.
	seen int64
	tell func(kvs []*mvccpb.KeyValue, revision int64) error
}

// run ends with ctx or with an error of tell.
func (f *follower) run(ctx context.Context) error {
	for failures := 1; ; failures++ {
		before := f.seen
		if err := f.watch(ctx); err != nil {
			return err
		}
		if f.seen > before {
			failures = 1
		}
		if err := sleep(ctx, pauseAfter(failures)); err != nil {
			return err
		}
		// What happened meanwhile may be compacted, so that no watch tells it.
		if err := f.catchUp(ctx); err != nil {
			return err
		}
	}
}

// watch tells what comes until the watch breaks. Errors are those of tell.
func (f *follower) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch := f.etcd.Watch(clientv3.WithRequireLeader(ctx), eventsPrefix,
		clientv3.WithPrefix(), clientv3.WithRev(f.seen+1), clientv3.WithFilterDelete())
	for res := range watch {
		if res.Err() != nil {
			return nil
		}
		for _, x := range res.Events {
			if err := f.tell([]*mvccpb.KeyValue{x.Kv}, x.Kv.ModRevision); err != nil {
				return err
			}
			f.seen = x.Kv.ModRevision
		}
	}
	return nil
}

// catchUp tells what was written since, by reading it. Errors are those of
// tell.
func (f *follower) catchUp(ctx context.Context) error {
	res, err := f.etcd.Get(ctx, eventsPrefix, clientv3.WithPrefix(), clientv3.WithMinModRev(f.seen+1))
	if err != nil {
		return nil // the next round tries again
	}
	slices.SortFunc(res.Kvs, func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.ModRevision, b.ModRevision) })
	if err := f.tell(res.Kvs, res.Header.Revision); err != nil {
		return err
	}
	f.seen = res.Header.Revision
	return nil
}
