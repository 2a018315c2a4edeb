package catalog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

func event(put bool, key, value string, revision int64) *clientv3.Event {
	t := clientv3.EventTypeDelete
	if put {
		t = clientv3.EventTypePut
	}
	return &clientv3.Event{Type: t, Kv: &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), ModRevision: revision}}
}

// TestRevisionIsWhatWasApplied: a watch that is behind gets changes in parts,
// under a header that has etcd's newest revision.
func TestRevisionIsWhatWasApplied(t *testing.T) {
	v := NewView(newStore(nil), slog.New(slog.DiscardHandler))
	st := newState(3)
	for _, tc := range []struct {
		what   string
		res    clientv3.WatchResponse
		want   int64
		leases int
	}{
		{"a part of the changes", clientv3.WatchResponse{
			Header: &pb.ResponseHeader{Revision: 100},
			Events: []*clientv3.Event{event(true, leasePrefix+"a", "", 4), event(true, leasePrefix+"b", "", 5)},
		}, 5, 2},
		{"the rest", clientv3.WatchResponse{
			Header: &pb.ResponseHeader{Revision: 100}, Events: []*clientv3.Event{event(false, leasePrefix+"a", "", 9)},
		}, 9, 1},
		{"nothing more", clientv3.WatchResponse{Header: &pb.ResponseHeader{Revision: 100}}, 100, 1},
		{"news from an etcd that is behind", clientv3.WatchResponse{Header: &pb.ResponseHeader{Revision: 50}}, 100, 1},
	} {
		next, err := v.advance(st, tc.res)
		if err != nil || next.Revision != tc.want || len(next.Leases) != tc.leases {
			t.Errorf("%s: revision %d with %d leases, %v; want %d with %d", tc.what, next.Revision, len(next.Leases), err, tc.want, tc.leases)
		}
		if v.State() != next {
			t.Errorf("%s is not shown", tc.what)
		}
		st = next
	}
	if next, err := v.advance(st, clientv3.WatchResponse{Canceled: true, CompactRevision: 200}); err == nil || next != st {
		t.Error("a cancelled watch went on")
	}
}

// TestViewNeverGoesBack: an etcd with less than was seen is another one.
func TestViewNeverGoesBack(t *testing.T) {
	v := NewView(newStore(nil), slog.New(slog.DiscardHandler))
	if err := v.publish(newState(5), true); err != nil {
		t.Fatal(err)
	}
	if err := v.publish(newState(4), true); err == nil || v.State().Revision != 5 {
		t.Errorf("the view went back to %d: %v", v.State().Revision, err)
	}
}

// TestEdition: a state that was shown does not change under its readers.
func TestEdition(t *testing.T) {
	s := newStore(nil)
	record, err := proto.Marshal(&argonv1.Machine{Meta: &argonv1.Meta{Id: "m"}})
	if err != nil {
		t.Fatal(err)
	}
	first := newState(1)
	e := first.edit(s)
	if err := e.apply(true, &mvccpb.KeyValue{Key: []byte(statePrefix + "machine/m"), Value: record, ModRevision: 2}); err != nil {
		t.Fatal(err)
	}
	second := e.State
	e = second.edit(s)
	if err := e.apply(false, &mvccpb.KeyValue{Key: []byte(statePrefix + "machine/m")}); err != nil {
		t.Fatal(err)
	}
	if len(first.Machines) != 0 || len(second.Machines) != 1 || len(e.Machines) != 0 {
		t.Errorf("machines: %v, then %v, then %v", first.Machines, second.Machines, e.Machines)
	}
	if got := second.Machines["m"].GetMeta().GetRevision(); got != 2 {
		t.Errorf("the record's revision is %d, want that of its key", got)
	}
	if err := e.apply(true, &mvccpb.KeyValue{Key: []byte(statePrefix + "of-the-future/x"), Value: []byte("x")}); err != nil {
		t.Errorf("a kind of a newer argon: %v", err)
	}
	if err := e.apply(false, &mvccpb.KeyValue{Key: []byte(clusterKey)}); !errors.Is(err, ErrNoCluster) {
		t.Errorf("the cluster is deleted: %v, want ErrNoCluster", err)
	}
}

func TestPauseAndPatience(t *testing.T) {
	for failures, want := range map[int]time.Duration{1: firstPause, 2: 2 * firstPause, 6: maxPause, 1 << 40: maxPause} {
		if got := pauseAfter(failures); got != want {
			t.Errorf("pauseAfter(%d) = %s, want %s", failures, got, want)
		}
	}
	for failures, want := range map[int]time.Duration{1: silence, 2: 2 * silence, 4: answerTimeout, 1 << 40: answerTimeout} {
		if got := patience(failures); got != want {
			t.Errorf("patience(%d) = %s, want %s", failures, got, want)
		}
	}
}

// FuzzApply: whatever is in etcd, a state can be made of it or not, but nothing
// breaks, and nothing ends up in an old state.
func FuzzApply(f *testing.F) {
	for _, key := range []string{"cluster", "server/a", "image/a", "volume/a", "machine/a", "volume-status/a", "lease/a", "checkpoint/a", "x", "", "machine", "machine//"} {
		f.Add(statePrefix+key, []byte("\x0a\x02\x0a\x00"), true)
		f.Add(statePrefix+key, []byte{}, false)
		f.Add(statePrefix+key, []byte("\xff"), true)
	}
	s := newStore(nil)
	f.Fuzz(func(t *testing.T, key string, value []byte, put bool) {
		old := newState(1)
		e := old.edit(s)
		err := e.apply(put, &mvccpb.KeyValue{Key: []byte(key), Value: value, ModRevision: 2})
		size := func(st *State) int {
			return len(st.Servers) + len(st.Images) + len(st.Volumes) + len(st.Machines) + len(st.VolumeStatus) + len(st.Leases) + len(st.Checkpoints)
		}
		if size(old) != 0 || old.Cluster != nil {
			t.Error("the old state was changed")
		}
		if (err != nil || !put) && size(e.State) != 0 {
			t.Errorf("%v, and yet there is a record", err)
		}
	})
}

// atEvents are events of a store whose clock the test sets.
func atEvents(t *testing.T, now time.Time) (*Store, *time.Time) {
	t.Helper()
	s, err := Create(t.Context(), catalogtest.Start(t), &argonv1.Cluster{Id: "c"})
	if err != nil {
		t.Fatal(err)
	}
	s.Events.now = func() time.Time { return now }
	return s, &now
}

func reasons(list []*argonv1.Event) []string {
	var all []string
	for _, ev := range list {
		all = append(all, ev.GetReason())
	}
	return all
}

func TestListEvents(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	s, _ := atEvents(t, now)
	ctx := t.Context()
	for _, ev := range []struct {
		reason, kind, name string
		age                time.Duration
	}{
		{"a-ancient", "machine", "a", 5 * 24 * time.Hour},
		{"b-yesterday", "machine", "b", 30 * time.Hour},
		{"a-morning", "machine", "a", 3 * time.Hour},
		{"vol-morning", "volume", "a", 2 * time.Hour},
		{"a-just-now", "machine", "a", time.Minute},
		{"b-just-now", "machine", "b", time.Second},
	} {
		if err := s.Events.Append(ctx, &argonv1.Event{
			Kind: ev.kind, SubjectName: ev.name, Reason: ev.reason, Time: timestamppb.New(now.Add(-ev.age)),
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		limit      int
		since      time.Duration
		kind, name string
		want       []string
	}{
		{0, 0, "", "", []string{"a-ancient", "b-yesterday", "a-morning", "vol-morning", "a-just-now", "b-just-now"}},
		{1, 0, "", "", []string{"b-just-now"}},
		{3, 0, "", "", []string{"vol-morning", "a-just-now", "b-just-now"}},
		{1, 0, "machine", "a", []string{"a-just-now"}},
		{2, 0, "machine", "a", []string{"a-morning", "a-just-now"}},
		{9, 0, "machine", "a", []string{"a-ancient", "a-morning", "a-just-now"}},
		{0, 0, "", "a", []string{"a-ancient", "a-morning", "vol-morning", "a-just-now"}},
		{0, 48 * time.Hour, "machine", "", []string{"b-yesterday", "a-morning", "a-just-now", "b-just-now"}},
		{0, 10 * time.Second, "", "", []string{"b-just-now"}},
		{0, -time.Hour, "", "", nil},
		{0, 0, "server", "", nil},
	} {
		var since time.Time
		if tc.since != 0 {
			since = now.Add(-tc.since)
		}
		list, err := s.Events.List(ctx, tc.limit, EventFilter{Since: since, Kind: tc.kind, Name: tc.name})
		if err != nil || !slices.Equal(reasons(list), tc.want) {
			t.Errorf("List(%d, %s, %q, %q) = %v, %v, want %v", tc.limit, tc.since, tc.kind, tc.name, reasons(list), err, tc.want)
		}
	}
}

// TestEventFilter: each part of a filter chooses, and all must.
func TestEventFilter(t *testing.T) {
	at := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	ev := &argonv1.Event{Time: timestamppb.New(at), Kind: "machine", SubjectName: "web", SubjectId: "m", ServerId: "s1"}
	for _, tc := range []struct {
		of   EventFilter
		want bool
	}{
		{EventFilter{}, true},
		{EventFilter{Kind: "machine", Name: "web", ServerID: "s1", Since: at, Until: at}, true},
		{EventFilter{Kind: "volume"}, false},
		{EventFilter{Name: "db"}, false},
		{EventFilter{ServerID: "s2"}, false},
		{EventFilter{ServerID: "m"}, true}, // what is about it
		{EventFilter{Since: at.Add(1)}, false},
		{EventFilter{Until: at.Add(-1)}, false},
	} {
		if got := tc.of.has(ev); got != tc.want {
			t.Errorf("%+v: %v", tc.of, got)
		}
	}
}

func TestEventsAreTrimmed(t *testing.T) {
	start := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	s, _ := atEvents(t, start)
	ctx := t.Context()
	add := func(n int) {
		for i := range n {
			if err := s.Events.Append(ctx, &argonv1.Event{Reason: fmt.Sprint(i)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	list := func() []string {
		list, err := s.Events.List(ctx, 0, EventFilter{})
		if err != nil {
			t.Fatal(err)
		}
		return reasons(list)
	}
	add(10)
	if err := s.Events.trim(ctx, 10); err != nil || len(list()) != 10 {
		t.Errorf("after a trim that had nothing to do: %v, %v", list(), err)
	}
	if err := s.Events.trim(ctx, 3); err != nil || !slices.Equal(list(), []string{"7", "8", "9"}) {
		t.Errorf("the newest three are %v, %v", list(), err)
	}
}

// TestEventsSurviveClocks: a clock that is far ahead, and then is set right,
// takes nothing away, and the order is that of writing.
func TestEventsSurviveClocks(t *testing.T) {
	start := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	s, now := atEvents(t, start)
	var want []string
	for i, ahead := range []time.Duration{0, 40 * 24 * time.Hour, 2 * time.Hour, 0, -time.Hour} {
		*now = start.Add(ahead)
		for range trimEvery {
			want = append(want, fmt.Sprint(i))
			if err := s.Events.Append(t.Context(), &argonv1.Event{Reason: fmt.Sprint(i)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	list, err := s.Events.List(t.Context(), 0, EventFilter{})
	if got := reasons(list); err != nil || !slices.Equal(got, want) {
		t.Errorf("the history is %v, %v", got, err)
	}
	list, err = s.Events.List(t.Context(), 1, EventFilter{})
	if got := reasons(list); err != nil || !slices.Equal(got, []string{"4"}) {
		t.Errorf("the newest event is %v, %v; want that of the clock that went back", got, err)
	}
}

// TestWatchMissesNothing: each event is told once, in order, though the watch
// breaks and history is compacted.
func TestWatchMissesNothing(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	s, err := Create(t.Context(), cli, &argonv1.Cluster{Id: "c"})
	if err != nil {
		t.Fatal(err)
	}
	watching := newStore(etcd.Client("watch"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	add := func(reason string) {
		// A clock that goes back: order is that of writing.
		s.Events.now = func() time.Time { return time.Now().Add(-time.Duration(len(reason)) * time.Hour) }
		if err := s.Events.Append(ctx, &argonv1.Event{Kind: "machine", SubjectName: "a", Reason: reason}); err != nil {
			t.Fatal(err)
		}
	}
	add("old")
	add("last")
	told := make(chan string)
	ended := make(chan error, 1)
	go func() {
		ended <- watching.Events.Watch(ctx, 1, EventFilter{Kind: "machine", Name: "a"}, nil, func(ev *argonv1.Event) error {
			told <- ev.GetReason()
			return nil
		})
	}()
	expect := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if got := <-told; got != w {
				t.Fatalf("told %s, want %s", got, w)
			}
		}
	}
	expect("last")
	for i := range 3 {
		add(fmt.Sprint("seen", i))
		expect(fmt.Sprint("seen", i))
		etcd.Cut("watch")
		add(fmt.Sprint("missed-longer", i))
		add(fmt.Sprint("missed", i))
		if err := s.Events.Append(ctx, &argonv1.Event{Kind: "machine", SubjectName: "b", Reason: "not for us"}); err != nil {
			t.Fatal(err)
		}
		catalogtest.Compact(t, cli)
		add(fmt.Sprint("after", i))
		etcd.Heal("watch")
		expect(fmt.Sprint("missed-longer", i), fmt.Sprint("missed", i), fmt.Sprint("after", i))
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Watch ended with %v", err)
	}
}

func TestWatchEndsWithTell(t *testing.T) {
	s, _ := atEvents(t, time.Now())
	full := errors.New("full")
	if err := s.Events.Append(t.Context(), &argonv1.Event{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Events.Watch(t.Context(), 1, EventFilter{}, nil, func(*argonv1.Event) error { return full }); !errors.Is(err, full) {
		t.Errorf("Watch = %v, want what tell returned", err)
	}
	if err := s.Events.Append(t.Context(), &argonv1.Event{}); err != nil {
		t.Fatal(err)
	}
	first := true
	err := s.Events.Watch(t.Context(), 1, EventFilter{}, nil, func(*argonv1.Event) error {
		if first {
			first = false
			return s.Events.Append(t.Context(), &argonv1.Event{})
		}
		return full
	})
	if !errors.Is(err, full) {
		t.Errorf("Watch = %v, want what tell returned for a new event", err)
	}
}
