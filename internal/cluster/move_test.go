package cluster

import (
	"fmt"
	"testing"
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
}
