package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// ownVoterRetry is the pause after this server's etcd could not be brought to
// what its record says.
const ownVoterRetry = 500 * time.Millisecond

// RunVoters makes this server's record follow its address, its own etcd the
// record, and the client the voters, until ctx ends. ErrRemoved when the server is not part of
// the cluster any more; but not while it votes: the leader has another vote in
// its place first, or there might be no majority left.
func (m *Member) RunVoters(ctx context.Context, view *catalog.View) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	follow := complaint{log: m.opts.Log, about: "this server's etcd is not as it should be; trying again"}
	moved := complaint{log: m.opts.Log, about: "the cluster is not told of this server's new address; trying again"}
	keep := complaint{log: m.opts.Log, about: "the voters' addresses can't be kept"}
	for ctx.Err() == nil {
		changed := view.Changed()
		wait := time.Duration(-1)
		if st := view.State(); st != nil {
			removed := p.belongs(st.Servers[p.id.ServerID])
			if removed != nil && !m.stillMember(ctx, p) {
				return removed
			}
			if removed != nil {
				_ = sleep(ctx, ownVoterRetry)
				continue
			}
			if moved.tell(ctx, p.keepRecord(ctx, m.opts.Log, st)) {
				wait = ownVoterRetry
			}
			if follow.tell(ctx, m.followRecord(ctx, p, st)) {
				wait = ownVoterRetry
			}
			keep.tell(ctx, m.followVoters(p, st))
		}
		if wait >= 0 {
			_ = sleep(ctx, wait)
			continue
		}
		select {
		case <-changed:
		case <-m.etcdFailed():
			_ = sleep(ctx, ownVoterRetry)
		case <-ctx.Done():
		}
	}
	return nil
}

// keepRecord writes into this server's record where it is, and until when its
// certificate is good, if that is not what the record says. Everybody else follows
// the record.
func (p *parts) keepRecord(ctx context.Context, log *slog.Logger, st *catalog.State) error {
	expires := timestamppb.New(p.creds.own.Leaf.NotAfter)
	if own := st.Servers[p.id.ServerID]; own.GetAddress() == p.id.Address && proto.Equal(own.GetCertificateExpires(), expires) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	was := ""
	s, err := p.store.Servers.Update(ctx, p.id.ServerID, func(s *argonv1.Server) error {
		if was = s.GetAddress(); was == p.id.Address && proto.Equal(s.GetCertificateExpires(), expires) {
			return catalog.ErrUnchanged
		}
		s.CertificateExpires = expires
		if was != p.id.Address {
			s.Address = p.id.Address
			s.Moves++
		}
		return nil
	})
	if err != nil {
		return err
	}
	if was == p.id.Address {
		return nil
	}
	log.Info("the cluster was told of this server's new address", "was", was, "address", p.id.Address)
	return p.store.Events.Append(ctx, &argonv1.Event{
		Severity: argonv1.Severity_SEVERITY_INFO, Kind: "server", SubjectId: p.id.ServerID, ServerId: p.id.ServerID,
		SubjectName: s.GetMeta().GetName(), Reason: "server-moved",
		Message: fmt.Sprintf("it is at %s now, no more at %s", p.id.Address, was),
	})
}

// etcdFailed is closed when this server's etcd has ended by itself; nil, which
// blocks for ever, while it has none.
func (m *Member) etcdFailed() <-chan struct{} {
	m.etcdMu.Lock()
	defer m.etcdMu.Unlock()
	if m.etcd == nil {
		return nil
	}
	return m.etcd.failed
}

// ownEtcd tells which member of etcd this server is, 0 for none, and whether it
// does not run: it has ended by itself, or could not be started again.
func (m *Member) ownEtcd() (id uint64, failed bool) {
	m.etcdMu.Lock()
	defer m.etcdMu.Unlock()
	if m.etcd == nil {
		return m.etcdID, m.etcdID != 0
	}
	select {
	case <-m.etcd.failed:
		failed = true
	default:
	}
	return m.etcdID, failed
}

// stillMember tells whether etcd counts on this server, as far as can be told.
func (m *Member) stillMember(ctx context.Context, p *parts) bool {
	id, failed := m.ownEtcd()
	if id == 0 || failed {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	list, err := p.client.MemberList(ctx)
	return err != nil || slices.ContainsFunc(list.Members, func(one *etcdserverpb.Member) bool { return one.ID == id })
}

// followRecord starts or stops etcd here.
func (m *Member) followRecord(ctx context.Context, p *parts, st *catalog.State) error {
	own := st.Servers[p.id.ServerID]
	running, failed := m.ownEtcd()
	if running == own.GetMemberId() && !failed {
		return nil
	}
	// What etcd says counts, not a view that may be behind.
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	list, err := p.client.MemberList(ctx)
	if err != nil {
		return fmt.Errorf("list etcd's members: %w", err)
	}
	members := membersOf(list.Members, st.Servers, nil)
	mine := slices.IndexFunc(members, func(m member) bool { return m.server == p.id.ServerID })
	switch {
	case mine >= 0 && members[mine].id == running && !failed:
		return nil
	case mine >= 0 && members[mine].id == running:
		// And start it again, with what it has, however often that fails: a
		// member that came back without would have forgotten whom it voted for
		// and what it has acknowledged.
		m.stopEtcd()
	default:
		if err := m.forgetEtcd(); err != nil {
			return err
		}
	}
	if mine < 0 {
		return nil
	}
	return m.joinEtcd(ctx, p, list.Members, members[mine].id)
}

// joinEtcd starts etcd as the member that was added for this server. The others
// are those that etcd names: one may be of a server that was removed, and lets
// this one vote in its place.
func (m *Member) joinEtcd(ctx context.Context, p *parts, members []*etcdserverpb.Member, own uint64) error {
	var peers []string
	for _, one := range members {
		name := fmt.Sprintf("%x", one.ID) // what others are called does not matter
		if one.ID == own {
			name = p.id.ServerID
		}
		for _, url := range one.PeerURLs {
			peers = append(peers, name+"="+url)
		}
	}
	id := m.about()
	c := m.etcdConfig(&id)
	c.peers, c.joining = strings.Join(peers, ","), true
	// Not bounded: etcd keeps it.
	return m.startEtcd(context.WithoutCancel(ctx), c)
}

// followVoters leads the client to the voters, and keeps in server.json where
// they are, for the next start.
func (m *Member) followVoters(p *parts, st *catalog.State) error {
	servers := slices.SortedFunc(maps.Values(st.Servers), func(a, b *argonv1.Server) int {
		return strings.Compare(a.GetMeta().GetId(), b.GetMeta().GetId())
	})
	var voters []string
	for _, s := range servers {
		if s.GetVoterRole() == argonv1.VoterRole_VOTER_ROLE_VOTER {
			voters = append(voters, urlString(s.GetAddress(), int(s.GetEtcdPort())))
		}
	}
	if len(voters) > 0 && !slices.Equal(voters, p.client.Endpoints()) {
		p.client.SetEndpoints(voters...)
	}
	return m.remember(remembered(servers))
}
