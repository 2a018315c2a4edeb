package mirror

import (
	"slices"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/wire"
)

// Only a record of earlier tells which copy is good, and nothing is guessed.
func TestVerdict(t *testing.T) {
	sum := func(state uint8, x byte) wire.Sum { return wire.Sum{State: state, Sum: [16]byte{x}} }
	const (
		fresh   = wire.SumNew
		same    = wire.SumSame
		differs = wire.SumDiffers
	)
	for _, tt := range []struct {
		name      string
		sums      map[uint32]wire.Sum
		want      finding
		good, bad []uint32
	}{
		{name: "nobody is there", sums: nil, want: equal},
		{name: "first time", sums: map[uint32]wire.Sum{1: sum(fresh, 1), 2: sum(fresh, 1)}, want: equal},
		{name: "as ever", sums: map[uint32]wire.Sum{1: sum(same, 1), 2: sum(same, 1)}, want: equal},
		{name: "one changed by itself", sums: map[uint32]wire.Sum{1: sum(same, 1), 2: sum(differs, 2)}, want: repairable, good: []uint32{1}, bad: []uint32{2}},
		{name: "one changed before it had a record", sums: map[uint32]wire.Sum{1: sum(same, 1), 2: sum(fresh, 2), 3: sum(same, 1)}, want: repairable, good: []uint32{1, 3}, bad: []uint32{2}},
		{name: "good without a record of its own", sums: map[uint32]wire.Sum{1: sum(same, 1), 2: sum(fresh, 1), 3: sum(differs, 3)}, want: repairable, good: []uint32{1, 2}, bad: []uint32{3}},
		{name: "nobody has a record", sums: map[uint32]wire.Sum{1: sum(fresh, 1), 2: sum(fresh, 2)}, want: unclear},
		{name: "a majority is no proof", sums: map[uint32]wire.Sum{1: sum(fresh, 1), 2: sum(fresh, 2), 3: sum(fresh, 1)}, want: unclear},
		{name: "both are as they were recorded, and differ", sums: map[uint32]wire.Sum{1: sum(same, 1), 2: sum(same, 2)}, want: unclear},
		{name: "both changed by themselves", sums: map[uint32]wire.Sum{1: sum(differs, 1), 2: sum(differs, 2)}, want: unclear},
		{name: "the only copy changed by itself", sums: map[uint32]wire.Sum{1: sum(differs, 1)}, want: unclear},
		{name: "the only copy", sums: map[uint32]wire.Sum{1: sum(fresh, 1)}, want: equal},
		{name: "the record is what changed", sums: map[uint32]wire.Sum{1: sum(same, 1), 2: sum(differs, 1)}, want: equal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			good, bad, f := verdict(tt.sums)
			if f != tt.want || !slices.Equal(good, tt.good) || !slices.Equal(bad, tt.bad) {
				t.Errorf("verdict = %v, %v, %v, want %v, %v, %v", good, bad, f, tt.good, tt.bad, tt.want)
			}
		})
	}
}
