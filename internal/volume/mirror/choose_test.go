package mirror

import (
	"errors"
	"slices"
	"testing"
)

func TestChoose(t *testing.T) {
	up := func(inc uint64, h Health) answer { return answer{up: true, info: Info{Incarnation: inc, Health: h}} }
	near := func(a answer) answer { a.near = true; return a }
	set := []Member{{ID: 1, Incarnation: 5}, {ID: 2, Incarnation: 7}}
	tests := []struct {
		name    string
		set     []Member
		answers map[uint32]answer
		clean   bool
		patient bool
		keep    []Member
		afresh  bool
		wait    bool
		err     error
	}{
		{name: "nobody answers", set: set, patient: true, wait: true},
		{name: "nobody answers for long", set: set, wait: true},
		{
			name: "all equal after a clean end", set: set, clean: true, patient: true,
			answers: map[uint32]answer{1: up(5, Good), 2: up(7, Good)},
			keep:    []Member{{1, 5}, {2, 7}},
		},
		{
			name: "one source after a crash, the near one", set: set, patient: true,
			answers: map[uint32]answer{1: up(5, Good), 2: near(up(7, Good))},
			keep:    []Member{{2, 7}},
		},
		{
			name: "a second one may still come", set: set, patient: true,
			answers: map[uint32]answer{1: up(5, Good)}, wait: true,
		},
		{
			name: "patience is over", set: set,
			answers: map[uint32]answer{1: up(5, Good)},
			keep:    []Member{{1, 5}},
		},
		{
			name: "its server is known to be gone", set: set, patient: true,
			answers: map[uint32]answer{1: up(5, Good), 2: {gone: true}},
			keep:    []Member{{1, 5}},
		},
		{
			name: "I7: a restarted one is no source while the other may have more", set: set,
			answers: map[uint32]answer{1: up(6, Good)}, wait: true,
		},
		{
			name: "I7: nor when the other is known to be gone", set: set,
			answers: map[uint32]answer{1: up(6, Good), 2: {gone: true}}, wait: true,
		},
		{
			name: "I7: the one that stayed up is the source", set: set, patient: true,
			answers: map[uint32]answer{1: up(6, Good), 2: up(7, Good)},
			keep:    []Member{{2, 7}},
		},
		{
			name: "all lost power: one of them, since they may differ", set: set, patient: true,
			answers: map[uint32]answer{1: up(6, Good), 2: up(8, Good)},
			keep:    []Member{{1, 6}}, afresh: true,
		},
		{
			name: "all lost power after a clean end: nothing is lost", set: set, clean: true, patient: true,
			answers: map[uint32]answer{1: up(6, Good), 2: up(8, Good)},
			keep:    []Member{{1, 6}, {2, 8}},
		},
		{
			name: "I8: a failed one is no source", set: set, patient: true,
			answers: map[uint32]answer{1: up(5, Failed), 2: up(7, Good)},
			keep:    []Member{{2, 7}},
		},
		{
			name: "I8: one failed, the other restarted: an operator decides", set: set,
			answers: map[uint32]answer{1: up(5, Failed), 2: up(8, Good)}, err: ErrReplicasLost,
		},
		{
			name: "I2: a replica outside the set is no source", set: set[:1],
			answers: map[uint32]answer{2: up(7, Good)}, wait: true,
		},
		{
			name: "I5: one that was being copied to is no source", set: set, patient: true,
			answers: map[uint32]answer{1: up(5, Syncing), 2: up(7, Good)},
			keep:    []Member{{2, 7}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := choose(tt.set, tt.answers, tt.clean, tt.patient)
			if got.wait != tt.wait || got.afresh != tt.afresh || !errors.Is(got.err, tt.err) || !slices.Equal(got.keep, tt.keep) {
				t.Errorf("choose = %+v, want keep %v, wait %v, error %v", got, tt.keep, tt.wait, tt.err)
			}
		})
	}
}
