package controller

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// Action is a change of the catalog that holds together: all of its records
// change or none.
type Action struct {
	// Why says in one line what changes, for the log.
	Why string
	// Create are new records.
	Create []proto.Message
	// Put and Delete are records at the revision they were planned from.
	Put, Delete []proto.Message
	// ClearStatus is a volume whose status is to be forgotten.
	ClearStatus string
	// ClearUsage is a server whose measurements are to be forgotten.
	ClearUsage string
	// Events are told once the change is made.
	Events []*argonv1.Event
	// OnlyNews: an action that changes nothing and tells its event only if
	// the newest one about the same subject says something else.
	OnlyNews bool
}

// Plan says what the leader should change in the catalog. It is a pure
// function; the records in st are not changed.
//
// seen must have been made of the same state at the same instant. told are the
// servers that this leader has said are lost.
func Plan(st *catalog.State, now time.Time, seen Observation, told map[string]bool) []Action {
	p := &planner{st: scratch(st), now: now, seen: seen, told: told, scrubbing: scrubbing(st)}
	for _, id := range sortedKeys(st.Servers) {
		p.server(st.Servers[id])
	}
	for _, id := range sortedKeys(st.Machines) {
		p.machine(st.Machines[id])
	}
	for _, id := range sortedKeys(st.Checkpoints) {
		p.checkpoint(st.Checkpoints[id])
	}
	for _, id := range sortedKeys(st.Machines) {
		if m := p.st.Machines[id]; m != nil {
			p.schedule(m)
		}
	}
	for _, id := range sortedKeys(st.Volumes) {
		p.volume(st.Volumes[id])
	}
	for _, id := range sortedKeys(st.VolumeStatus) {
		p.status(id)
	}
	for _, id := range sortedKeys(st.Usage) {
		p.usage(id)
	}
	for _, id := range sortedKeys(st.Images) {
		p.image(st.Images[id])
	}
	return p.actions
}

// planner gathers the actions of one plan. Its state shows each of them as
// done already, so that what is placed first is no longer free for the next.
type planner struct {
	st      *catalog.State
	now     time.Time
	seen    Observation
	told    map[string]bool
	actions []Action
	// scrubbing: a volume is being scrubbed; the next one waits for its turn.
	scrubbing bool
}

// scratch copies the state as deep as a plan changes it: records are
// replaced, never written to.
func scratch(st *catalog.State) *catalog.State {
	c := *st
	c.Machines = maps.Clone(st.Machines)
	c.Volumes = maps.Clone(st.Volumes)
	c.Images = maps.Clone(st.Images)
	c.Checkpoints = maps.Clone(st.Checkpoints)
	return &c
}

// sortedKeys lists ids in their order, which is the order of creation: older
// records are placed first.
func sortedKeys[T any](m map[string]T) []string {
	return slices.Sorted(maps.Keys(m))
}

func (p *planner) act(a Action) { p.actions = append(p.actions, a) }

func leaseTime(st *catalog.State) time.Duration {
	return seconds(cmp.Or(st.Cluster.GetSettings().GetLeaseSeconds(), 3))
}

func (p *planner) grace() time.Duration {
	return seconds(cmp.Or(p.st.Cluster.GetSettings().GetReplicaGraceSeconds(), 600))
}

// due reports whether it is time for what is done at an interval and was last
// done at an instant of a record. That instant may be of a clock that was
// wrong: one that lies further ahead than the interval says nothing.
func (p *planner) due(last *timestamppb.Timestamp, every time.Duration) bool {
	passed := p.now.Sub(last.AsTime())
	return passed >= every || -passed > every
}

func seconds(n uint32) time.Duration { return time.Duration(n) * time.Second }

// lost reports whether a server's workloads must be taken over. What is on a
// server that was removed must be, too.
func (p *planner) lost(serverID string) bool {
	_, lost := p.seen.Lost[serverID]
	return lost || p.st.Servers[serverID] == nil
}

// written off: lost for so long that what it keeps is made anew elsewhere.
func (p *planner) writtenOff(serverID string) bool {
	if p.st.Servers[serverID] == nil {
		return true
	}
	since, lost := p.seen.Lost[serverID]
	return lost && p.now.Sub(since) >= p.grace()
}

// usage clears what a server measured that is not part of the cluster any more.
func (p *planner) usage(serverID string) {
	if p.st.Servers[serverID] == nil {
		p.act(Action{Why: "the measurements of a server that was removed are cleared", ClearUsage: serverID})
	}
}

// name is what users call a server.
func (p *planner) name(serverID string) string {
	return cmp.Or(p.st.Servers[serverID].GetMeta().GetName(), serverID)
}

// server tells of servers that went or came back.
func (p *planner) server(s *argonv1.Server) {
	id := s.GetMeta().GetId()
	tell := func(reason, message string, severity argonv1.Severity) {
		p.act(Action{Why: message, OnlyNews: true, Events: []*argonv1.Event{{
			Severity: severity, Kind: "server", SubjectId: id, SubjectName: s.GetMeta().GetName(),
			Reason: reason, Message: message,
		}}})
	}
	switch {
	case p.lost(id) && !p.told[id]:
		tell("server-lost", "server "+p.name(id)+" is lost: its lease has ended", argonv1.Severity_SEVERITY_ERROR)
	case p.told[id] && placement.Alive(p.st, id):
		tell("server-returned", "server "+p.name(id)+" is back", argonv1.Severity_SEVERITY_INFO)
	}
}
