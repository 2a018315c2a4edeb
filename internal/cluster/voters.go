package cluster

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// This file decides who votes: functions on values, without effects. Who
// carries the steps out is in lead_voters.go and own_voter.go.

// electorate is all that the decision about voters rests on.
type electorate struct {
	servers []elector
	members []member
	// grace is how long a voter may be away before another replaces it.
	grace time.Duration
}

// elector is a server that votes or may.
type elector struct {
	id, zone string
	// away is how long it has been without a lease; 0: it has one.
	away time.Duration
}

// member is a member of etcd.
type member struct {
	id uint64
	// server is whose it is; empty if that server is not part of the cluster
	// any more.
	server string
	// learner: it does not vote yet.
	learner bool
	// started: it has told its name, which it does when it runs first.
	started bool
	// moved: its server is at another address than etcd knows.
	moved bool
}

// voterStep is one change of etcd's membership. etcd itself allows one at a
// time.
type voterStep struct {
	kind voterStepKind
	// server is whom to add; member whom to promote or remove.
	server string
	member uint64
	why    string
}

type voterStepKind uint8

const (
	noStep voterStepKind = iota
	addLearner
	promote
	remove
	readdress
)

func (s voterStep) String() string {
	switch s.kind {
	case addLearner:
		return fmt.Sprintf("add %s (%s)", s.server, s.why)
	case promote:
		return fmt.Sprintf("promote %x (%s)", s.member, s.why)
	case remove:
		return fmt.Sprintf("remove %x (%s)", s.member, s.why)
	case readdress:
		return fmt.Sprintf("another address for %x (%s)", s.member, s.why)
	}
	return "nothing"
}

// votersWanted is how many of so many servers should vote: an odd number, as an
// even one survives no more losses than the odd one below it.
func votersWanted(servers int) int {
	switch {
	case servers < 3:
		return 1
	case servers < 5:
		return 3
	}
	return 5
}

// planVoters names the next step towards the voters that there should be.
//
// A new voter is added as a learner, which has no part in majorities until it
// has caught up. All learners are added before the first is promoted: after a
// promotion etcd takes no other member for a while, and an even number of voters
// should not last. For the same reason a voter that is lost goes before another
// comes in its place: while it is there, etcd takes no new member. No step is
// taken after which those that are known to live would be no majority.
func planVoters(e electorate) voterStep {
	for _, step := range []func() voterStep{e.readdressing, e.dropLearner, e.removal, e.addition, e.promotion} {
		if s := step(); s.kind != noStep {
			return s
		}
	}
	return voterStep{}
}

// readdressing tells etcd where a member is now. It comes first: the member may
// be one that is waited for.
func (e electorate) readdressing() voterStep {
	for _, m := range e.members {
		if m.moved {
			return voterStep{kind: readdress, member: m.id, server: m.server, why: "its server has moved"}
		}
	}
	return voterStep{}
}

// find is the server of an id; nil if there is none.
func (e electorate) find(id string) *elector {
	i := slices.IndexFunc(e.servers, func(s elector) bool { return s.id == id })
	if i < 0 {
		return nil
	}
	return &e.servers[i]
}

func (e electorate) alive(m member) bool {
	s := e.find(m.server)
	return s != nil && s.away == 0
}

// lost tells whether a member's server is not expected back.
func (e electorate) lost(m member) bool {
	s := e.find(m.server)
	return s == nil || s.away >= e.grace
}

func (e electorate) voters() []member {
	return slices.DeleteFunc(slices.Clone(e.members), func(m member) bool { return m.learner })
}

func (e electorate) learners() []member {
	return slices.DeleteFunc(slices.Clone(e.members), func(m member) bool { return !m.learner })
}

// dropLearner removes a learner that will not become a voter.
func (e electorate) dropLearner() voterStep {
	for _, m := range e.learners() {
		switch {
		case e.lost(m), !e.alive(m) && !m.started:
			return voterStep{kind: remove, member: m.id, why: "the learner's server is lost"}
		case e.missing() <= 0:
			return voterStep{kind: remove, member: m.id, why: "no more voters are needed"}
		}
	}
	return voterStep{}
}

// promotion makes a learner a voter; etcd refuses until it has caught up.
func (e electorate) promotion() voterStep {
	for _, m := range e.learners() {
		if m.started && e.alive(m) {
			return voterStep{kind: promote, member: m.id, why: "it has started"}
		}
	}
	return voterStep{}
}

// standing are the voters that are not lost.
func (e electorate) standing() []member {
	return slices.DeleteFunc(e.voters(), e.lost)
}

// missing is how many more voters there should be.
func (e electorate) missing() int {
	return votersWanted(len(e.servers)) - len(e.standing())
}

// removal removes a voter whose server is not part of the cluster any more, one
// that is one too many, or one that is lost and can be replaced.
func (e electorate) removal() voterStep {
	voters := e.voters()
	slices.SortFunc(voters, e.worstFirst)
	worst := voters[0]
	var why string
	switch {
	case e.find(worst.server) == nil:
		why = "its server was removed"
	case len(voters) > votersWanted(len(e.servers)):
		why = "there are more voters than needed"
	case e.lost(worst) && e.best() != nil:
		why = "its server is lost, and another can replace it"
	default:
		return voterStep{}
	}
	if !e.survives(worst) {
		return voterStep{}
	}
	return voterStep{kind: remove, member: worst.id, why: why}
}

func (e electorate) worstFirst(a, b member) int {
	rank := func(m member) int {
		switch {
		case e.find(m.server) == nil:
			return 0
		case e.lost(m):
			return 1
		case !e.alive(m):
			return 2
		}
		return 3
	}
	return cmp.Or(
		cmp.Compare(rank(a), rank(b)),
		cmp.Compare(e.inZone(b.server), e.inZone(a.server)),
		// The newest server, so that the first one stays.
		cmp.Compare(b.server, a.server),
	)
}

// inZone counts the voters, and those that learn, in a server's zone.
func (e electorate) inZone(server string) int {
	s := e.find(server)
	if s == nil {
		return 0
	}
	n := 0
	for _, m := range e.members {
		if other := e.find(m.server); other != nil && other.zone == s.zone {
			n++
		}
	}
	return n
}

// survives tells whether those that live are a majority without a voter.
func (e electorate) survives(without member) bool {
	alive, all := 0, 0
	for _, m := range e.voters() {
		if m.id == without.id {
			continue
		}
		all++
		if e.alive(m) {
			alive++
		}
	}
	return alive > all/2
}

// maxLearners is how many may learn at once; etcd is told the same.
const maxLearners = 2

// addition adds a learner where a voter is missing.
func (e electorate) addition() voterStep {
	learners := len(e.learners())
	best := e.best()
	// A second voter without a third one to follow would make things worse.
	if best == nil || learners >= min(e.missing(), maxLearners) || !e.helps() {
		return voterStep{}
	}
	return voterStep{
		kind: addLearner, server: best.id,
		why: fmt.Sprintf("%d of %d voters stand", len(e.standing()), votersWanted(len(e.servers))),
	}
}

// best is the server that should vote next: in the zone with the fewest
// voters, and there the oldest. nil if none can.
func (e electorate) best() *elector {
	var best *elector
	for i, s := range e.servers {
		member := slices.ContainsFunc(e.members, func(m member) bool { return m.server == s.id })
		if member || s.away > 0 {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(e.inZone(s.id), e.inZone(best.id)), cmp.Compare(s.id, best.id)) < 0 {
			best = &e.servers[i]
		}
	}
	return best
}

// helps tells whether there are servers enough, alive or voting, to end with
// more voters, an odd number of them.
func (e electorate) helps() bool {
	n := 0
	for _, s := range e.servers {
		stands := slices.ContainsFunc(e.standing(), func(m member) bool { return m.server == s.id })
		if stands || s.away == 0 {
			n++
		}
	}
	return votersWanted(n) > len(e.standing())
}
