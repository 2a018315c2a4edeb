package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// memory is a snapshot, and the stamps of its regions.
type memory struct {
	data   []byte
	stamps []uint64
}

func newMemory(size int64) *memory {
	return &memory{make([]byte, size), make([]uint64, (size+MaxData-1)/MaxData)}
}

func (m *memory) write(off int64, p []byte, generation uint64) {
	copy(m.data[off:], p)
	for i := off / MaxData; i <= (off+int64(len(p))-1)/MaxData; i++ {
		m.stamps[i] = generation
	}
}

func (m *memory) ReadAt(p []byte, off int64) error { copy(p, m.data[off:]); return nil }

func (m *memory) Changed(since uint64, off, n, grain int64, bits []byte) error {
	for at := off; at < off+n; at += grain {
		if s := m.stamps[at/MaxData]; s != 0 && s >= since {
			bits[(at-off)/grain/8] |= 1 << ((at - off) / grain % 8)
		}
	}
	return nil
}

func header(size int64) Header {
	return Header{
		ClusterID: "C", VolumeID: "V", VolumeName: "db", Size: size, Taken: 12345,
		Snapshot: Point{3, 30, "tuesday"},
	}
}

// sendTo makes a stream.
func sendTo(t failer, h Header, m *memory) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, h)
	if err != nil {
		t.Fatal(err)
	}
	last := int64(0)
	err = Walk(context.Background(), m, h.Size, h.Base.Generation, w, func(done int64) {
		if done < last || done > h.Size {
			t.Fatalf("progress from %d to %d of %d", last, done, h.Size)
		}
		last = done
	})
	if err := errors.Join(err, w.Close()); err != nil || last != h.Size {
		t.Fatalf("%v, %d done of %d", err, last, h.Size)
	}
	return b.Bytes()
}

// apply makes of a base what a stream says.
func apply(base []byte, b []byte) (Header, []byte, error) {
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return Header{}, nil, err
	}
	data := append(slices.Clone(base), make([]byte, max(0, r.Header().Size-int64(len(base))))...)
	for {
		rec, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			return r.Header(), data, nil
		case err != nil:
			return Header{}, nil, err
		case rec.Data == nil:
			clear(data[rec.Off : rec.Off+rec.Len])
		default:
			copy(data[rec.Off:], rec.Data)
		}
	}
}

// drawWrites writes here and there, often zeros.
func drawWrites(t *rapid.T, m *memory, generation uint64) {
	for range rapid.IntRange(0, 6).Draw(t, "writes") {
		off := rapid.Int64Range(0, int64(len(m.data))/512-1).Draw(t, "off") * 512
		n := min(rapid.Int64Range(1, 600).Draw(t, "sectors")*512, int64(len(m.data))-off)
		p := bytes.Repeat([]byte{rapid.SampledFrom([]byte{0, 1, 'x'}).Draw(t, "byte")}, int(n))
		m.write(off, p, generation)
	}
}

// Whatever was written, a whole stream and the difference after it make the
// same of an empty volume.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(1, 7000).Draw(t, "sectors") * 512
		m := newMemory(size)
		drawWrites(t, m, 10)
		whole := header(size)
		whole.Snapshot = Point{2, 20, "monday"}
		h, first, err := apply(nil, sendTo(t, whole, m))
		if err != nil || h != whole || !bytes.Equal(first, m.data) {
			t.Fatalf("whole: %v, %v; equal: %v", h, err, bytes.Equal(first, m.data))
		}
		grown := size + rapid.Int64Range(0, 3000).Draw(t, "more")*512
		later := newMemory(grown)
		copy(later.data, m.data)
		copy(later.stamps, m.stamps)
		drawWrites(t, later, 25)
		diff := header(grown)
		diff.Base = whole.Snapshot
		b := sendTo(t, diff, later)
		h, second, err := apply(first, b)
		if err != nil || h != diff || !bytes.Equal(second, later.data) {
			t.Fatalf("difference: %v, %v; equal: %v", h, err, bytes.Equal(second, later.data))
		}
		if got, err := Verify(bytes.NewReader(b)); err != nil || got != diff {
			t.Fatalf("verify: %v, %v", got, err)
		}
	})
}

// failer is a test, a fuzz test or a property.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// A stream that is changed in any way is refused, wherever the change is.
// docs/volumes.md says where each field is; so does this.
func TestOffsets(t *testing.T) {
	h := header(2 * MaxData)
	h.Base = Point{2, 20, "monday"}
	var b bytes.Buffer
	w, err := NewWriter(&b, h)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Zeros(512, 1024), w.Close()); err != nil {
		t.Fatal(err)
	}
	got, le := b.Bytes(), binary.LittleEndian
	for off, want := range map[int]string{0: "ARGONST1", 16: "C", 48: "V", 80: "db", 176: "tuesday", 240: "monday", 316: "\x02", 316 + 32: "\x03"} {
		if !strings.HasPrefix(string(got[off:]), want) {
			t.Errorf("at %d: %q, want %q", off, got[off:off+8], want)
		}
	}
	for off, want := range map[int]uint64{8: 316, 144: 2 * MaxData, 152: 2<<32 | 3, 160: 30, 168: 20, 304: 12345, 324: 512, 332: 1024, 348 + 4: 32 | (2*MaxData)<<32, 348 + 16: 1} {
		if have := le.Uint64(got[off:]); have != want {
			t.Errorf("at %d: %#x, want %#x", off, have, want)
		}
	}
	if len(got) != 316+32+32+32 {
		t.Errorf("%d bytes in all", len(got))
	}
}

func TestDamage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := header(3 << 20)
		h.Base = Point{2, 20, "monday"}
		m := newMemory(h.Size)
		m.write(0, bytes.Repeat([]byte{7}, 130<<10), 21)
		m.write(2<<20, bytes.Repeat([]byte{9}, 512), 22)
		b := sendTo(t, h, m)
		at := rapid.IntRange(0, len(b)-1).Draw(t, "at")
		bad := slices.Clone(b)
		switch rapid.SampledFrom([]string{"flip", "cut", "drop", "repeat", "more"}).Draw(t, "how") {
		case "flip":
			bad[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
		case "cut":
			bad = bad[:at]
		case "drop":
			bad = slices.Delete(bad, at, min(at+rapid.IntRange(1, 70<<10).Draw(t, "n"), len(b)))
		case "repeat":
			bad = slices.Insert(bad, at, b[at:min(at+rapid.IntRange(1, 70<<10).Draw(t, "n"), len(b))]...)
		case "more":
			bad = append(bad, b[:at+1]...)
		}
		if bytes.Equal(bad, b) {
			t.Skip()
		}
		if _, err := Verify(bytes.NewReader(bad)); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrUnknown) {
			t.Fatalf("a damaged stream was taken for whole: %v", err)
		}
	})
}

// split finds the records of a stream.
func split(b []byte) (parts [][]byte) {
	parts, b = append(parts, b[:headerSize]), b[headerSize:]
	for len(b) > 0 {
		n := headSize + int(uint32(b[4])|uint32(b[5])<<8|uint32(b[6])<<16|uint32(b[7])<<24)
		parts, b = append(parts, b[:n]), b[n:]
	}
	return parts
}

// Records that are whole themselves, but of another stream, another place, or
// missing, are noticed, too.
func TestRecordsBelongTogether(t *testing.T) {
	h := header(4 << 20)
	m := newMemory(h.Size)
	for i := range int64(4) {
		m.write(i<<20, []byte{byte(i + 1)}, 5)
	}
	b := sendTo(t, h, m)
	parts := split(b)
	if len(parts) != 6 {
		t.Fatalf("%d parts", len(parts))
	}
	m.write(1<<20, []byte{99}, 5)
	other := split(sendTo(t, h, m))
	for name, p := range map[string][][]byte{
		"two exchanged":    {parts[0], parts[2], parts[1], parts[3], parts[4], parts[5]},
		"one missing":      {parts[0], parts[1], parts[3], parts[4], parts[5]},
		"one twice":        {parts[0], parts[1], parts[1], parts[2], parts[3], parts[4], parts[5]},
		"one of another":   {parts[0], parts[1], other[2], parts[3], parts[4], parts[5]},
		"no end":           parts[:5],
		"only a header":    parts[:1],
		"nothing":          nil,
		"two streams":      append(slices.Clone(parts), parts...),
		"end right away":   {parts[0], parts[5]},
		"end of another":   {parts[0], parts[1], parts[2], parts[3], parts[4], other[5]},
		"header of others": {split(sendTo(t, func() Header { o := h; o.VolumeName = "other"; return o }(), m))[0], parts[1], parts[2], parts[3], parts[4], parts[5]},
	} {
		if _, err := Verify(bytes.NewReader(slices.Concat(p...))); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Verify(bytes.NewReader(slices.Concat(parts...))); err != nil {
		t.Errorf("put together again: %v", err)
	}
}

// broken fails in the middle.
type broken struct{ io.Reader }

func (b broken) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = errors.New("the line is dead")
	}
	return n, err
}

func TestWhoBringsItIsNotTheStream(t *testing.T) {
	h := header(1 << 20)
	b := sendTo(t, h, newMemory(h.Size))
	if _, err := Verify(broken{bytes.NewReader(b[:len(b)-1])}); errors.Is(err, ErrDamaged) || err == nil || !strings.Contains(err.Error(), "line is dead") {
		t.Errorf("got %v", err)
	}
}

func TestLaterVersions(t *testing.T) {
	h := header(1 << 20)
	b := h.marshal()
	b[12] = 1 // encrypted, say
	b = append(b[:len(b)-4], 1, 2, 3, 4)
	if _, err := NewReader(bytes.NewReader(b)); !errors.Is(err, ErrDamaged) {
		t.Errorf("a flag without its checksum: %v", err)
	}
	if _, err := NewReader(bytes.NewReader(withSum(b[:len(b)-4]))); !errors.Is(err, ErrUnknown) {
		t.Errorf("a flag: %v", err)
	}
	longer := h.marshal()
	longer = append(longer[:len(longer)-4], "something new"...)
	longer[8] = byte(len(longer) + 4)
	longer[9] = byte((len(longer) + 4) >> 8)
	r, err := NewReader(bytes.NewReader(withSum(longer)))
	if err != nil || r.Header() != h {
		t.Errorf("a longer header: %v", err)
	}
}

func TestWriterRefusesNonsense(t *testing.T) {
	for name, h := range map[string]Header{
		"no size":       {VolumeID: "V", Snapshot: Point{ID: 1}},
		"half a sector": {VolumeID: "V", Snapshot: Point{ID: 1}, Size: 100},
		"no snapshot":   {VolumeID: "V", Size: 512},
		"long name":     {VolumeID: "V", Snapshot: Point{ID: 1, Name: strings.Repeat("x", 65)}, Size: 512},
		"wrong order":   {VolumeID: "V", Snapshot: Point{ID: 1}, Base: Point{ID: 1}, Size: 512},
		"base of none":  {VolumeID: "V", Snapshot: Point{ID: 1, Generation: 1}, Base: Point{Generation: 1}, Size: 512},
	} {
		if _, err := NewWriter(io.Discard, h); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	for name, off := range map[string][]int64{"out of order": {512, 0}, "twice": {0, 0}, "outside": {4096}, "odd": {7}} {
		w, err := NewWriter(io.Discard, header(4096))
		for _, o := range off {
			err = errors.Join(err, w.Data(o, make([]byte, 512)))
		}
		if err == nil || w.Close() == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// FuzzReader: no bytes make a reader fail otherwise than by an error, or hand
// out what does not fit the volume; what it accepts is written the same again.
func FuzzReader(f *testing.F) {
	for _, base := range []Point{{}, {1, 1, "x"}} {
		h := header(4096)
		h.Base = base
		m := newMemory(h.Size)
		m.write(512, []byte("hello"), 5)
		f.Add(sendTo(f, h, m))
	}
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := NewReader(bytes.NewReader(b))
		if err != nil {
			return
		}
		var again bytes.Buffer
		w, err := NewWriter(&again, r.Header())
		if err != nil {
			t.Fatalf("a header that can't be written was read: %v", err)
		}
		for {
			rec, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return
			}
			if rec.Data == nil {
				err = w.Zeros(rec.Off, rec.Len)
			} else {
				err = w.Data(rec.Off, rec.Data)
			}
			if err != nil {
				t.Fatalf("record %d+%d: %v", rec.Off, rec.Len, err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if len(b) > 12 && b[8] == byte(headerSize&0xff) && !bytes.Equal(again.Bytes(), b) {
			t.Fatal(fmt.Sprint("another stream says the same: ", len(b), again.Len()))
		}
	})
}

func withSum(b []byte) []byte {
	sum := crc32.Checksum(b, table)
	return append(slices.Clone(b), byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
}
