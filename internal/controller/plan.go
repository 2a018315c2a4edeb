package controller

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

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
func Plan(st *catalog.State, now time.Time, seen Absences) []Action {
	p := &planner{st: scratch(st), now: now, seen: seen, scrubbing: scrubbing(st)}
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
	seen    Absences
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

// Absences says since when this leader has known each server to be lost. A
// new leader starts counting anew, so a change of leader can only make a
// replica wait longer.
type Absences struct {
	// Since holds the servers that are lost now.
	Since map[string]time.Time
	// Returned lists those that are back since the last observation.
	Returned []string
}

// Observe compares with the servers' leases of now.
func (a Absences) Observe(st *catalog.State, now time.Time) Absences {
	next := Absences{Since: map[string]time.Time{}}
	for id := range st.Servers {
		since, known := a.Since[id]
		switch gone := lost(st, id, now); {
		case gone && known:
			next.Since[id] = since
		case gone:
			next.Since[id] = now
		case known && placement.Alive(st, id):
			next.Returned = append(next.Returned, id)
		}
	}
	slices.Sort(next.Returned)
	return next
}

// lost tells whether a server's workloads must be taken over: its lease has
// ended, which etcd declares a full lease time after the last renewal, so the
// server has stopped its guests by then (guard).
//
// Nobody is lost while every lease is young: then the whole cluster has just
// come back, from a power cut or a lost majority, and the others get the time
// of two leases to arrive before their machines are moved. The same time is
// given to a server that has just joined.
func lost(st *catalog.State, serverID string, now time.Time) bool {
	s := st.Servers[serverID]
	if s == nil {
		return true
	}
	if placement.Alive(st, serverID) || young(s.GetMeta().GetCreated().AsTime(), st, now) {
		return false
	}
	for _, l := range st.Leases {
		if !young(l.GetSince().AsTime(), st, now) {
			return true
		}
	}
	return false
}

func young(t time.Time, st *catalog.State, now time.Time) bool {
	return now.Sub(t) < 2*leaseTime(st)
}

func leaseTime(st *catalog.State) time.Duration {
	return seconds(cmp.Or(st.Cluster.GetSettings().GetLeaseSeconds(), 3))
}

func (p *planner) grace() time.Duration {
	return seconds(cmp.Or(p.st.Cluster.GetSettings().GetReplicaGraceSeconds(), 600))
}

func seconds(n uint32) time.Duration { return time.Duration(n) * time.Second }

func (p *planner) lost(serverID string) bool { return lost(p.st, serverID, p.now) }

// written off: lost for so long that what it keeps is made anew elsewhere.
func (p *planner) writtenOff(serverID string) bool {
	if p.st.Servers[serverID] == nil {
		return true
	}
	since, absent := p.seen.Since[serverID]
	return absent && p.lost(serverID) && p.now.Sub(since) >= p.grace()
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
	case p.seen.Since[id].Equal(p.now) && p.lost(id):
		tell("server-lost", "server "+p.name(id)+" is lost: its lease has ended", argonv1.Severity_SEVERITY_ERROR)
	case slices.Contains(p.seen.Returned, id):
		tell("server-returned", "server "+p.name(id)+" is back", argonv1.Severity_SEVERITY_INFO)
	}
}
