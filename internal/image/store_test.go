package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mib = 1 << 20

func newStore(t *testing.T, change ...func(*Options)) *Store {
	t.Helper()
	o := Options{Dir: filepath.Join(t.TempDir(), "images"), Log: slog.New(slog.DiscardHandler)}
	for _, c := range change {
		c(&o)
	}
	s, err := NewStore(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// rawDisk is a disk with a partition table, some data and many zeros.
func rawDisk(size int) []byte {
	d := make([]byte, size)
	d[446+4] = 0x83
	binary.LittleEndian.PutUint32(d[446+8:], 2048)
	binary.LittleEndian.PutUint32(d[446+12:], uint32(size/512-2048))
	d[510], d[511] = 0x55, 0xaa
	r := rand.New(rand.NewPCG(1, 2))
	for i := size / 2; i < size/2+200_000; i++ {
		d[i] = byte(r.Uint32())
	}
	return d
}

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

func toQCOW2(t *testing.T, raw []byte, options ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	from, to := filepath.Join(dir, "a.raw"), filepath.Join(dir, "a.qcow2")
	if err := os.WriteFile(from, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, append(append([]string{"convert", "-O", "qcow2"}, options...), from, to)...)
	return mustRead(t, to)
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func ignore(Progress) {}

// onlyFiles fails unless the store's directory holds just these names.
func onlyFiles(t *testing.T, s *Store, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the directory holds %v, want %v", got, want)
	}
}

func TestImport(t *testing.T) {
	disk := rawDisk(4 * mib)
	for name, c := range map[string]struct {
		request Request
		format  Format
	}{
		"raw":            {Request{Data: bytes.NewReader(disk)}, Raw},
		"raw, said":      {Request{Data: bytes.NewReader(disk), Format: Raw, Size: 4 * mib, SHA256: strings.ToUpper(sum(disk))}, Raw},
		"qcow2":          {Request{Data: bytes.NewReader(toQCOW2(t, disk))}, QCOW2},
		"qcow2, packed":  {Request{Data: bytes.NewReader(toQCOW2(t, disk, "-c")), Format: QCOW2}, QCOW2},
		"qcow2, old":     {Request{Data: bytes.NewReader(toQCOW2(t, disk, "-o", "compat=0.10"))}, QCOW2},
		"qcow2, el2":     {Request{Data: bytes.NewReader(toQCOW2(t, disk, "-o", "extended_l2=on"))}, QCOW2},
		"one byte reads": {Request{Data: oneByte{bytes.NewReader(disk)}}, Raw},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			var last Progress
			staged, err := s.Import(t.Context(), "A", c.request, func(p Progress) { last = p })
			if err != nil {
				t.Fatal(err)
			}
			if staged.Format != c.format || staged.Size != 4*mib || staged.SHA256 != sum(disk) {
				t.Errorf("got %+v", staged)
			}
			if last.Done != 4*mib || last.Total != 4*mib {
				t.Errorf("the last progress was %+v", last)
			}
			if ids, _ := s.List(); len(ids) != 0 {
				t.Errorf("listed before it was recorded: %v", ids)
			}
			staged.Done()
			if ids, _ := s.List(); fmt.Sprint(ids) != "[A]" {
				t.Errorf("listed: %v", ids)
			}
			onlyFiles(t, s, "A.raw")
			if got := mustRead(t, filepath.Join(s.dir, "A.raw")); !bytes.Equal(got, disk) {
				t.Error("the stored bytes differ")
			}
		})
	}
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:1]) }

func TestImportIsSparse(t *testing.T) {
	s := newStore(t)
	disk := rawDisk(64 * mib)
	if _, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(disk)}, ignore); err != nil {
		t.Fatal(err)
	}
	f, err := s.Open("A")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := int64(0)
	if err := eachExtent(f, 64*mib, func(_, n int64) error { data += n; return nil }); err != nil {
		t.Fatal(err)
	}
	if data > 8*mib {
		t.Errorf("%d bytes are not holes", data)
	}
}

func patch(b []byte, at int, with ...byte) []byte {
	b = bytes.Clone(b)
	copy(b[at:], with)
	return b
}

func TestBadImages(t *testing.T) {
	disk := rawDisk(4 * mib)
	qcow2 := toQCOW2(t, disk)
	garbage := make([]byte, mib)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range garbage {
		garbage[i] = byte(r.Uint32())
	}
	gpt := rawDisk(4 * mib)
	copy(gpt[512:], "EFI PART")
	binary.LittleEndian.PutUint64(gpt[512+32:], 8191)
	gptForever := patch(gpt, 512+32, 255, 255, 255, 255, 255, 255, 255, 255)

	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret"), 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	backed, outside := filepath.Join(dir, "backed"), filepath.Join(dir, "outside")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, backed)
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+secret+",data_file_raw=on", outside, "1M")

	size := func(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
	for name, c := range map[string]struct {
		data   []byte
		format Format
		says   string
	}{
		"empty":                    {nil, "", "empty"},
		"garbage":                  {garbage, "", "nor a raw disk"},
		"garbage called qcow2":     {garbage, QCOW2, "not qcow2"},
		"qcow2 called raw":         {qcow2, Raw, "is qcow2, not raw"},
		"unknown format":           {disk, "floppy", "not known"},
		"another format":           {disk, VMDK, "not vmdk"},
		"a zip":                    {append([]byte("PK\x03\x04"), garbage...), "", "zip"},
		"not really compressed":    {append([]byte("\x1f\x8b"), disk...), "", "gzip"},
		"not really a VMDK":        {append([]byte("KDMV"), disk...), "", "vmdk"},
		"raw, odd length":          {disk[:4*mib-100], "", "multiple of 512"},
		"raw, cut":                 {disk[:3*mib], "", "partition table"},
		"raw, cut, GPT":            {gpt[:3*mib], "", "partition table"},
		"raw, GPT without end":     {gptForever, "", "partition table"},
		"raw without anything":     {make([]byte, mib), "", "neither"},
		"only a qcow2 mark":        {qcow2[:5], "", "truncated"},
		"half a header":            {qcow2[:80], "", "truncated"},
		"only a header":            {qcow2[:112], "", "damaged or truncated"},
		"cut in the tables":        {qcow2[:200_000], "", "damaged or truncated"},
		"cut in the data":          {qcow2[:len(qcow2)-70_000], "", "damaged or truncated"},
		"version 9":                {patch(qcow2, 4, 0, 0, 0, 9), "", "version 9"},
		"clusters of 2^63":         {patch(qcow2, 20, 0, 0, 0, 63), "", "damaged"},
		"corrupt":                  {patch(qcow2, 79, 2), "", "corrupt"},
		"unknown features":         {patch(qcow2, 72, 1), "", "features"},
		"encrypted":                {patch(qcow2, 35, 1), "", "encrypted"},
		"backing file":             {mustRead(t, backed), "", "backing file"},
		"backing file, no name":    {patch(qcow2, 15, 200), "", "backing file"},
		"data in another file":     {mustRead(t, outside), "", "another file"},
		"says it is larger":        {patch(qcow2, 24, size(1<<30)...), "", "damaged or truncated"},
		"says it is much larger":   {patch(qcow2, 24, size(1<<50)...), "", "at most"},
		"says it is 2^63":          {patch(qcow2, 24, size(1<<63)...), "", "at most"},
		"says it is odd":           {patch(qcow2, 24, size(1000)...), "", "multiple of 512"},
		"says it is nothing":       {patch(qcow2, 24, size(0)...), "", "empty"},
		"tables point to nowhere":  {patch(qcow2, 40, size(1<<40)...), "", "damaged or truncated"},
		"refcounts are far beyond": {patch(qcow2, 48, size(1<<45)...), "", "damaged or truncated"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			_, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(c.data), Format: c.format}, ignore)
			if !errors.Is(err, ErrNotImage) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want ErrNotImage with %q", err, c.says)
			}
			if err != nil && (strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), s.dir)) {
				t.Errorf("not an error for a user: %q", err)
			}
			onlyFiles(t, s)
		})
	}
}

// TestDamagedImages imports qcow2 files with random damage: whatever comes
// out, nothing may be left behind after an error.
func TestDamagedImages(t *testing.T) {
	good := toQCOW2(t, rawDisk(2*mib))
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 1))
		bad := bytes.Clone(good)
		for range 1 + r.IntN(20) {
			bad[r.IntN(min(len(bad), 300_000))] = byte(r.Uint32())
		}
		s := newStore(t)
		if _, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(bad)}, ignore); err != nil {
			onlyFiles(t, s)
		}
	}
}

func TestImportThatFailsLeavesNothing(t *testing.T) {
	disk := rawDisk(4 * mib)
	broken := errors.New("connection lost")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	little := func(o *Options) {
		o.Free = func(string) (uint64, uint64, error) { return mib, 2 * mib, nil }
	}
	// It becomes full while more than one look at it is written.
	filling := func(o *Options) {
		left := uint64(3)
		o.Free = func(string) (uint64, uint64, error) {
			left -= min(left, 1)
			return left * mib, 1 << 40, nil
		}
	}
	plenty := func(*Options) {}
	for name, c := range map[string]struct {
		ctx     context.Context
		options func(*Options)
		request Request
		want    error
	}{
		"wrong checksum":        {t.Context(), plenty, Request{Data: bytes.NewReader(disk), SHA256: sum(nil)}, ErrChecksum},
		"fewer bytes than said": {t.Context(), plenty, Request{Data: bytes.NewReader(disk), Size: 5 * mib}, ErrNotImage},
		"the reader fails":      {t.Context(), plenty, Request{Data: io.MultiReader(bytes.NewReader(disk), failing{broken})}, broken},
		"fails at once":         {t.Context(), plenty, Request{Data: failing{broken}}, broken},
		"the caller goes away":  {cancelled, plenty, Request{Data: bytes.NewReader(disk)}, context.Canceled},
		"no room, raw":          {t.Context(), little, Request{Data: bytes.NewReader(disk), Size: 4 * mib}, ErrNoSpace},
		"no room, qcow2":        {t.Context(), little, Request{Data: bytes.NewReader(toQCOW2(t, disk))}, ErrNoSpace},
		"no room later":         {t.Context(), filling, Request{Data: bytes.NewReader(rawDisk(3 * checkRoomEvery))}, ErrNoSpace},
		"no URL":                {t.Context(), plenty, Request{URL: "file:///etc/passwd"}, ErrNotImage},
		"not https":             {t.Context(), plenty, Request{URL: "http://localhost/a"}, ErrNotImage},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, c.options)
			if _, err := s.Import(c.ctx, "A", c.request, ignore); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			onlyFiles(t, s)
		})
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestWithoutQEMU(t *testing.T) {
	qcow2 := toQCOW2(t, rawDisk(2*mib))
	s := newStore(t, func(o *Options) { o.Tool = "qemu-img-that-is-not-there" })
	_, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(qcow2)}, ignore)
	if err == nil || !strings.Contains(err.Error(), "install qemu-utils") {
		t.Errorf("got %v", err)
	}
	onlyFiles(t, s)
	if _, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(rawDisk(2 * mib))}, ignore); err != nil {
		t.Errorf("a raw image needs no qemu-img: %v", err)
	}
}

func TestDownload(t *testing.T) {
	disk := rawDisk(2 * mib)
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(disk) }))
	defer plain.Close()
	mux := http.NewServeMux()
	mux.HandleFunc("/good", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(disk) })
	mux.HandleFunc("/cut", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(disk)))
		_, _ = w.Write(disk[:mib])
	})
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/good", http.StatusFound) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, plain.URL, http.StatusFound) })
	tls := httptest.NewTLSServer(mux)
	defer tls.Close()
	client := tls.Client()
	defer client.CloseIdleConnections()

	for path, want := range map[string]string{
		"/good":    "",
		"/moved":   "",
		"/cut":     "unexpected EOF",
		"/away":    "not https",
		"/missing": "404",
	} {
		t.Run(path[1:], func(t *testing.T) {
			s := newStore(t, func(o *Options) { o.HTTP = client })
			_, err := s.Import(t.Context(), "A", Request{URL: tls.URL + path}, ignore)
			switch {
			case want == "" && err != nil:
				t.Errorf("got %v", err)
			case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
				t.Errorf("got %v, want %q", err, want)
			case want != "":
				onlyFiles(t, s)
			}
		})
	}
}

func TestFetch(t *testing.T) {
	a, b := newStore(t), newStore(t)
	disk := rawDisk(8 * mib)
	staged, err := a.Import(t.Context(), "A", Request{Data: bytes.NewReader(disk)}, ignore)
	if err != nil {
		t.Fatal(err)
	}
	var pieces []Piece
	sent := 0
	if err := a.Send(t.Context(), "A", func(off int64, data []byte) error {
		pieces = append(pieces, Piece{off, bytes.Clone(data)})
		sent += len(data)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if sent > 3*mib {
		t.Errorf("%d bytes were sent, most of them zero", sent)
	}
	if err := fetchPieces(t, b, pieces, 8*mib, staged.SHA256); err != nil {
		t.Fatal(err)
	}
	onlyFiles(t, b, "A.raw")
	if !bytes.Equal(mustRead(t, filepath.Join(b.dir, "A.raw")), disk) {
		t.Error("the bytes differ")
	}

	damaged := []Piece{{pieces[0].Offset, patch(pieces[0].Data, 100, 99)}}
	for name, c := range map[string]struct {
		pieces []Piece
		size   int64
	}{
		"damaged":         {damaged, 8 * mib},
		"a piece missing": {pieces[1:], 8 * mib},
		"beyond the end":  {[]Piece{{8*mib - 1, []byte{1, 2}}}, 8 * mib},
		"negative":        {[]Piece{{-1, []byte{1}}}, 8 * mib},
		"overflow":        {[]Piece{{1<<63 - 1, []byte{1}}}, 8 * mib},
		"another size":    {pieces, 16 * mib},
		"no size":         {pieces, 0},
	} {
		s := newStore(t)
		if err := fetchPieces(t, s, c.pieces, c.size, staged.SHA256); err == nil {
			t.Errorf("%s: no error", name)
		}
		onlyFiles(t, s)
	}
}

func fetchPieces(t *testing.T, s *Store, pieces []Piece, size int64, sum string) error {
	t.Helper()
	var last Progress
	err := s.Fetch(t.Context(), "A", size, sum, func() (Piece, error) {
		if len(pieces) == 0 {
			return Piece{}, io.EOF
		}
		p := pieces[0]
		pieces = pieces[1:]
		return p, nil
	}, func(p Progress) { last = p })
	if want := (Progress{"checking", size, size}); err == nil && last != want {
		t.Errorf("in the end it is at %+v, want %+v", last, want)
	}
	return err
}

func TestRemoveAndNames(t *testing.T) {
	s := newStore(t)
	if _, err := s.Open("A"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening what is not there: %v", err)
	}
	for _, id := range []string{"", "../A", "a/b", ".part-1", "a\x00"} {
		if _, err := s.Open(id); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("id %q: %v", id, err)
		}
	}
	staged, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(rawDisk(2 * mib))}, ignore)
	if err != nil {
		t.Fatal(err)
	}
	staged.Done()
	for range 2 {
		if err := s.Remove("A"); err != nil {
			t.Error(err)
		}
	}
	onlyFiles(t, s)
	if staged, err = s.Import(t.Context(), "B", Request{Data: bytes.NewReader(rawDisk(2 * mib))}, ignore); err != nil {
		t.Fatal(err)
	}
	if err := staged.Discard(); err != nil {
		t.Error(err)
	}
	onlyFiles(t, s)
}

func TestOpeningCleansUp(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".part-123", "A.raw"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	onlyFiles(t, newStore(t, func(o *Options) { o.Dir = dir }), "A.raw")
}

func FuzzHeaders(f *testing.F) {
	f.Add(rawDisk(2 * mib)[:4096])
	f.Add(append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 200)...))
	f.Add([]byte("QFI\xfb"))
	f.Fuzz(func(t *testing.T, head []byte) {
		format, err := look(head, "")
		if err == nil && format == QCOW2 {
			if h, err := parseQCOW2(head); err == nil && (h.size == 0 || h.size > MaxSize) {
				t.Errorf("size %d let through", h.size)
			}
		}
		partitionsEnd(head)
		_ = checkRaw(bytes.NewReader(head), int64(len(head)), false)
		parsePercent(string(head))
	})
}
