package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

func runView(t testing.TB, s *catalog.Store) *catalog.View {
	t.Helper()
	v := catalog.NewView(s, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := v.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return v
}

// synced is the view with everything that was written before.
func synced(t testing.TB, v *catalog.View) *catalog.State {
	t.Helper()
	if err := v.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	return v.State()
}

// await waits until a state is as wanted, as a loop does.
func await(v *catalog.View, wanted func(*catalog.State) bool) {
	for {
		changed := v.Changed()
		if st := v.State(); st != nil && wanted(st) {
			return
		}
		<-changed
	}
}

// fails is how tests of both kinds complain.
type fails interface {
	Fatalf(format string, args ...any)
	Helper()
}

// equalsCatalog compares a view at rest with what the tables list.
func equalsCatalog(ctx context.Context, t fails, s *catalog.Store, v *catalog.View) {
	t.Helper()
	if err := v.Sync(ctx); err != nil {
		t.Fatalf("Sync: %v", err)
	}
	st := v.State()
	sameRecords(ctx, t, s.Servers, st.Servers)
	sameRecords(ctx, t, s.Images, st.Images)
	sameRecords(ctx, t, s.Volumes, st.Volumes)
	sameRecords(ctx, t, s.Machines, st.Machines)
}

func sameRecords[T interface {
	proto.Message
	GetMeta() *argonv1.Meta
}](ctx context.Context, t fails, table *catalog.Table[T], got map[string]T) {
	t.Helper()
	list, err := table.List(ctx)
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	want := map[string]T{}
	for _, r := range list {
		want[r.GetMeta().GetId()] = r
	}
	if !maps.EqualFunc(got, want, func(a, b T) bool { return proto.Equal(a, b) }) {
		t.Fatalf("the view has %v, the catalog %v", got, want)
	}
}

// TestViewEqualsCatalog: after any changes, whatever happened to etcd, the
// connection and the history meanwhile, the view has what a list has.
func TestViewEqualsCatalog(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	s := create(t, cli)
	watching, err := catalog.Open(t.Context(), etcd.Client("view"))
	if err != nil {
		t.Fatal(err)
	}
	v := runView(t, watching)
	ctx := t.Context()
	rapid.Check(t, func(t *rapid.T) {
		for range rapid.IntRange(1, 12).Draw(t, "changes") {
			name := fmt.Sprint("r", rapid.IntRange(0, 3).Draw(t, "name"))
			switch rapid.IntRange(0, 12).Draw(t, "kind") {
			case 0, 1:
				alter(ctx, t, s.Servers, &argonv1.Server{Meta: &argonv1.Meta{Name: name}})
			case 2, 3:
				alter(ctx, t, s.Images, &argonv1.Image{Meta: &argonv1.Meta{Name: name}})
			case 4, 5:
				alter(ctx, t, s.Volumes, &argonv1.Volume{Meta: &argonv1.Meta{Name: name}})
			case 6, 7:
				alter(ctx, t, s.Machines, machine(name))
			case 8:
				if err := s.Events.Append(ctx, &argonv1.Event{}); err != nil {
					t.Fatal(err)
				}
			case 9:
				etcd.Cut("view")
			case 10:
				etcd.Heal("view")
			case 11:
				compact(ctx, t, cli)
			}
		}
		etcd.Heal("view")
		equalsCatalog(ctx, t, s, v)
	})
}

// alter creates, changes or deletes the record of a name.
func alter[T interface {
	proto.Message
	GetMeta() *argonv1.Meta
}](ctx context.Context, t *rapid.T, table *catalog.Table[T], fresh T) {
	r, err := table.ByName(ctx, fresh.GetMeta().GetName())
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		err = table.Create(ctx, fresh)
	case err == nil && rapid.Bool().Draw(t, "delete"):
		err = table.Delete(ctx, r)
	case err == nil:
		r.GetMeta().Labels = map[string]string{"draw": fmt.Sprint(rapid.Int().Draw(t, "label"))}
		err = table.Put(ctx, r)
	}
	if err != nil {
		t.Fatalf("alter %v: %v", fresh, err)
	}
}

// compact drops all history.
func compact(ctx context.Context, t fails, cli *clientv3.Client) {
	t.Helper()
	// Something new, as a revision can be compacted once only.
	res, err := cli.Put(ctx, "/elsewhere", "")
	if err == nil {
		_, err = cli.Compact(ctx, res.Header.Revision)
	}
	if err != nil {
		t.Fatalf("compact: %v", err)
	}
}

// TestViewMissesCompaction: what the view has not seen is compacted while it is
// cut off.
func TestViewMissesCompaction(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	s := create(t, cli)
	watching, err := catalog.Open(t.Context(), etcd.Client("view"))
	if err != nil {
		t.Fatal(err)
	}
	v := runView(t, watching)
	kept, gone := made(t, s, "kept"), made(t, s, "gone")
	before := synced(t, v)
	etcd.Cut("view")
	ctx := t.Context()
	if err := s.Machines.Delete(ctx, gone); err != nil {
		t.Fatal(err)
	}
	kept.Cpus = 7
	if err := s.Machines.Put(ctx, kept); err != nil {
		t.Fatal(err)
	}
	compact(ctx, t, cli)
	if got := v.State().Machines; len(got) != 2 {
		t.Errorf("the view lost %v while it was cut off", got)
	}
	etcd.Heal("view")
	equalsCatalog(ctx, t, s, v)
	if len(before.Machines) != 2 || before.Machines[kept.GetMeta().GetId()].GetCpus() == 7 {
		t.Error("an old state was changed")
	}
}

// TestViewSurvivesEtcd: the view waits while etcd is away, and goes on.
func TestViewSurvivesEtcd(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	s := create(t, cli)
	v := runView(t, s)
	made(t, s, "before")
	old := synced(t, v)
	for i := range 3 {
		etcd.Stop()
		short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if err := v.Sync(short); !catalog.Unavailable(err) {
			t.Errorf("Sync without etcd: %v, want one that is Unavailable", err)
		}
		cancel()
		if v.State() == nil || len(v.State().Machines) != i+1 {
			t.Errorf("the view did not keep what it had: %v", v.State())
		}
		etcd.Start()
		made(t, s, fmt.Sprint("after", i))
		equalsCatalog(t.Context(), t, s, v)
	}
	if v.State().Revision <= old.Revision {
		t.Error("the view went back")
	}
}

// TestViewLeavesASilentEtcd: connections that live and pass nothing on, as of a
// host without power, do not keep the view from following another voter.
func TestViewLeavesASilentEtcd(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	s := create(t, cli)
	watching, err := catalog.Open(t.Context(), etcd.Client("one", "two"))
	if err != nil {
		t.Fatal(err)
	}
	v := runView(t, watching)
	synced(t, v)
	for _, name := range []string{"one", "two"} { // the watch is on one of them
		etcd.Freeze(name)
		m := made(t, s, name)
		await(v, func(st *catalog.State) bool { return st.Machines[m.GetMeta().GetId()] != nil })
		etcd.Thaw(name)
	}
}

// TestChangedMissesNothing: a loop that takes Changed before State always gets
// to the last change.
func TestChangedMissesNothing(t *testing.T) {
	s, _ := newStore(t)
	v := runView(t, s)
	const last = 200
	m := made(t, s, "m")
	id := m.GetMeta().GetId()
	var wg sync.WaitGroup
	wg.Go(func() {
		for range last {
			m.Placement++
			if err := s.Machines.Put(t.Context(), m); err != nil {
				t.Error(err)
			}
		}
	})
	var revision int64
	await(v, func(st *catalog.State) bool {
		if st.Revision < revision {
			t.Errorf("the view went back from revision %d to %d", revision, st.Revision)
		}
		revision = st.Revision
		return st.Machines[id].GetPlacement() == last
	})
	wg.Wait()
}

// TestOnlyRecordsWakeLoops: events, tokens and other people's keys do not, yet
// the view learns that it is up to date.
func TestOnlyRecordsWakeLoops(t *testing.T) {
	s, cli := newStore(t)
	v := runView(t, s)
	before, ctx := synced(t, v), t.Context()
	changed := v.Changed()
	if err := s.Events.Append(ctx, &argonv1.Event{Reason: "x"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Tokens.Create(ctx, &argonv1.Token{Id: "x"}); err != nil {
		t.Fatal(err)
	}
	res, err := cli.Put(ctx, "/election", "x")
	if err != nil {
		t.Fatal(err)
	}
	if err := v.WaitFor(ctx, res.Header.Revision); err != nil {
		t.Fatal(err)
	}
	if now := v.State(); now.Revision <= before.Revision {
		t.Errorf("the view is at revision %d, was at %d", now.Revision, before.Revision)
	}
	select {
	case <-changed:
		t.Error("a loop was woken for nothing")
	default:
	}
	made(t, s, "m")
	<-changed
}

// TestWaitEndsWithItsContext also where no view runs.
func TestWaitEndsWithItsContext(t *testing.T) {
	s, _ := newStore(t)
	v := catalog.NewView(s, slog.New(slog.DiscardHandler))
	if v.State() != nil {
		t.Error("a view that has not read anything shows something")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := v.WaitFor(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("WaitFor = %v", err)
	}
}

// TestDamagedRecord: to go on without a record that can't be read would look as
// if it had been deleted, so the view stays as it is until it can be.
func TestDamagedRecord(t *testing.T) {
	s, cli := newStore(t)
	v := runView(t, s)
	m := made(t, s, "m")
	synced(t, v)
	ctx := t.Context()
	res, err := cli.Put(ctx, "/argon/state/machine/"+m.GetMeta().GetId(), "\xff")
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := v.WaitFor(short, res.Header.Revision); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the view went past a damaged record: %v", err)
	}
	if !proto.Equal(v.State().Machines[m.GetMeta().GetId()], m) {
		t.Errorf("the view shows %v", v.State().Machines)
	}
	if _, err := s.Machines.List(ctx); err == nil {
		t.Error("List passed over a damaged record")
	}
	if _, err := cli.Delete(ctx, "/argon/state/machine/"+m.GetMeta().GetId()); err != nil {
		t.Fatal(err)
	}
	equalsCatalog(ctx, t, s, v)
}

// TestLargeCatalog: more than one page.
func TestLargeCatalog(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	const pages, atOnce = 4500, 60
	txn := s.Txn()
	for i := range pages {
		txn.Create(machine(fmt.Sprint("m", i)))
		if (i+1)%atOnce == 0 || i == pages-1 {
			if err := txn.Commit(ctx); err != nil {
				t.Fatal(err)
			}
			txn = s.Txn()
		}
	}
	v := runView(t, s)
	equalsCatalog(ctx, t, s, v)
	if got := len(v.State().Machines); got != pages {
		t.Errorf("the view has %d machines of %d", got, pages)
	}
}
