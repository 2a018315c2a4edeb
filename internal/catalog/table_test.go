package catalog_test

import (
	"errors"
	"strings"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestRecords(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	m := made(t, s, "web")
	if m.GetMeta().GetId() == "" || m.GetMeta().GetRevision() == 0 || m.GetMeta().GetCreated() == nil {
		t.Errorf("Create did not fill the head: %v", m.GetMeta())
	}
	if got, err := s.Machines.ByName(ctx, "web"); err != nil || !proto.Equal(got, m) {
		t.Errorf("ByName = %v, %v, want %v", got, err, m)
	}
	for range 2 { // Put keeps the revision up to date
		m.Cpus++
		if err := s.Machines.Put(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Machines.Get(ctx, m.GetMeta().GetId()); err != nil || !proto.Equal(got, m) {
		t.Errorf("Get = %v, %v, want %v", got, err, m)
	}
	if list, err := s.Machines.List(ctx); err != nil || len(list) != 1 || !proto.Equal(list[0], m) {
		t.Errorf("List = %v, %v, want %v", list, err, m)
	}
	if err := s.Machines.Delete(ctx, m); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Machines.ByName(ctx, "web"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("ByName after Delete: %v, want ErrNotFound", err)
	}
	made(t, s, "web") // the name is free again
}

// TestRefusals: what is refused changes nothing, and says why.
func TestRefusals(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	first := made(t, s, "web")
	web := proto.CloneOf(first)
	if err := s.Machines.Put(ctx, web); err != nil {
		t.Fatal(err)
	}
	gone := made(t, s, "gone")
	if err := s.Machines.Delete(ctx, proto.CloneOf(gone)); err != nil {
		t.Fatal(err)
	}
	with := func(m *argonv1.Machine, change func(*argonv1.Machine)) *argonv1.Machine {
		m = proto.CloneOf(m)
		change(m)
		return m
	}
	unread := with(web, func(m *argonv1.Machine) { m.Meta.Revision = 0 })
	renamed := with(web, func(m *argonv1.Machine) { m.Meta.Name = "other" })
	before := content(t, cli)
	for _, tc := range []struct {
		what string
		err  error
		is   error
		says string
	}{
		{"a name twice", s.Machines.Create(ctx, machine("web")), catalog.ErrExists, `machine "web": exists already`},
		{"an id twice", s.Machines.Create(ctx, renamed), catalog.ErrExists, `machine "other": exists already`},
		{"Put of an old record", s.Machines.Put(ctx, first), catalog.ErrConflict, `machine "web": changed by somebody else`},
		{"Delete of an old record", s.Machines.Delete(ctx, first), catalog.ErrConflict, `machine "web": changed by somebody else`},
		{"Put of one that is gone", s.Machines.Put(ctx, gone), catalog.ErrNotFound, `machine "gone": not found`},
		{"Delete of one that is gone", s.Machines.Delete(ctx, gone), catalog.ErrNotFound, `machine "gone": not found`},
		{"Put of what was not read", s.Machines.Put(ctx, unread), nil, `machine "web" is written without having been read`},
		{"Delete of what was not read", s.Machines.Delete(ctx, unread), nil, `machine "web" is written without having been read`},
		{"another name", s.Machines.Put(ctx, renamed), nil, `machine "other": a name cannot be changed`},
		{"Delete under another name", s.Machines.Delete(ctx, renamed), nil, `machine "other": a name cannot be changed`},
		{"no name", s.Machines.Create(ctx, &argonv1.Machine{}), nil, `a machine with "" for a name`},
		{"a path for a name", s.Machines.Create(ctx, machine("a/b")), nil, `a machine with "a/b" for a name`},
		{"a path for an id", s.Tokens.Create(ctx, &argonv1.Token{Id: "a/b"}), nil, `a token with "a/b" for an id`},
		{"a token without an id", s.Tokens.Create(ctx, &argonv1.Token{}), nil, `a token with "" for an id`},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.says) || tc.is != nil && !errors.Is(tc.err, tc.is) {
			t.Errorf("%s: %v, want %s", tc.what, tc.err, tc.says)
		}
	}
	if after := content(t, cli); after != before {
		t.Errorf("something was written: before\n%s\nafter\n%s", before, after)
	}
}

// content is all of etcd in one string.
func content(t testing.TB, cli *clientv3.Client) string {
	t.Helper()
	res, err := cli.Get(t.Context(), "/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, kv := range res.Kvs {
		b.WriteString(kv.String() + "\n")
	}
	return b.String()
}

func TestTokensHaveNoNames(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	if err := s.Tokens.Create(ctx, &argonv1.Token{Id: "x"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Tokens.Create(ctx, &argonv1.Token{Id: "x"}); !errors.Is(err, catalog.ErrExists) {
		t.Errorf("a token twice: %v, want ErrExists", err)
	}
	// Of two that use a token, one does.
	used := func(by string) error {
		_, err := s.Tokens.Update(ctx, "x", func(tok *argonv1.Token) error {
			if tok.GetUsedBy() != "" {
				return errUsed
			}
			tok.UsedBy = by
			return nil
		})
		return err
	}
	if err := errors.Join(used("a"), used("b")); !errors.Is(err, errUsed) {
		t.Errorf("a token was used twice: %v", err)
	}
	tok, err := s.Tokens.Get(ctx, "x")
	if err != nil || tok.GetUsedBy() != "a" || tok.GetRevision() == 0 {
		t.Errorf("Get = %v, %v", tok, err)
	}
	if err := s.Tokens.Delete(ctx, tok); err != nil {
		t.Error(err)
	}
}

var errUsed = errors.New("used")

func TestUpdateStops(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	m := made(t, s, "m")
	for _, tc := range []struct {
		stop, want error
	}{{catalog.ErrUnchanged, nil}, {errUsed, errUsed}} {
		got, err := s.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error {
			m.Cpus++
			return tc.stop
		})
		if !errors.Is(err, tc.want) || got == nil {
			t.Errorf("Update that stops with %v = %v, %v", tc.stop, got, err)
		}
	}
	if got, err := s.Machines.ByName(ctx, "m"); err != nil || !proto.Equal(got, m) {
		t.Errorf("it was written all the same: %v, %v", got, err)
	}
	if _, err := s.Machines.Update(ctx, "none", func(*argonv1.Machine) error { return nil }); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("Update of nothing: %v, want ErrNotFound", err)
	}
}

// TestNames: whatever many do at once, a name belongs to at most one record,
// and each record has its name.
func TestNames(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	names := []string{"a", "b", "c"}
	rapid.Check(t, func(t *rapid.T) {
		var wg sync.WaitGroup
		for range 4 {
			plan := rapid.SliceOfN(rapid.SampledFrom(names), 1, 6).Draw(t, "names")
			wg.Go(func() {
				for _, name := range plan {
					m, err := s.Machines.ByName(ctx, name)
					if errors.Is(err, catalog.ErrNotFound) {
						err = s.Machines.Create(ctx, machine(name))
					} else if err == nil {
						err = s.Machines.Delete(ctx, m)
					}
					if err != nil && !errors.Is(err, catalog.ErrExists) && !errors.Is(err, catalog.ErrConflict) && !errors.Is(err, catalog.ErrNotFound) {
						t.Errorf("machine %s: %v", name, err)
					}
				}
			})
		}
		wg.Wait()
		list, err := s.Machines.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		res, err := cli.Get(ctx, "/argon/names/", clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		if len(res.Kvs) != len(list) {
			t.Fatalf("%d names for %d machines", len(res.Kvs), len(list))
		}
		for _, m := range list {
			got, err := s.Machines.ByName(ctx, m.GetMeta().GetName())
			if err != nil || !proto.Equal(got, m) {
				t.Fatalf("the name of %v leads to %v, %v", m, got, err)
			}
		}
	})
}

// TestOneNameOneRecord: of many that create the same name at once, one wins.
func TestOneNameOneRecord(t *testing.T) {
	s, _ := newStore(t)
	const many = 32
	var wg sync.WaitGroup
	errs := make(chan error, many)
	for range many {
		wg.Go(func() { errs <- s.Machines.Create(t.Context(), machine("m")) })
	}
	wg.Wait()
	won := 0
	for range many {
		if err := <-errs; err == nil {
			won++
		} else if !errors.Is(err, catalog.ErrExists) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d of them won", won)
	}
}
