package catalog_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestTxnIsAllOrNothing(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	old := made(t, s, "web")
	web := proto.CloneOf(old)
	if err := s.Machines.Put(ctx, web); err != nil {
		t.Fatal(err)
	}
	gone := made(t, s, "gone")
	if err := s.Machines.Delete(ctx, proto.CloneOf(gone)); err != nil {
		t.Fatal(err)
	}
	disk := func() *argonv1.Volume { return &argonv1.Volume{Meta: &argonv1.Meta{Name: "disk"}} }
	before := content(t, cli)
	for _, tc := range []struct {
		what string
		txn  *catalog.Txn
		is   error
		says string
	}{
		{"a name is taken", s.Txn().Create(disk()).Create(machine("web")), catalog.ErrExists, `machine "web": exists already`},
		{"an old record", s.Txn().Create(disk()).Put(old), catalog.ErrConflict, `machine "web": changed by somebody else at the same time`},
		{"a deleted record", s.Txn().Create(disk()).Delete(gone), catalog.ErrNotFound, `machine "gone": not found`},
		{"a record twice", s.Txn().Create(disk()).Put(web).Delete(web), nil, `catalog: machine "web" is twice in one transaction`},
		{"a record of no table", s.Txn().Create(disk()).Put(&argonv1.Cluster{}), nil, `catalog: *argonv1.Cluster cannot be part of a transaction`},
		{"a record without a name", s.Txn().Create(&argonv1.Machine{}).Create(disk()), nil, `catalog: a machine with "" for a name`},
	} {
		err := tc.txn.Commit(ctx)
		if err == nil || err.Error() != tc.says || tc.is != nil && !errors.Is(err, tc.is) {
			t.Errorf("%s: %v, want %s", tc.what, err, tc.says)
		}
	}
	if after := content(t, cli); after != before {
		t.Errorf("something was written: before\n%s\nafter\n%s", before, after)
	}
}

func TestTxn(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	if txn := s.Txn(); !txn.Empty() || txn.Commit(ctx) != nil {
		t.Error("an empty transaction is not empty, or fails")
	}
	web, gone := made(t, s, "web"), made(t, s, "gone")
	disk := &argonv1.Volume{Meta: &argonv1.Meta{Name: "disk"}}
	change := proto.CloneOf(web)
	change.Cpus = 9
	put := proto.CloneOf(change)
	txn := s.Txn().Create(disk).Put(change).Delete(gone).
		Create(&argonv1.Server{Meta: &argonv1.Meta{Name: "web"}}). // a name of another kind
		Create(&argonv1.Image{Meta: &argonv1.Meta{Name: "web"}}).
		Create(&argonv1.Token{Id: "x"})
	if txn.Empty() {
		t.Error("a full transaction is empty")
	}
	if err := txn.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(change, put) {
		t.Error("Put changed its record, which may be a view's")
	}
	got, err := s.Machines.ByName(ctx, "web")
	if err != nil || got.GetCpus() != 9 {
		t.Errorf("after Put: %v, %v", got, err)
	}
	v, err := s.Volumes.Get(ctx, disk.GetMeta().GetId())
	if err != nil || v.GetMeta().GetRevision() != got.GetMeta().GetRevision() {
		t.Errorf("the volume %v, %v was not written together with %v", v, err, got)
	}
	if _, err := s.Machines.ByName(ctx, "gone"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("after Delete: %v, want ErrNotFound", err)
	}
}

// TestTxnsMoveMoney: transactions of several records that race neither lose nor
// make anything.
func TestTxnsMoveMoney(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	const accounts, each = 4, 15
	var ids []string
	for i := range accounts {
		m := machine(fmt.Sprint("m", i))
		m.Placement = 100
		if err := s.Machines.Create(ctx, m); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, m.GetMeta().GetId())
	}
	move := func(from, to string) error {
		a, err := s.Machines.Get(ctx, from)
		if err != nil {
			return err
		}
		b, err := s.Machines.Get(ctx, to)
		if err != nil {
			return err
		}
		a.Placement--
		b.Placement++
		return s.Txn().Put(a).Put(b).Commit(ctx)
	}
	var wg sync.WaitGroup
	for i := range accounts {
		wg.Go(func() {
			for done := 0; done < each; {
				switch err := move(ids[i], ids[(i+done%3+1)%accounts]); {
				case err == nil:
					done++
				case !errors.Is(err, catalog.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	list, err := s.Machines.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var sum uint64
	var all strings.Builder
	for _, m := range list {
		sum += m.GetPlacement()
		fmt.Fprintf(&all, " %d", m.GetPlacement())
	}
	if sum != accounts*100 {
		t.Errorf("the sum of%s is %d", all.String(), sum)
	}
}
