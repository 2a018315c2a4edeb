package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

func newStore(t testing.TB) (*catalog.Store, *clientv3.Client) {
	t.Helper()
	cli := catalogtest.Start(t)
	s, err := catalog.Create(t.Context(), cli, &argonv1.Cluster{Id: "c"})
	if err != nil {
		t.Fatal(err)
	}
	return s, cli
}

func machine(name string) *argonv1.Machine {
	return &argonv1.Machine{Meta: &argonv1.Meta{Name: name}, Cpus: 1}
}

func TestRecords(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	m := machine("web")
	if err := s.Machines.Create(ctx, m); err != nil {
		t.Fatal(err)
	}
	if m.GetMeta().GetId() == "" || m.GetMeta().GetRevision() == 0 || m.GetMeta().GetCreated() == nil {
		t.Errorf("Create did not fill the head: %v", m.GetMeta())
	}
	if err := s.Machines.Create(ctx, machine("web")); !errors.Is(err, catalog.ErrExists) {
		t.Errorf("a name twice: %v, want ErrExists", err)
	}
	got, err := s.Machines.ByName(ctx, "web")
	if err != nil || !proto.Equal(got, m) {
		t.Errorf("ByName = %v, %v, want %v", got, err, m)
	}
	old := proto.CloneOf(m)
	m.Cpus = 2
	if err := s.Machines.Put(ctx, m); err != nil {
		t.Fatal(err)
	}
	old.Cpus = 9
	if err := s.Machines.Put(ctx, old); !errors.Is(err, catalog.ErrConflict) {
		t.Errorf("Put of an old record: %v, want ErrConflict", err)
	}
	if err := s.Machines.Delete(ctx, old); !errors.Is(err, catalog.ErrConflict) {
		t.Errorf("Delete of an old record: %v, want ErrConflict", err)
	}
	if err := s.Machines.Delete(ctx, m); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Machines.ByName(ctx, "web"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("after Delete: %v, want ErrNotFound", err)
	}
	if err := s.Machines.Create(ctx, machine("web")); err != nil {
		t.Errorf("the name is not free after Delete: %v", err)
	}
}

func TestTxnIsAllOrNothing(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	taken := machine("taken")
	if err := s.Machines.Create(ctx, taken); err != nil {
		t.Fatal(err)
	}
	v := &argonv1.Volume{Meta: &argonv1.Meta{Name: "disk"}}
	err := s.Txn().Create(v).Create(machine("taken")).Commit(ctx)
	if !errors.Is(err, catalog.ErrExists) || err.Error() != `machine "taken": exists already` {
		t.Errorf("Commit = %v, want that the machine exists", err)
	}
	if _, err := s.Volumes.ByName(ctx, "disk"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("the volume was made all the same: %v", err)
	}
	if err := s.Txn().Create(v).Delete(taken).Commit(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Machines.ByName(ctx, "taken"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("the machine is still there: %v", err)
	}
}

func TestSchema(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	if _, err := catalog.Open(ctx, cli); err != nil {
		t.Errorf("Open: %v", err)
	}
	if _, err := catalog.Create(ctx, cli, &argonv1.Cluster{}); !errors.Is(err, catalog.ErrExists) {
		t.Errorf("a second Create: %v, want ErrExists", err)
	}
	if c, err := s.Cluster(ctx); err != nil || c.GetId() != "c" || c.GetSchemaVersion() != catalog.SchemaVersion {
		t.Errorf("Cluster = %v, %v", c, err)
	}
	for _, version := range []string{"2", "x"} {
		if _, err := cli.Put(ctx, "/argon/schema", version); err != nil {
			t.Fatal(err)
		}
		if _, err := catalog.Open(ctx, cli); !errors.Is(err, catalog.ErrSchema) {
			t.Errorf("Open of version %q: %v, want ErrSchema", version, err)
		}
	}
	if _, err := cli.Delete(ctx, "/argon/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.Open(ctx, cli); !errors.Is(err, catalog.ErrNoCluster) {
		t.Errorf("Open of nothing: %v, want ErrNoCluster", err)
	}
}

// TestUpdatesAddUp: no update is lost or done twice when many race.
func TestUpdatesAddUp(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	m := machine("m")
	if err := s.Machines.Create(ctx, m); err != nil {
		t.Fatal(err)
	}
	const writers, each = 8, 20
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if _, err := s.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error {
					m.Placement++
					return nil
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got, _ := s.Machines.ByName(ctx, "m"); got.GetPlacement() != writers*each {
		t.Errorf("%d updates left %d", writers*each, got.GetPlacement())
	}
}

// TestOneNameOneRecord: of many that create the same name at once, one wins.
func TestOneNameOneRecord(t *testing.T) {
	s, _ := newStore(t)
	var wg sync.WaitGroup
	won := make(chan string, 32)
	for range cap(won) {
		wg.Go(func() {
			m := machine("m")
			if err := s.Machines.Create(t.Context(), m); err == nil {
				won <- m.GetMeta().GetId()
			} else if !errors.Is(err, catalog.ErrExists) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d of them won", len(won))
	}
}

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

// TestViewEqualsCatalog: after any changes, the view has what a list has.
func TestViewEqualsCatalog(t *testing.T) {
	s, cli := newStore(t)
	v := runView(t, s)
	ctx := t.Context()
	rapid.Check(t, func(t *rapid.T) {
		for range rapid.IntRange(1, 12).Draw(t, "changes") {
			name := fmt.Sprint("m", rapid.IntRange(0, 4).Draw(t, "machine"))
			m, err := s.Machines.ByName(ctx, name)
			switch {
			case errors.Is(err, catalog.ErrNotFound):
				err = s.Machines.Create(ctx, machine(name))
			case rapid.Bool().Draw(t, "delete"):
				err = s.Machines.Delete(ctx, m)
			default:
				m.Cpus++
				err = s.Machines.Put(ctx, m)
			}
			if err != nil {
				t.Fatal(err)
			}
			if rapid.IntRange(0, 9).Draw(t, "compact") == 0 {
				res, err := cli.Get(ctx, "x")
				if err != nil {
					t.Fatal(err)
				}
				_, _ = cli.Compact(ctx, res.Header.Revision) // done already: fine
			}
		}
		if err := v.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		list, err := s.Machines.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]*argonv1.Machine{}
		for _, m := range list {
			want[m.GetMeta().GetId()] = m
		}
		if got := v.State().Machines; !maps.EqualFunc(got, want, func(a, b *argonv1.Machine) bool { return proto.Equal(a, b) }) {
			t.Fatalf("the view has %v, the catalog %v", got, want)
		}
	})
}

// TestViewSurvives: etcd is away, and what the view missed is compacted.
func TestViewSurvives(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	ctx := t.Context()
	s, err := catalog.Create(ctx, cli, &argonv1.Cluster{Id: "c"})
	if err != nil {
		t.Fatal(err)
	}
	v := runView(t, s)
	if err := s.Machines.Create(ctx, machine("before")); err != nil {
		t.Fatal(err)
	}
	if err := v.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	etcd.Stop()
	if len(v.State().Machines) != 1 {
		t.Error("the view lost what it had when etcd went away")
	}
	etcd.Start()
	// A write may take a while to go through again.
	for err = errors.New("not yet"); err != nil; {
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		err = s.Machines.Create(short, machine("after"))
		cancel()
		if errors.Is(err, catalog.ErrExists) {
			break
		}
	}
	res, err := cli.Get(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Compact(ctx, res.Header.Revision); err != nil {
		t.Fatal(err)
	}
	if err := v.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if len(v.State().Machines) != 2 {
		t.Errorf("the view has %v", v.State().Machines)
	}
}

func TestEvents(t *testing.T) {
	s, _ := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	add := func(reason, name string) {
		if err := s.Events.Append(ctx, &argonv1.Event{Kind: "machine", SubjectName: name, Reason: reason}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		add(fmt.Sprint("old", i), "a")
	}
	add("other", "b")
	list, err := s.Events.List(ctx, 2, time.Time{}, "machine", "a")
	if err != nil || len(list) != 2 || list[0].GetReason() != "old3" || list[1].GetReason() != "old4" {
		t.Errorf("List = %v, %v", list, err)
	}
	if list, err := s.Events.List(ctx, 0, time.Now().Add(time.Hour), "", ""); err != nil || len(list) != 0 {
		t.Errorf("events of the future: %v, %v", list, err)
	}
	var got []string
	err = s.Events.Watch(ctx, 2, "machine", "a", func(e *argonv1.Event) error {
		got = append(got, e.GetReason())
		switch len(got) {
		case 2:
			add("not for us", "b")
			add("new", "a")
		case 3:
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || !slices.Equal(got, []string{"old3", "old4", "new"}) {
		t.Errorf("Watch told %v and ended with %v", got, err)
	}
}

func TestLeasesAndSecrets(t *testing.T) {
	s, cli := newStore(t)
	v := runView(t, s)
	ctx := t.Context()
	lease, err := cli.Grant(ctx, 60)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.PutLease(ctx, lease.ID, &argonv1.Lease{ServerId: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := v.Sync(ctx); err != nil || v.State().Leases["a"] == nil {
		t.Errorf("the lease does not show: %v, %v", v.State().Leases, err)
	}
	if _, err := cli.Revoke(ctx, lease.ID); err != nil {
		t.Fatal(err)
	}
	if err := v.Sync(ctx); err != nil || v.State().Leases["a"] != nil {
		t.Errorf("the lease is still there: %v, %v", v.State().Leases, err)
	}
	if err := s.PutSecret(ctx, "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	if err := s.PutSecret(ctx, "k", []byte("w")); !errors.Is(err, catalog.ErrExists) {
		t.Errorf("a secret twice: %v, want ErrExists", err)
	}
	if got, err := s.GetSecret(ctx, "k"); err != nil || string(got) != "v" {
		t.Errorf("GetSecret = %q, %v", got, err)
	}
}
