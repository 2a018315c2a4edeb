package catalog_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// contents counts what is kept apart.
func contents(t testing.TB, cli *clientv3.Client) int {
	t.Helper()
	res, err := cli.Get(t.Context(), "/argon/content/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		t.Fatal(err)
	}
	return int(res.Count)
}

func userData(fill string) *argonv1.FirstBoot {
	return &argonv1.FirstBoot{User: "alice", UserData: bytes.Repeat([]byte(fill), 60_000)}
}

// state is the catalog as it is now.
func state(t testing.TB, s *catalog.Store) *catalog.State {
	t.Helper()
	return synced(t, runView(t, s))
}

// TestLargeValuesAreKeptApart: a change of a machine's status writes no user
// data, and user data is there for as long as a record refers to it.
func TestLargeValuesAreKeptApart(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	get := func(m *argonv1.Machine) *argonv1.Machine {
		t.Helper()
		m, err := s.Machines.Get(ctx, m.GetMeta().GetId())
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	put := func(m *argonv1.Machine) {
		t.Helper()
		if err := s.Machines.Put(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	has := func(m *argonv1.Machine, want *argonv1.FirstBoot) {
		t.Helper()
		whole, err := s.Whole(ctx, m)
		if err != nil || !bytes.Equal(whole.GetFirstBoot().GetUserData(), want.GetUserData()) || whole.GetFirstBoot().GetUser() != "alice" {
			t.Errorf("it has user data of %d bytes, %v", len(whole.GetFirstBoot().GetUserData()), err)
		}
	}
	a, b := machine("a"), machine("b")
	a.FirstBoot, b.FirstBoot = userData("a"), userData("a")
	if err := s.Txn().Create(a).Create(b).Commit(ctx); err != nil {
		t.Fatal(err)
	}
	a, b = get(a), get(b)
	if n := proto.Size(a); n > 1000 {
		t.Errorf("the record has %d bytes", n)
	}
	has(a, userData("a"))
	if n := contents(t, cli); n != 1 {
		t.Errorf("%d contents for two machines with the same", n)
	}
	a.Status = &argonv1.MachineStatus{Reason: "hello"}
	put(a)
	has(get(a), userData("a"))

	// A checkpoint keeps what its machine had then.
	c := &argonv1.Checkpoint{Meta: &argonv1.Meta{Name: "c"}, Machine: get(a)}
	if err := s.Checkpoints.Create(ctx, c); err != nil {
		t.Fatal(err)
	}
	a = get(a)
	was := a.GetFirstBoot().GetContentId()
	a.FirstBoot = userData("x")
	a.FirstBoot.ContentId = was
	put(a)
	has(get(a), userData("x"))
	if err := s.Machines.Delete(ctx, get(b)); err != nil {
		t.Fatal(err)
	}
	has(c.GetMachine(), userData("a"))
	// And a machine may become what it was: the reference is another one then.
	a = get(a)
	a.FirstBoot = c.GetMachine().GetFirstBoot()
	put(a)
	if err := s.Checkpoints.Delete(ctx, c); err != nil {
		t.Fatal(err)
	}
	has(get(a), userData("a"))
	if err := s.SweepContent(ctx, state(t, s)); err != nil {
		t.Fatal(err)
	}
	has(get(a), userData("a"))
	if n := contents(t, cli); n != 1 {
		t.Errorf("%d contents, want that of the one machine that is left", n)
	}
	// What refers to nothing that there is can't come to be.
	gone := machine("gone")
	gone.FirstBoot = &argonv1.FirstBoot{ContentId: strings.Repeat("0", 64)}
	if err := s.Machines.Create(ctx, gone); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("a machine without its content: %v", err)
	}
	if err := s.Machines.Delete(ctx, get(a)); err != nil {
		t.Fatal(err)
	}
	if n := contents(t, cli); n != 0 {
		t.Errorf("%d contents are left of nobody", n)
	}
	if all := content(t, cli); strings.Contains(all, "content") {
		t.Errorf("left: %s", all)
	}
}

// TestRecordsOfOldKeepTheirContent: before contents were kept apart they were in
// the record; its next change takes them out.
func TestRecordsOfOldKeepTheirContent(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	m := made(t, s, "old")
	stored := proto.CloneOf(m)
	stored.Meta.Revision, stored.Meta.CreatedRevision, stored.FirstBoot = 0, 0, userData("o")
	value, err := proto.Marshal(stored)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Put(ctx, "/argon/state/machine/"+m.GetMeta().GetId(), string(value)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		m, err = s.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error {
			m.Cpus++
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if m, err = s.Machines.Get(ctx, m.GetMeta().GetId()); err != nil || proto.Size(m) > 1000 {
		t.Errorf("the record has %d bytes, %v", proto.Size(m), err)
	}
	if m, err = s.Whole(ctx, m); err != nil || !bytes.Equal(m.GetFirstBoot().GetUserData(), userData("o").GetUserData()) {
		t.Errorf("it has lost its user data: %v", err)
	}
}

// TestSweptContents: what was left by who ended too early, or took a first boot
// away, goes.
func TestSweptContents(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	m := machine("m")
	m.FirstBoot = userData("m")
	if err := s.Machines.Create(ctx, m); err != nil {
		t.Fatal(err)
	}
	old := state(t, s)
	if _, err := s.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error { m.FirstBoot = nil; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.SweepContent(ctx, old); err != nil || contents(t, cli) != 1 {
		t.Errorf("%d contents after a sweep by an old view, which can't know: %v", contents(t, cli), err)
	}
	now := state(t, s)
	if _, err := s.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error { m.FirstBoot = userData("m"); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.SweepContent(ctx, now); err != nil || contents(t, cli) != 1 {
		t.Errorf("%d contents: it was swept though it is needed again: %v", contents(t, cli), err)
	}
	if _, err := s.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error { m.FirstBoot = nil; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.SweepContent(ctx, state(t, s)); err != nil || contents(t, cli) != 0 {
		t.Errorf("%d contents are left of nobody: %v", contents(t, cli), err)
	}
}

// TestFullCatalog: it takes nothing that makes it larger, and everything else.
func TestFullCatalog(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	m, gone := made(t, s, "m"), made(t, s, "gone")
	if err := s.SetFull(ctx, true); err != nil {
		t.Fatal(err)
	}
	if !state(t, s).Full {
		t.Error("the view does not show that it is full")
	}
	change := func(alter func(*argonv1.Machine)) error {
		now, err := s.Machines.Get(ctx, m.GetMeta().GetId())
		if err != nil {
			t.Fatal(err)
		}
		alter(now)
		txn := s.Txn().Put(now)
		txn.LimitGrowth(state(t, s))
		return txn.Commit(ctx)
	}
	boot := func(m *argonv1.Machine) { m.FirstBoot = userData("b") }
	labels := func(m *argonv1.Machine) { m.Meta.Labels = map[string]string{"a": strings.Repeat("x", 100)} }
	for what, err := range map[string]error{
		"a new record": s.Machines.Create(ctx, machine("new")), "user data": change(boot), "a long label": change(labels),
	} {
		if !errors.Is(err, catalog.ErrFull) || !strings.Contains(err.Error(), "argon status") {
			t.Errorf("%s: %v", what, err)
		}
	}
	status := func(m *argonv1.Machine) error {
		m.Status = &argonv1.MachineStatus{Reason: strings.Repeat("what was observed ", 20)}
		return nil
	}
	if _, err := s.Machines.Update(ctx, m.GetMeta().GetId(), status); err != nil {
		t.Errorf("a status: %v", err)
	}
	if err := change(func(m *argonv1.Machine) { m.Wanted = argonv1.Wanted_WANTED_REMOVED }); err != nil {
		t.Errorf("the wish to remove it: %v", err)
	}
	if err := s.Machines.Delete(ctx, gone); err != nil {
		t.Errorf("a removal: %v", err)
	}
	if err := s.SetFull(ctx, false); err != nil {
		t.Fatal(err)
	}
	if state(t, s).Full {
		t.Error("the view shows that it is full still")
	}
	if err := change(boot); err != nil {
		t.Errorf("user data when there is room: %v", err)
	}
	made(t, s, "new")
}
