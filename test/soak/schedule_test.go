package soak

import (
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestSchedule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		const during = 10 * time.Minute
		steps := Schedule(seed, 5, during)
		if !reflect.DeepEqual(steps, Schedule(seed, 5, during)) {
			t.Fatal("the same seed makes another schedule")
		}
		for i, s := range steps {
			hit := make(map[int]int)
			for _, other := range steps[:i] {
				if other.At > s.At {
					t.Fatalf("%v comes after %v", other, s)
				}
				if other.At+other.Lasts < s.At {
					continue
				}
				for _, n := range other.Servers {
					hit[n]++
				}
			}
			for _, n := range s.Servers {
				hit[n]++
			}
			for n, times := range hit {
				if times > 1 {
					t.Fatalf("s%d is struck twice at %v", n+1, s.At)
				}
			}
			if len(hit) > 2 && len(hit) != len(s.Servers) {
				t.Fatalf("%d servers are struck at %v", len(hit), s.At)
			}
		}
	})
}

func TestScheduleHasEveryFault(t *testing.T) {
	seen := make(map[Fault]int)
	for _, s := range Schedule(1, 5, 24*time.Hour) {
		seen[s.Fault]++
	}
	for _, w := range weights {
		if seen[w.fault] == 0 {
			t.Errorf("never: %s", w.fault)
		}
	}
}
