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
)

func (s voterStep) String() string {
	switch s.kind {
	case addLearner:
		return fmt.Sprintf("add %s (%s)", s.server, s.why)
	case promote:
		return fmt.Sprintf("promote %x (%s)", s.member, s.why)
	case remove:
		return fmt.Sprintf("remove %x (%s)", s.member, s.why)
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
// has caught up, and only then, if there are too many, the one it replaces is
// removed. No step is taken after which those that are known to live would be
// no majority.
func planVoters(e electorate) voterStep {
	if s := e.learnerStep(); s.kind != noStep {
		return s
	}
	if s := e.removalStep(); s.kind != noStep {
		return s
	}
	return e.additionStep()
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

// learnerStep goes on with the learner, if there is one: etcd takes no second
// one.
func (e electorate) learnerStep() voterStep {
	for _, m := range e.members {
		if !m.learner {
			continue
		}
		switch {
		case !e.alive(m) && (e.lost(m) || !m.started):
			return voterStep{kind: remove, member: m.id, why: "the learner's server is lost"}
		case !e.replaces():
			return voterStep{kind: remove, member: m.id, why: "no more voters are needed"}
		case m.started && e.alive(m):
			return voterStep{kind: promote, member: m.id, why: "it has started"}
		}
	}
	return voterStep{}
}

// standing are the voters that are not lost.
func (e electorate) standing() []member {
	return slices.DeleteFunc(e.voters(), e.lost)
}

// replaces tells whether one more voter is needed.
func (e electorate) replaces() bool {
	return len(e.standing()) < votersWanted(len(e.servers))
}

// removalStep removes a voter that is one too many: the lost ones first, then
// those that share a zone with most others.
func (e electorate) removalStep() voterStep {
	voters := e.voters()
	gone := slices.IndexFunc(voters, func(m member) bool { return e.find(m.server) == nil })
	if gone < 0 && len(voters) <= votersWanted(len(e.servers)) {
		return voterStep{}
	}
	why := "its server was removed"
	if gone < 0 {
		slices.SortFunc(voters, e.worstFirst)
		gone, why = 0, "there are more voters than needed"
	}
	if !e.survives(voters[gone]) {
		return voterStep{}
	}
	return voterStep{kind: remove, member: voters[gone].id, why: why}
}

func (e electorate) worstFirst(a, b member) int {
	rank := func(m member) int {
		switch {
		case e.lost(m):
			return 0
		case !e.alive(m):
			return 1
		}
		return 2
	}
	return cmp.Or(
		cmp.Compare(rank(a), rank(b)),
		cmp.Compare(e.inZone(b.server), e.inZone(a.server)),
		// The newest server, so that the first one stays.
		cmp.Compare(b.server, a.server),
	)
}

// inZone counts the voters in a server's zone.
func (e electorate) inZone(server string) int {
	s := e.find(server)
	if s == nil {
		return 0
	}
	n := 0
	for _, m := range e.voters() {
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

// additionStep adds a learner where a voter is missing or lost: in the zone
// with the fewest voters, and there the oldest server.
func (e electorate) additionStep() voterStep {
	learning := slices.ContainsFunc(e.members, func(m member) bool { return m.learner })
	if learning || !e.replaces() {
		return voterStep{}
	}
	var best *elector
	for i, s := range e.servers {
		votes := slices.ContainsFunc(e.members, func(m member) bool { return m.server == s.id })
		if votes || s.away > 0 {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(e.inZone(s.id), e.inZone(best.id)), cmp.Compare(s.id, best.id)) < 0 {
			best = &e.servers[i]
		}
	}
	// A second voter without a third one to follow would make things worse.
	if best == nil || !e.helps() {
		return voterStep{}
	}
	return voterStep{kind: addLearner, server: best.id, why: fmt.Sprintf("%d of %d voters stand", len(e.standing()), votersWanted(len(e.servers)))}
}

// helps tells whether there are servers enough, alive or voting, to end with an
// odd number of voters.
func (e electorate) helps() bool {
	n := 0
	for _, s := range e.servers {
		votes := slices.ContainsFunc(e.standing(), func(m member) bool { return m.server == s.id })
		if votes || s.away == 0 {
			n++
		}
	}
	return votersWanted(n) > len(e.standing())
}
