package cluster

import (
	"crypto/rand"
	"errors"
	"fmt"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

const mib = 1 << 20

func TestPlanUpkeep(t *testing.T) {
	leader := memberLoad{id: 1, size: 600, used: 400, leads: true}
	with := func(change func(*load)) load {
		l := load{quota: 1000, floor: 390, history: true, rested: true, complete: true, members: []memberLoad{leader, {id: 2, size: 600, used: 400}}}
		change(&l)
		return l
	}
	used := func(n int64) func(*load) {
		return func(l *load) { l.members[0].used, l.members[0].size = n, max(n, 600) }
	}
	for _, tt := range []struct {
		name   string
		change func(*load)
		kind   upkeepKind
		member uint64
	}{
		{"all is well", func(*load) {}, noUpkeep, 0},
		{"history grows, and there is room", used(499), noUpkeep, 0},
		{"history grows past half", used(500), compact, 0},
		{"half is used, by little history", func(l *load) { used(500)(l); l.floor = 450 }, noUpkeep, 0},
		{"nothing was written since", func(l *load) { used(800)(l); l.history = false }, noUpkeep, 0},
		{"its disk is full", func(l *load) { l.noRoom = true }, markFull, 0},
		{"its disk is full still", func(l *load) { l.noRoom, l.full, l.history = true, true, false }, noUpkeep, 0},
		{"nine tenths with history", used(900), compact, 0},
		{"nine tenths", func(l *load) { used(900)(l); l.floor = 890 }, markFull, 0},
		{"on another member, too", func(l *load) { l.members[1].used, l.members[1].size, l.floor = 900, 900, 890 }, markFull, 0},
		{"full, and something was removed", func(l *load) { used(890)(l); l.full = true }, compact, 0},
		{"full, compacted just now", func(l *load) { used(890)(l); l.full, l.rested = true, false; l.floor = 880 }, noUpkeep, 0},
		{"full, with room again", func(l *load) { used(840)(l); l.full, l.history = true, false }, markRoom, 0},
		{"a file that is mostly free", func(l *load) { l.members[1].size = 800 }, defragment, 2},
		{"the leader's file", func(l *load) { l.members[0].size = 800 }, handOver, 2},
		{"both files", func(l *load) { l.members[0].size, l.members[1].size = 800, 800 }, defragment, 2},
		{"a member is not there", func(l *load) { l.members[1].size, l.complete = 800, false }, noUpkeep, 0},
		{"the only voter's file", func(l *load) { l.members = []memberLoad{{id: 1, size: 800, used: 400, leads: true}} }, defragment, 1},
		{"the only voter's file, and a learner", func(l *load) {
			l.members = []memberLoad{{id: 1, size: 800, used: 400, leads: true}, {id: 2, learner: true}}
		}, defragment, 1},
		{"the only voter's file is large", func(l *load) {
			l.quota, l.members = 1000*mib, []memberLoad{{id: 1, size: 800 * mib, used: 100 * mib, leads: true}}
		}, noUpkeep, 0},
		{"large files", func(l *load) {
			l.quota, l.members = 1000*mib, []memberLoad{{id: 1, size: 800 * mib, used: 100 * mib, leads: true}, {id: 2, size: 800 * mib, used: 100 * mib}}
		}, noUpkeep, 0},
		{"etcd takes nothing: history", func(l *load) { l.alarm = true; l.members[0].size, l.members[0].used = 2000, 1900 }, compact, 0},
		{"etcd takes nothing: free pages", func(l *load) {
			l.alarm, l.history = true, false
			l.members[0].size, l.members[0].used, l.members[1].size, l.members[1].used = 2000, 1700, 2000, 1700
		}, defragment, 2},
		{"etcd takes nothing: large files", func(l *load) {
			l.alarm, l.history, l.quota = true, false, 1000*mib
			l.members = []memberLoad{{id: 1, size: 2000 * mib, used: 100 * mib, leads: true}, {id: 2, size: 800 * mib, used: 100 * mib}}
		}, handOver, 2},
		{"etcd takes nothing, and has room", func(l *load) { l.alarm, l.history = true, false }, disarm, 0},
		{"etcd takes nothing, no room is known of", func(l *load) { l.alarm, l.history, l.complete = true, false, false }, noUpkeep, 0},
		{"etcd takes nothing, all is needed", func(l *load) {
			l.alarm, l.history = true, false
			l.members[0].size, l.members[0].used = 2000, 1990
		}, noUpkeep, 0},
	} {
		if got := planUpkeep(with(tt.change)); got.kind != tt.kind || got.member != tt.member {
			t.Errorf("%s: %v of %d", tt.name, got, got.member)
		}
	}
}

// random is user data that nothing makes smaller.
func random(n int) *argonv1.FirstBoot {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return &argonv1.FirstBoot{UserData: b}
}

// machine makes one with user data of n bytes.
func (s *testServer) machine(name string, n int) (*argonv1.Machine, error) {
	m := &argonv1.Machine{Meta: &argonv1.Meta{Name: name}, FirstBoot: random(n)}
	return m, s.member.Store().Machines.Create(s.w.t.Context(), m)
}

// TestCatalogKeepsRoom: changes of one record never fill the catalog, however
// many there are; new records do at nine tenths, when all else goes on; and what
// was removed makes room again.
func TestCatalogKeepsRoom(t *testing.T) {
	w := newWorld(t)
	w.quota = 24 * mib
	s := w.first()
	store, ctx := s.member.Store(), t.Context()
	m, err := s.machine("changed", 60_000)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1000 { // more than etcd itself would take
		_, err = store.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error {
			was := m.GetFirstBoot().GetContentId()
			m.FirstBoot = random(60_000)
			m.FirstBoot.ContentId = was
			return nil
		})
		if err != nil {
			t.Fatalf("change %d: %v", i, err)
		}
	}
	var made []*argonv1.Machine
	for err == nil {
		var m *argonv1.Machine
		if m, err = s.machine(fmt.Sprint("m", len(made)), 60_000); err == nil {
			made = append(made, m)
		}
		if len(made)*60_000 > 2*int(w.quota) {
			t.Fatal("nothing was refused")
		}
	}
	if !errors.Is(err, catalog.ErrFull) {
		t.Fatalf("machine %d: %v", len(made), err)
	}
	if load, err := s.member.CatalogLoad(ctx); err != nil || load.GetUsedBytes() < load.GetQuotaBytes()/2 {
		t.Errorf("it is full at %v, %v", load, err)
	}
	s.works()
	for _, m := range made[:len(made)/2] {
		if _, err := store.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error {
			m.Wanted = argonv1.Wanted_WANTED_REMOVED
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if m, err = store.Machines.Get(ctx, m.GetMeta().GetId()); err != nil {
			t.Fatal(err)
		}
		if err := store.Machines.Delete(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	w.until("there is room again", func() error {
		_, err := s.machine("again", 60_000)
		return err
	})
	// The event is written after the room was given.
	w.until("both events are there", func() error {
		list, err := store.Events.List(ctx, 2, catalog.EventFilter{Kind: "catalog"})
		if err == nil && (len(list) != 2 || list[0].GetReason() != "catalog-full" || list[1].GetReason() != "catalog-has-room") {
			err = fmt.Errorf("there are %v", list)
		}
		return err
	})
}

// TestFullEtcdRecovers: an etcd that takes no writes any more, because of
// something that no longer is, takes them again by itself.
func TestFullEtcdRecovers(t *testing.T) {
	w := newWorld(t)
	w.quota = 4 * mib
	s := w.first()
	ctx, cli := t.Context(), s.member.Client()
	var err error
	for i := 0; err == nil; i++ {
		_, err = cli.Put(ctx, fmt.Sprint("/elsewhere/", i), string(random(500_000).GetUserData()))
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatal(err)
	}
	if _, err := cli.Delete(ctx, "/elsewhere/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	s.works()
	w.until("something new", func() error {
		_, err := s.machine("new", 60_000)
		return err
	})
}

// TestDefragmentation: one voter after the other, the leader last, makes its file
// small; no lease is lost meanwhile, and the catalog answers.
func TestDefragmentation(t *testing.T) {
	w := newWorld(t)
	w.quota = 100 * mib
	a := w.first()
	b, c := w.join(), w.join()
	w.votes(a, a, b, c)
	ctx := t.Context()
	for i := range 60 {
		if _, err := a.member.Client().Put(ctx, fmt.Sprint("/elsewhere/", i), string(random(mib).GetUserData())); err != nil {
			t.Fatal(err)
		}
	}
	res, err := a.member.Client().Delete(ctx, "/elsewhere/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.member.Client().Compact(ctx, res.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	leases := map[*testServer]clientv3.LeaseID{}
	for _, s := range w.all {
		w.until("a lease", func() error {
			if leases[s], _, _ = s.member.lease.get(); leases[s] == clientv3.NoLease {
				return errNotYet
			}
			return nil
		})
	}
	keepers := map[*testServer]*upkeeper{}
	w.until("small files", func() error {
		large := 0
		a.works() // etcd counts pages as free when it has written after that
		for _, s := range w.all {
			if e := s.member.leadingEtcd(); e != nil {
				if keepers[s] == nil {
					keepers[s] = &upkeeper{member: s.member, parts: s.member.parts, etcd: e, view: s.view}
				}
				keepers[s].looks = lookEvery - 1 // all members now
				if _, err := keepers[s].pass(ctx); err != nil {
					return err
				}
			}
			if size := s.size(); size > 10*mib {
				large++
			}
		}
		if large > 0 {
			return fmt.Errorf("%d files are large", large)
		}
		return nil
	})
	for _, s := range w.all {
		if now, _, _ := s.member.lease.get(); now != leases[s] {
			t.Errorf("server %s has lost its lease", s.member.Name())
		}
		s.works()
	}
}

// size is that of the server's etcd's file.
func (s *testServer) size() int64 {
	s.member.etcdMu.Lock()
	defer s.member.etcdMu.Unlock()
	return s.member.etcd.etcd.Server.Backend().Size()
}
