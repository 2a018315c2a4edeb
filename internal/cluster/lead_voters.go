package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

const (
	// voterTick bounds how long a change of voters waits that only time brings
	// about: a grace time that ends.
	voterTick = 5 * time.Second
	// learnerTick is how often a learner is asked whether it has caught up.
	learnerTick = 200 * time.Millisecond
	// memberTimeout bounds one change of etcd's membership.
	memberTimeout = 5 * time.Second
)

// LeadVoters makes the voters those that there should be, one step after the
// other, until ctx ends. The leader runs it; see Lead. It can be stopped at any
// point: what etcd's membership is counts, and the records follow it.
func (m *Member) LeadVoters(ctx context.Context, view *catalog.View) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	l := &voterLeader{parts: p, member: m, view: view, missing: map[string]time.Duration{}, told: map[uint64]string{}}
	trouble := complaint{log: m.opts.Log, about: "the voters can't be changed; trying again"}
	for ctx.Err() == nil {
		changed := view.Changed()
		again, err := l.pass(ctx)
		trouble.tell(ctx, err)
		// Not at each change of some record, of which there may be many.
		_ = sleep(ctx, learnerTick)
		if again {
			continue
		}
		t := time.NewTimer(voterTick)
		select {
		case <-changed:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
	return nil
}

type voterLeader struct {
	parts  *parts
	member *Member
	view   *catalog.View
	// missing is since when, on the boottime clock, this leader sees a server
	// without a lease.
	missing map[string]time.Duration
	// told is where this leader has told etcd that members are, by their ids.
	told map[uint64]string
}

// pass takes one step. again: there is more to do that no record will tell of.
func (l *voterLeader) pass(ctx context.Context) (again bool, err error) {
	st := l.view.State()
	if st == nil {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	list, err := l.parts.client.MemberList(ctx)
	if err != nil {
		return true, fmt.Errorf("list etcd's members: %w", err)
	}
	members := membersOf(list.Members, st.Servers, l.told)
	if err := l.record(ctx, st, members); err != nil {
		return true, err
	}
	step := planVoters(electorate{
		servers: l.electors(st), members: members,
		grace: time.Duration(withDefaults(st.Cluster.GetSettings()).GetVoterGraceSeconds()) * time.Second,
	})
	if step.kind == noStep {
		return learning(members), nil
	}
	err = l.carryOut(ctx, st, step)
	if errors.Is(err, rpctypes.ErrMemberLearnerNotReady) || errors.Is(err, rpctypes.ErrUnhealthy) {
		return true, nil // it has not caught up, or not everybody has met yet
	}
	if err != nil {
		return true, fmt.Errorf("%v: %w", step, err)
	}
	l.member.opts.Log.Info("the voters change", "step", step.String())
	return true, nil
}

func learning(members []member) bool {
	for _, m := range members {
		if m.learner {
			return true
		}
	}
	return false
}

// membersOf says whose each member is: by its name, which is the server's id and
// which it has once it has started; before that by the record, or by the address
// that it was added with. told is where etcd has been told that members are which
// have moved: what its list says is only what the one member knows that was asked.
func membersOf(list []*etcdserverpb.Member, servers map[string]*argonv1.Server, told map[uint64]string) []member {
	byPeer, byMember := make(map[string]string, len(servers)), make(map[uint64]string, len(servers))
	for id, s := range servers {
		byPeer[peerURL(s)] = id
		byMember[s.GetMemberId()] = id
	}
	members := make([]member, len(list))
	for i, m := range list {
		owner := m.Name
		if owner == "" {
			owner = byMember[m.ID]
		}
		for _, url := range m.PeerURLs {
			if owner == "" {
				owner = byPeer[url]
			}
		}
		s := servers[owner]
		if s == nil {
			owner = ""
		}
		members[i] = member{
			id: m.ID, server: owner, learner: m.IsLearner, started: m.Name != "",
			moved: s != nil && (s.GetMoves() > 0 && told[m.ID] != peerURL(s) || !slices.Equal(m.PeerURLs, []string{peerURL(s)})),
		}
	}
	return members
}

// peerURL is where a server's etcd is reached by the others.
func peerURL(s *argonv1.Server) string { return urlString(s.GetAddress(), int(s.GetPeerPort())) }

func (l *voterLeader) electors(st *catalog.State) []elector {
	now := l.member.opts.Boottime()
	var all []elector
	for id, s := range st.Servers {
		e := elector{id: id, zone: s.GetZone()}
		if st.Leases[id] != nil {
			delete(l.missing, id)
		} else {
			since, ok := l.missing[id]
			if !ok {
				since = now
				l.missing[id] = now
			}
			// Not zero: that is for one that is there.
			e.away = max(now-since, 1)
		}
		all = append(all, e)
	}
	return all
}

func (l *voterLeader) carryOut(ctx context.Context, st *catalog.State, step voterStep) error {
	var err error
	switch step.kind {
	case addLearner:
		_, err = l.parts.client.MemberAddAsLearner(ctx, []string{peerURL(st.Servers[step.server])})
	case readdress:
		url := peerURL(st.Servers[step.server])
		if _, err = l.parts.client.MemberUpdate(ctx, step.member, []string{url}); err == nil {
			l.told[step.member] = url
		}
	case promote:
		_, err = l.parts.client.MemberPromote(ctx, step.member)
	case remove:
		_, err = l.parts.client.MemberRemove(ctx, step.member)
	}
	return err
}

// record writes into the servers' records what etcd's membership is. That is
// what makes a server start or stop its own etcd.
func (l *voterLeader) record(ctx context.Context, st *catalog.State, members []member) error {
	for id, s := range st.Servers {
		role, memberID := argonv1.VoterRole_VOTER_ROLE_CLIENT, uint64(0)
		for _, m := range members {
			if m.server == id {
				role, memberID = argonv1.VoterRole_VOTER_ROLE_VOTER, m.id
				if m.learner {
					role = argonv1.VoterRole_VOTER_ROLE_LEARNER
				}
			}
		}
		if s.GetVoterRole() == role && s.GetMemberId() == memberID {
			continue
		}
		_, err := l.parts.store.Servers.Update(ctx, id, func(s *argonv1.Server) error {
			s.VoterRole, s.MemberId = role, memberID
			return nil
		})
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return fmt.Errorf("write down who votes: %w", err)
		}
	}
	return nil
}
