package cluster

import (
	"fmt"
	"slices"
)

// This file decides what is done so that the catalog has room: functions on
// values, without effects. Who carries the steps out is in run_upkeep.go.

const (
	// catalogQuota is how large the catalog may become, in bytes.
	catalogQuota = 1 << 30
	// startGain is what a defragmentation must gain that is made when etcd
	// starts, before it serves anybody.
	startGain = 64 << 20
	// defragLimit is how much there may be in the catalog, in bytes, for a voter
	// to defragment while it serves: it answers nobody meanwhile, for a second for
	// each 16 MiB on a slow disk, on which the leases of all servers may depend.
	defragLimit = 8 << 20
)

// hardQuota is where etcd itself takes no writes any more, also none of leases.
// It counts a file, which does not become smaller by itself, and the history
// that is about to be compacted.
func hardQuota(quota int64) int64 { return 2 * quota }

// load is all that the decision rests on.
type load struct {
	quota int64
	// full: the catalog is said to be full. alarm: etcd takes no writes.
	full, alarm bool
	// noRoom: what it lies on is full, and no other voter has it.
	noRoom bool
	// floor is how much was used after the last compaction; 0: none was made.
	floor int64
	// history: there is some to compact. rested: a while has passed since that
	// was done last.
	history, rested bool
	// members are those that were looked at, all of them if complete.
	members  []memberLoad
	complete bool
}

// memberLoad is how large the catalog is at one member of etcd.
type memberLoad struct {
	id uint64
	// size is that of the file, used what of it is not free.
	size, used     int64
	leads, learner bool
}

type upkeepStep struct {
	kind upkeepKind
	// member is the one to defragment, or to give the lead to.
	member uint64
	why    string
}

type upkeepKind uint8

const (
	noUpkeep upkeepKind = iota
	compact
	markFull
	markRoom
	defragment
	handOver
	disarm
)

func (s upkeepStep) String() string {
	return fmt.Sprintf("%s (%s)", [...]string{"nothing", "compact", "take nothing new", "take everything again", "defragment", "hand the lead over", "disarm"}[s.kind], s.why)
}

// planUpkeep names the next step.
//
// History is kept for watches that lag, as long as there is room (etcdHistory),
// and shortened when half of the quota is used. When that does not help, the
// catalog takes nothing new at nine tenths; the last tenth is for removals, leases
// and what is observed. etcd's own limit is twice the quota: it is not met, as
// what grows at most is the file, whose free pages are used first.
func planUpkeep(l load) upkeepStep {
	for _, step := range []func() upkeepStep{l.compaction, l.marking, l.defragmentation, l.disarming} {
		if s := step(); s.kind != noUpkeep {
			return s
		}
	}
	return upkeepStep{}
}

// used is what is not free at the member where that is most.
func (l load) used() int64 {
	var most int64
	for _, m := range l.members {
		most = max(most, m.used)
	}
	return most
}

func (l load) compaction() upkeepStep {
	used := l.used()
	switch {
	case !l.history:
	case (l.full || l.alarm) && l.rested:
		// What was removed is still there as history.
		return upkeepStep{kind: compact, why: "the catalog is full"}
	case used >= l.quota/2 && used-l.floor >= l.quota/16:
		return upkeepStep{kind: compact, why: "more than half of the catalog's quota is used"}
	}
	return upkeepStep{}
}

func (l load) marking() upkeepStep {
	used := l.used()
	switch {
	case l.alarm: // nothing can be written
	case !l.full && l.noRoom:
		return upkeepStep{kind: markFull, why: "the file system of the only voter's directory is full"}
	case !l.full && used >= l.quota/10*9:
		return upkeepStep{kind: markFull, why: "nine tenths of the catalog's quota are used"}
	case l.full && !l.noRoom && used < l.quota/20*17:
		return upkeepStep{kind: markRoom, why: "there is room again"}
	}
	return upkeepStep{}
}

// defragmentation makes a file smaller that is free for the most part, or that
// keeps etcd from taking writes. One after the other, when all are there, and the
// one that leads last, after another leads. Where that takes long, it is left to
// the voter's next start (startGain): free pages do no harm, and are used again.
func (l load) defragmentation() upkeepStep {
	if !l.complete {
		return upkeepStep{}
	}
	var leader, heir *memberLoad
	for _, m := range l.members {
		switch {
		case m.leads:
			leader = &m
			continue
		case l.worth(m, true):
			return upkeepStep{kind: defragment, member: m.id, why: "much of its file is free"}
		case !m.learner:
			heir = &m
		}
	}
	switch {
	case leader == nil || !l.worth(*leader, heir != nil):
		return upkeepStep{}
	case heir != nil:
		return upkeepStep{kind: handOver, member: heir.id, why: "the file of the one that leads is to be defragmented"}
	}
	return upkeepStep{kind: defragment, member: leader.id, why: "much of its file is free"}
}

// worth reports whether a member's file should be defragmented. Where others can
// answer in its place, and nothing can be written, that may take long.
func (l load) worth(m memberLoad, others bool) bool {
	gain := m.size - m.used
	if l.alarm && others && !l.fits(m) {
		return gain >= l.quota/16
	}
	return gain >= l.quota/4 && gain >= m.used && m.used <= defragLimit
}

// fits reports whether a member's file is well below etcd's limit.
func (l load) fits(m memberLoad) bool { return m.size < hardQuota(l.quota)/10*9 }

func (l load) disarming() upkeepStep {
	if !l.alarm || !l.complete || slices.ContainsFunc(l.members, func(m memberLoad) bool { return !l.fits(m) }) {
		return upkeepStep{}
	}
	return upkeepStep{kind: disarm, why: "there is room again"}
}
