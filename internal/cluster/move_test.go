package cluster

import (
	"fmt"
	"testing"
	"time"
)

// move starts a server that is down at another address.
func (s *testServer) move(host int) {
	s.w.t.Helper()
	s.down()
	s.options.Address = fmt.Sprintf("%s%d", s.w.prefix, host)
	s.open()
	s.up()
}

// knownAt waits until a server's record and etcd's members say where it is.
func (w *world) knownAt(asked *testServer, servers ...*testServer) {
	w.t.Helper()
	w.until("the addresses", func() error {
		ctx := w.t.Context()
		list, err := asked.member.Client().MemberList(ctx)
		if err != nil {
			return err
		}
		at := map[uint64]string{}
		for _, m := range list.Members {
			at[m.ID] = m.PeerURLs[0]
		}
		for _, s := range servers {
			if err := s.knows(at); err != nil {
				return err
			}
		}
		for _, s := range servers {
			rec, err := asked.member.Store().Servers.Get(ctx, s.member.ID())
			if err != nil {
				return err
			}
			if want := s.options.Address; rec.GetAddress() != want || rec.GetMemberId() != 0 && at[rec.GetMemberId()] != urlString(want, s.options.Ports.Peer) {
				return fmt.Errorf("%s is at %s and recorded at %s, as a member at %s", rec.GetMeta().GetName(), want, rec.GetAddress(), at[rec.GetMemberId()])
			}
		}
		return nil
	})
}

// One server after the other comes back at another address: a voter, one that
// does not vote, the first one. Each says so, and those that were away meanwhile
// find it.
func TestServersMove(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.first(), w.join(), w.join()
	d := w.join()
	w.votes(a, a, b, c)
	for i, s := range []*testServer{b, d, a, c} {
		s.move(101 + i)
		s.works()
		w.knownAt(s, a, b, c, d)
		for _, other := range []*testServer{a, b, c, d} {
			other.works()
		}
	}
	w.votes(d, a, b, c)
	// Any majority of them, all at their new addresses, carries the cluster.
	for _, s := range []*testServer{a, b, c} {
		s.down()
		for _, other := range w.all {
			if other != s {
				other.works()
			}
		}
		s.open()
		s.up()
		s.works()
	}
	// And all at once: etcd's log, which has the moves before, does not lead it
	// back.
	w.moveAll(121, a, b, c, d)
	d.meet(a, b, c)
	w.knownAtLast(a, b, c, d)
}

// knownAtLast waits for servers that are starting.
func (w *world) knownAtLast(servers ...*testServer) {
	w.t.Helper()
	for _, s := range servers {
		w.until("the catalog is there again", func() error {
			_, err := s.member.running()
			return err
		})
		s.works()
	}
	w.knownAt(servers[0], servers...)
}

// moveAll starts servers at other addresses, none of which knows another one's.
func (w *world) moveAll(host int, servers ...*testServer) {
	w.t.Helper()
	for _, s := range servers {
		s.down()
	}
	for i, s := range servers {
		s.options.Address = fmt.Sprintf("%s%d", w.prefix, host+i)
		s.open()
		s.serve()
		s.loops.Go(s.join)
	}
}

// meet leads a server to others.
func (s *testServer) meet(others ...*testServer) {
	s.w.t.Helper()
	var addresses []string
	for _, o := range others {
		addresses = append(addresses, o.options.Address)
	}
	met, err := s.member.Meet(s.w.t.Context(), addresses)
	if err != nil || len(met) != len(others) {
		s.w.t.Fatalf("met %v, %v", met, err)
	}
}

// All servers move at once, twice. One is told where the others are.
func TestAllServersMove(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.first(), w.join(), w.join()
	d := w.join()
	all := []*testServer{a, b, c, d}
	w.votes(a, a, b, c)
	for round := range 2 {
		w.moveAll(101+10*round, all...)
		all[0].meet(all[1:]...)
		w.knownAtLast(all...)
		w.votes(a, a, b, c)
		all = []*testServer{c, a, d, b}
	}
}

// The only voter moves: those that can't find it are told by itself. Then both
// move, and each is told where one other is.
func TestOnlyVoterMoves(t *testing.T) {
	w := newWorld(t)
	a, b := w.first(), w.join()
	a.move(101)
	a.works()
	b.works()
	w.knownAt(b, a, b)
	w.moveAll(111, a, b)
	b.meet(a)
	w.knownAtLast(b, a)
}

// knows checks what a voter's own etcd believes of where the members are.
func (s *testServer) knows(at map[uint64]string) error {
	s.member.etcdMu.Lock()
	defer s.member.etcdMu.Unlock()
	if s.member.etcd == nil {
		return nil
	}
	for _, m := range s.member.etcd.etcd.Server.Cluster().Members() {
		if at[uint64(m.ID)] != m.PeerURLs[0] {
			return fmt.Errorf("to %s member %x is at %v", s.member.Name(), uint64(m.ID), m.PeerURLs)
		}
	}
	return nil
}

// Etcd's log says where a member was before. At its start etcd does not take that
// for where it is.
func TestLogDoesNotLeadBack(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	a.move(101)
	w.knownAt(a, a)
	a.works()
	a.down()
	a.options.Address = w.prefix + "111"
	a.open()
	if err := a.member.startKnownEtcd(t.Context()); err != nil {
		t.Fatal(err)
	}
	server := a.member.etcd.etcd.Server
	select {
	case <-server.ReadyNotify():
	case <-time.After(patience):
		t.Fatal("it does not start")
	}
	members := server.Cluster().Members()
	if want := urlString(a.options.Address, 7442); len(members) != 1 || members[0].PeerURLs[0] != want {
		t.Errorf("members %v, want one at %s", members, want)
	}
}
