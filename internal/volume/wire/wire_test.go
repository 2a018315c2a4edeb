package wire

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/argon-cluster/argon/internal/volume"
)

func TestHeaderRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := Header{
			Type:       Type(rapid.IntRange(int(Read), int(lastType)).Draw(t, "type")),
			FUA:        rapid.Bool().Draw(t, "fua"),
			Status:     Status(rapid.IntRange(0, int(lastStatus)).Draw(t, "status")),
			ID:         rapid.Uint64().Draw(t, "id"),
			Off:        rapid.Int64Min(0).Draw(t, "off"),
			Len:        rapid.Int64Min(0).Draw(t, "len"),
			Generation: rapid.Uint64().Draw(t, "generation"),
			Payload:    rapid.Uint32Max(volume.MaxRequest).Draw(t, "payload"),
		}
		b := make([]byte, HeaderSize)
		h.Put(b)
		got, err := ReadHeader(bytes.NewReader(b), make([]byte, HeaderSize))
		if err != nil || got != h {
			t.Fatalf("%+v came back as %+v, %v", h, got, err)
		}
		// Any flipped bit is noticed.
		b[rapid.IntRange(0, HeaderSize-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if _, err := ParseHeader(b); !errors.Is(err, ErrFrame) {
			t.Fatalf("a flipped bit went unnoticed: %v", err)
		}
	})
}

// docs/volumes.md says where each field is, and what the numbers of types and
// statuses are; so does this.
func TestHeaderOffsets(t *testing.T) {
	b := make([]byte, HeaderSize)
	Header{Type: Mend, FUA: true, Status: Damaged, ID: 0x11, Off: 0x22, Len: 0x33, Generation: 0x44, Payload: 0x55}.Put(b)
	if string(b[:8]) != "ARR1\x16\x01\x08\x00" {
		t.Errorf("begins with %x", b[:8])
	}
	for off, want := range map[int]byte{8: 0x11, 16: 0x22, 24: 0x33, 32: 0x44, 40: 0x55} {
		if b[off] != want {
			t.Errorf("at %d: %#x, want %#x", off, b[off], want)
		}
	}
	g := Greeting{ClusterID: "cc", VolumeID: "v", ReplicaID: 2, Epoch: 3}.Marshal()
	if want := "\x02cc\x01v\x02\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"; string(g) != want {
		t.Errorf("a greeting is %x, want %x", g, want)
	}
	if types := []Type{Read, BeginSync, Close, Changed, Resize, Sums, SnapshotSums}; !slices.Equal(types, []Type{2, 7, 10, 11, 17, 18, 20}) {
		t.Errorf("types have other numbers: %v", types)
	}
}

func TestHeaderLimits(t *testing.T) {
	for _, h := range []Header{
		{Type: Write, Payload: volume.MaxRequest + 1},
		{Type: Hello, Payload: MaxHello + 1},
		{Type: lastType + 1},
		{Type: 0},
		{Type: Read, Status: lastStatus + 1},
		{Type: Read, Off: -512},
		{Type: Read, Len: -1},
	} {
		b := make([]byte, HeaderSize)
		h.Put(b)
		if _, err := ParseHeader(b); !errors.Is(err, ErrFrame) {
			t.Errorf("%+v was taken: %v", h, err)
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	b := make([]byte, HeaderSize)
	Header{Type: Write, ID: 7, Off: 512, Len: 512, Payload: 512}.Put(b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		again := make([]byte, HeaderSize)
		h.Put(again)
		if !bytes.Equal(again, b[:HeaderSize]) {
			t.Errorf("%x was read as %+v, which is written as %x", b[:HeaderSize], h, again)
		}
	})
}

func FuzzParseGreeting(f *testing.F) {
	f.Add(Greeting{ClusterID: "c", VolumeID: "v", ReplicaID: 1, Epoch: 2}.Marshal())
	f.Add([]byte{200, 'x'})
	f.Add(Greeting{ClusterID: strings.Repeat("c", 255), VolumeID: strings.Repeat("v", 300)}.Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := ParseGreeting(b)
		if err == nil && !bytes.Equal(g.Marshal(), b) {
			t.Errorf("%x was read as %+v", b, g)
		}
	})
}

func FuzzParseInfo(f *testing.F) {
	f.Add(Info{Incarnation: 3, Health: 1}.Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := ParseInfo(b)
		if err == nil && !bytes.Equal(i.Marshal(), b) {
			t.Errorf("%x was read as %+v", b, i)
		}
	})
}

func FuzzParseSums(f *testing.F) {
	f.Add(AppendSums(nil, []Sum{{State: SumNew, Sum: [16]byte{1, 2}}, {State: SumDiffers}}))
	f.Add([]byte{0})
	f.Fuzz(func(t *testing.T, b []byte) {
		sums, err := ParseSums(b)
		if err == nil && !bytes.Equal(AppendSums(nil, sums), b) {
			t.Errorf("%x was read as %+v", b, sums)
		}
	})
}

func FuzzParseID(f *testing.F) {
	f.Add(MarshalID(77))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := ParseID(b)
		if err == nil && !bytes.Equal(MarshalID(id), b) {
			t.Errorf("%x was read as %d", b, id)
		}
	})
}

// A part of a grain has a sum of its own.
func TestSumBytes(t *testing.T) {
	for n, want := range map[int64]int64{0: 0, 1: SumSize, ChangedGrain: SumSize, ChangedGrain + 1: 2 * SumSize} {
		if got := SumBytes(n); got != want {
			t.Errorf("%d bytes of sums for %d, want %d", got, n, want)
		}
	}
}
