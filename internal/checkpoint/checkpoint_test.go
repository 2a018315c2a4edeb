package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/volumetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const id = "01JDHZ8M3V9Q2S4T6W8X0Y1Z2A"

// memory is like a guest's: zeros, text, and what does not get smaller.
func memory(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for off := 0; off < n; off += 4096 {
		page := b[off:min(off+4096, n)]
		switch rng.IntN(3) {
		case 0:
			for i := range page {
				page[i] = byte(rng.Uint32())
			}
		case 1:
			for i := range page {
				page[i] = "the guest's own words "[i%22]
			}
		}
	}
	return b
}

func write(t testing.TB, w io.Writer, data []byte) Totals {
	t.Helper()
	s, err := NewWriter(w, id)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Write(data); err != nil {
		t.Fatal(err)
	}
	totals, err := s.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return totals
}

func read(stream []byte, id string) ([]byte, Totals, error) {
	s, err := NewReader(bytes.NewReader(stream), id)
	if err != nil {
		return nil, Totals{}, err
	}
	defer s.Close()
	data, err := io.ReadAll(s)
	return data, s.Totals(), err
}

func TestRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 511, frameSize - 1, frameSize, frameSize + 1, 5*frameSize + 77} {
		data := memory(uint64(n), n)
		var stream bytes.Buffer
		wrote := write(t, &stream, data)
		got, totals, err := read(stream.Bytes(), id)
		if err != nil || !bytes.Equal(got, data) || totals != wrote || wrote.Raw != uint64(n) {
			t.Errorf("%d bytes: %v, got %d, wrote %+v, read %+v", n, err, len(got), wrote, totals)
		}
		if n > frameSize && stream.Len() > n*9/10 {
			t.Errorf("%d bytes of memory became %d", n, stream.Len())
		}
	}
}

// One byte that is not as it was written is told, with the frame, and nothing
// that was not written is returned: whatever the byte is.
func TestDamage(t *testing.T) {
	data := memory(1, 3*frameSize/2)
	var stream bytes.Buffer
	write(t, &stream, data)
	rapid.Check(t, func(t *rapid.T) {
		bad := bytes.Clone(stream.Bytes())
		at := rapid.IntRange(0, len(bad)-1).Draw(t, "at")
		bad[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "flip"))
		got, _, err := read(bad, id)
		if err == nil || !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
			t.Fatalf("byte %d: %v", at, err)
		}
		if !bytes.HasPrefix(data, got) {
			t.Fatalf("byte %d: what was never written was read", at)
		}
	})
}

// frames cuts a stream into its header, its frames and its trailer.
func frames(stream []byte) [][]byte {
	parts := [][]byte{stream[:headerSize]}
	for rest := stream[headerSize:]; ; {
		if string(rest[:4]) == trailerMagic {
			return append(parts, rest)
		}
		h, err := parseHead(rest, uint32(len(parts)-1), frameSize)
		if err != nil {
			panic(err)
		}
		parts, rest = append(parts, rest[:headSize+h.stored]), rest[headSize+h.stored:]
	}
}

func TestStreamsThatAreNotWhole(t *testing.T) {
	var one, other bytes.Buffer
	write(t, &one, memory(1, 3*frameSize))
	write(t, &other, memory(2, 3*frameSize))
	a, b := frames(one.Bytes()), frames(other.Bytes())
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for name, c := range map[string]struct {
		stream []byte
		id     string
		says   string
	}{
		"nothing":              {nil, id, "header"},
		"zeros":                {make([]byte, 1<<20), id, "header"},
		"of another":           {one.Bytes(), "01JDHZ8M3V9Q2S4T6W8X0Y1Z2B", "is of checkpoint"},
		"never finished":       {join(a[0], a[1], a[2], make([]byte, 4096)), id, "frame 2"},
		"cut off in a frame":   {one.Bytes()[:headerSize+len(a[1])+100], id, "frame 1"},
		"cut off at the end":   {one.Bytes()[:one.Len()-1], id, "frame 3"},
		"frames swapped":       {join(a[0], a[1], a[3], a[2], a[4]), id, "frame 1"},
		"a frame left out":     {join(a[0], a[1], a[2], a[4]), id, "trailer"},
		"a frame of another":   {join(a[0], a[1], b[2], a[3], a[4]), id, "trailer"},
		"the trailer's too":    {join(a[0], a[1], a[2], a[3], b[4]), id, "trailer"},
		"a frame that is long": {join(a[0], []byte("FRAM\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00")), id, "frame 0"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := read(c.stream, c.id)
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, which does not say %q", err, c.says)
			}
		})
	}
}

func TestNewerVersion(t *testing.T) {
	var stream bytes.Buffer
	write(t, &stream, nil)
	stream.Bytes()[8] = 2
	seal(stream.Bytes()[:headerSize])
	if _, _, err := read(stream.Bytes(), id); !errors.Is(err, ErrVersion) {
		t.Error(err)
	}
}

// failing takes so many bytes.
type failing struct{ left int }

var errBroken = errors.New("broken")

func (f *failing) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, errBroken
	}
	return len(p), nil
}

func TestWriterFails(t *testing.T) {
	data := memory(1, 4*frameSize)
	for _, room := range []int{0, headerSize, headerSize + 100, frameSize} {
		s, err := NewWriter(&failing{room}, id)
		if err == nil {
			_, err = s.Write(data)
			_, end := s.Finish()
			err = errors.Join(err, end)
			s.Close()
		}
		if !errors.Is(err, errBroken) {
			t.Errorf("with room for %d: %v", room, err)
		}
	}
}

func TestOnDevice(t *testing.T) {
	dev := volumetest.New(32<<20, 1)
	defer dev.Close()
	data := memory(3, 11*frameSize+123)
	sink := NewSink(t.Context(), dev)
	write(t, sink, data)
	if err := sink.Flush(); err != nil {
		t.Fatal(err)
	}
	dev.PowerCut()
	s, err := NewReader(NewSource(t.Context(), dev), id)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got, err := io.ReadAll(s)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%v, %d bytes", err, len(got))
	}
}

func TestDeviceTooSmall(t *testing.T) {
	dev := volumetest.New(1<<20, 1)
	defer dev.Close()
	sink := NewSink(t.Context(), dev)
	_, err := sink.Write(make([]byte, 2<<20))
	if err = errors.Join(err, sink.Flush()); !errors.Is(err, volume.ErrNoSpace) {
		t.Error(err)
	}
}

// waiting is a device that never answers.
type waiting struct{}

func (waiting) Size() int64            { return 1 << 30 }
func (waiting) Submit(*volume.Request) {}

func TestDeviceThatWaits(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	sink := NewSink(ctx, waiting{})
	go cancel()
	_, err := sink.Write(make([]byte, 20<<20))
	if !errors.Is(err, context.Canceled) || !errors.Is(sink.Flush(), context.Canceled) {
		t.Error(err)
	}
	if _, err := NewSource(ctx, waiting{}).Read(make([]byte, 1)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// FuzzRead: whatever lies on the volume, what is read is what was written or an
// error.
func FuzzRead(f *testing.F) {
	var stream bytes.Buffer
	write(f, &stream, memory(1, 10000))
	f.Add(stream.Bytes())
	f.Add([]byte{})
	f.Add(stream.Bytes()[:headerSize])
	f.Fuzz(func(t *testing.T, b []byte) {
		data, totals, err := read(b, id)
		if err != nil {
			return
		}
		var again bytes.Buffer
		write(t, &again, data)
		if got, _, err := read(again.Bytes(), id); err != nil || !bytes.Equal(got, data) || totals.Raw != uint64(len(data)) {
			t.Errorf("%v: %d bytes, then %d, of %+v", err, len(data), len(got), totals)
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	data := memory(1, 64<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		write(b, io.Discard, data)
	}
}
