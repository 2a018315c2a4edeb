package cluster

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const testGrace = time.Minute

// an electorate in short: servers a, b, ... with what is wrong with them, and
// members in the same order.
func electorateOf(servers []elector, members ...member) electorate {
	return electorate{servers: servers, members: members, grace: testGrace}
}

func here(ids ...string) []elector {
	var all []elector
	for _, id := range ids {
		all = append(all, elector{id: id})
	}
	return all
}

func away(all []elector, id string, d time.Duration) []elector {
	all = slices.Clone(all)
	for i := range all {
		if all[i].id == id {
			all[i].away = d
		}
	}
	return all
}

func voter(n uint64, server string) member { return member{id: n, server: server, started: true} }

func learner(n uint64, server string, started bool) member {
	return member{id: n, server: server, learner: true, started: started}
}

func TestPlanVoters(t *testing.T) {
	abc := here("a", "b", "c")
	a, b, c := voter(1, "a"), voter(2, "b"), voter(3, "c")
	add := func(s string) voterStep { return voterStep{kind: addLearner, server: s} }
	up := func(m uint64) voterStep { return voterStep{kind: promote, member: m} }
	drop := func(m uint64) voterStep { return voterStep{kind: remove, member: m} }
	none := voterStep{}
	for _, tt := range []struct {
		name string
		e    electorate
		want voterStep
	}{
		{"one server", electorateOf(here("a"), a), none},
		{"two servers: a second voter would only be one more to lose", electorateOf(here("a", "b"), a), none},
		{"a third server: the first learner", electorateOf(abc, a), add("b")},
		{"the second learner, before any vote", electorateOf(abc, a, learner(2, "b", true)), add("c")},
		{"then they vote", electorateOf(abc, a, learner(2, "b", true), learner(3, "c", false)), up(2)},
		{"one that has not started waits", electorateOf(abc, a, b, learner(3, "c", false)), none},
		{"the third votes", electorateOf(abc, a, b, learner(3, "c", true)), up(3)},
		{"three", electorateOf(abc, a, b, c), none},
		{"a third server that is away: no second voter yet", electorateOf(away(abc, "c", time.Second), a), none},
		{"four servers", electorateOf(here("a", "b", "c", "d"), a, b, c), none},
		{"five servers", electorateOf(here("a", "b", "c", "d", "e"), a, b, c), add("d")},
		{"a voter away for a moment", electorateOf(away(here("a", "b", "c", "d"), "b", time.Second), a, b, c), none},
		{"a voter lost, none to replace it", electorateOf(away(abc, "b", testGrace), a, b, c), none},
		{"a voter lost: it goes first", electorateOf(away(here("a", "b", "c", "d"), "b", testGrace), a, b, c), drop(2)},
		{"then the other comes", electorateOf(away(here("a", "b", "c", "d"), "b", testGrace), a, c), add("d")},
		{"two lost of three: those that live are no majority without them", electorateOf(
			away(away(here("a", "b", "c", "d"), "b", testGrace), "c", testGrace), a, b, c), none},
		{"a voter's server was removed", electorateOf(here("a", "b", "d"), a, b, c), drop(3)},
		{"too many: the lost one goes", electorateOf(away(here("a", "b", "c", "d"), "b", testGrace), a, b, c, voter(4, "d")), drop(2)},
		{"too many: the newest goes", electorateOf(here("a", "b", "c", "d"), a, b, c, voter(4, "d")), drop(4)},
		{"a learner lost before it started", electorateOf(away(abc, "b", time.Second), a, learner(2, "b", false)), drop(2)},
		{"a learner that restarts", electorateOf(away(here("a", "b", "c", "d", "e"), "b", time.Second), a, learner(2, "b", true), c, voter(4, "d"), voter(5, "e")), none},
		{"a learner whose server was removed", electorateOf(here("a", "c"), a, learner(2, "b", true)), drop(2)},
		{"a learner that is not needed any more", electorateOf(abc, a, b, c, learner(4, "c", true)), drop(4)},
		{"zones: where no voter is", electorateOf([]elector{{id: "a", zone: "x"}, {id: "b", zone: "x"}, {id: "c", zone: "y"}}, a), add("c")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := planVoters(tt.e)
			got.why = ""
			if got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// Whatever happens to servers, no step ever leaves a majority that does not
// live, and when nothing happens any more the voters become those that there
// should be, in few steps.
func TestPlanVotersProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &votersWorld{t: t, nextID: 1}
		w.e.grace = testGrace
		w.join()
		w.e.members = []member{{id: w.id(), server: "s01", started: true}}
		t.Repeat(map[string]func(*rapid.T){
			"join": func(t *rapid.T) {
				if len(w.e.servers) == 9 {
					t.Skip("enough")
				}
				w.join()
			},
			"away": func(t *rapid.T) {
				w.pick(t).away = time.Duration(rapid.IntRange(1, 2).Draw(t, "how long")) * testGrace / 2
			},
			"return": func(t *rapid.T) { w.pick(t).away = 0 },
			"remove": func(t *rapid.T) {
				id := w.pick(t).id
				w.e.servers = slices.DeleteFunc(w.e.servers, func(s elector) bool { return s.id == id && len(w.e.servers) > 1 })
			},
			"step": func(*rapid.T) { w.step() },
		})
		for i := range w.e.servers {
			w.e.servers[i].away = 0
		}
		for range 40 {
			if !w.step() {
				break
			}
		}
		if w.alive() <= len(w.e.voters())/2 {
			return // a majority was removed by the operator: nothing can go on
		}
		if got, want := len(w.e.voters()), votersWanted(len(w.e.servers)); got != want || len(w.e.learners()) > 0 {
			t.Fatalf("%d servers have %d voters and %d learners, want %d", len(w.e.servers), got, len(w.e.learners()), want)
		}
	})
}

// votersWorld is a cluster in which steps succeed.
type votersWorld struct {
	t      *rapid.T
	e      electorate
	nextID uint64
	joined int
}

func (w *votersWorld) id() uint64 { w.nextID++; return w.nextID }

func (w *votersWorld) join() {
	w.joined++
	w.e.servers = append(w.e.servers, elector{
		id: fmt.Sprintf("s%02d", w.joined), zone: rapid.SampledFrom([]string{"", "x", "y"}).Draw(w.t, "zone"),
	})
}

func (w *votersWorld) pick(t *rapid.T) *elector {
	return &w.e.servers[rapid.IntRange(0, len(w.e.servers)-1).Draw(t, "server")]
}

func (w *votersWorld) alive() int {
	n := 0
	for _, m := range w.e.voters() {
		if w.e.alive(m) {
			n++
		}
	}
	return n
}

func (w *votersWorld) step() bool {
	before := w.alive() > len(w.e.voters())/2
	if !before {
		return false // etcd would not answer
	}
	s := planVoters(w.e)
	switch s.kind {
	case noStep:
		return false
	case addLearner:
		w.e.members = append(w.e.members, member{id: w.id(), server: s.server, learner: true, started: true})
	default:
		i := slices.IndexFunc(w.e.members, func(m member) bool { return m.id == s.member })
		if s.kind == promote {
			w.e.members[i].learner = false
		} else {
			w.e.members = slices.Delete(w.e.members, i, i+1)
		}
	}
	if w.alive() <= len(w.e.voters())/2 {
		w.t.Fatalf("%v left %d of %d voters alive", s, w.alive(), len(w.e.voters()))
	}
	return true
}
