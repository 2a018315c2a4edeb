package mirror

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
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

// scrubbed has a volume of 2 GiB scrubbed, whose replica has data in so many
// regions, and says which ranges it compares, and how long its pace makes it wait.
func scrubbed(t *testing.T, regions int) (compared [][2]int64, took time.Duration) {
	t.Helper()
	v := aVolume(inSyncState)
	v.SizeBytes = 2 << 30
	c := aCore(t, v)
	v = proto.CloneOf(v)
	v.Scrub = &argonv1.Scrub{Wanted: 1}
	effects := c.RecordChanged(0, v)
	for {
		list, lists := sent(effects, VerbChanged)
		sums, sum := sent(effects, VerbSums)
		switch _, ends := sent(effects, VerbFlush); {
		case ends:
			return compared, took
		case lists:
			for g := range min(regions, int(list.Len/c.cfg.Grain)) {
				set(list.Data, int64(g))
			}
			effects = c.Reply(took, 1, 1, list.ID, Done, Info{}, nil)
		case sum:
			compared = append(compared, [2]int64{sums.Off, sums.Off + sums.Len})
			copy(sums.Data, wire.AppendSums(nil, slices.Repeat([]wire.Sum{{State: wire.SumNew}}, int(sums.Len/c.cfg.Grain))))
			effects = c.Reply(took, 1, 1, sums.ID, Done, Info{}, nil)
		case took > time.Hour:
			t.Fatal("it does not go on")
		default:
			took += tick
			effects = c.Tick(took)
		}
	}
}

// What nobody has data of needs no reading, and so no pace; it is compared all the
// same: a replica may have lost what it had there.
func TestScrubOfHolesIsNotPaced(t *testing.T) {
	for _, regions := range []int{0, 100, 2048} {
		compared, took := scrubbed(t, regions)
		at := int64(0)
		for _, r := range compared {
			if r[0] != at {
				t.Errorf("with data in %d regions: %d follows %d", regions, r[0], at)
			}
			at = r[1]
		}
		if at != 2<<30 {
			t.Errorf("with data in %d regions it ends at %d", regions, at)
		}
		pace := time.Duration(regions) << 20 * time.Second / time.Duration(DefaultConfig().ScrubPace)
		if took < pace-time.Second || took > pace+time.Second {
			t.Errorf("with data in %d regions it takes %s, its pace is %s", regions, took, pace)
		}
	}
}
