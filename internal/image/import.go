package image

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/dustin/go-humanize"
)

// Request says what to import. Exactly one of Data and URL is given.
type Request struct {
	Data io.Reader
	// URL is downloaded: https only, also after redirects; http too if there is
	// a checksum.
	URL string
	// Format is "" (found by looking) or one of the formats: of what is inside,
	// if the file is compressed.
	Format Format
	// SHA256 of the file as given, hex; empty: not checked.
	SHA256 string
	// Size of Data in bytes, where it is known; 0: unknown.
	Size int64
}

// Progress is told while an import goes on.
type Progress struct {
	Phase       string // "receiving", "downloading", "converting", "checking"
	Done, Total int64  // bytes; Total 0: unknown
}

// Staged is an imported image that the catalog does not have yet. List does not
// show it until Done was called, so that nobody takes it for a leftover.
type Staged struct {
	Format Format
	Hints  Hints
	// Size of the disk inside, in bytes; a multiple of 512.
	Size int64
	// SHA256 of the raw form, hex.
	SHA256 string

	store *Store
	id    string
}

// Done says that the image is in the catalog.
func (g *Staged) Done() {
	g.store.mu.Lock()
	defer g.store.mu.Unlock()
	delete(g.store.fresh, g.id)
}

// Discard deletes the image again.
func (g *Staged) Discard() error {
	err := g.store.Remove(g.id)
	g.Done()
	return err
}

// Import stores an image under an id that is new. When it returns without an
// error the image is durable; the caller then calls Done or Discard. On an
// error nothing is left behind. Errors: ErrNotImage, ErrChecksum, ErrNoSpace,
// or what reading Data returned. progress is called from this goroutine.
func (s *Store) Import(ctx context.Context, id string, r Request, progress func(Progress)) (*Staged, error) {
	path, err := s.path(id)
	if err != nil {
		return nil, err
	}
	g, err := s.Receive(ctx, r, progress)
	if err != nil {
		return nil, err
	}
	defer g.Close()
	if n := len(g.Disks()); n != 1 {
		return nil, refuse("the OVA holds %d disks, and an image is one: `argon machine import` takes them all", n)
	}
	if g.disks[0].empty {
		return nil, refuse("the OVA's only disk is empty: there is nothing to make an image of")
	}
	raw, size, err := g.raw(ctx, progress)
	if err != nil {
		return nil, s.explain(err)
	}
	defer discard(raw)
	sum, err := sumFile(ctx, raw, size, func(done int64) { progress(Progress{"checking", done, size}) })
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.fresh[id] = true
	s.mu.Unlock()
	staged := &Staged{Format: g.Format, Hints: g.Hints, Size: size, SHA256: sum, store: s, id: id}
	if err := s.keep(raw, path); err != nil {
		return nil, errors.Join(err, staged.Discard())
	}
	return staged, nil
}

// Given is a file that was received and found usable, as it was given but for
// its compression.
type Given struct {
	Format Format
	// Hints are those of an OVA, and MACs the addresses of its machine's network
	// cards; empty where one is not said.
	Hints Hints
	MACs  []string

	store *Store
	file  *os.File
	disks []disk
	// trusted: the user said that it is raw, whatever its partition table says.
	trusted bool
}

// disk is one in a file that was given.
type disk struct {
	format Format
	section
	virtual int64 // bytes
	// empty: it has no file, and holds nothing.
	empty bool
}

// Receive takes a file in for as long as it is needed: until Close. See Import
// for its errors.
func (s *Store) Receive(ctx context.Context, r Request, progress func(Progress)) (*Given, error) {
	f, err := s.temp()
	if err != nil {
		return nil, err
	}
	g := &Given{store: s, file: f}
	if err = s.take(ctx, g, r, progress); err == nil {
		for i := range g.disks {
			if err = s.measure(ctx, g, &g.disks[i]); err != nil {
				break
			}
		}
	}
	if err != nil {
		g.Close()
		return nil, s.explain(err)
	}
	return g, nil
}

// Close deletes the file.
func (g *Given) Close() { discard(g.file) }

// Disks are the sizes of those in the file, in bytes.
func (g *Given) Disks() []int64 {
	sizes := make([]int64, len(g.disks))
	for i, d := range g.disks {
		sizes[i] = d.virtual
	}
	return sizes
}

// raw is a file with the only disk.
func (g *Given) raw(ctx context.Context, progress func(Progress)) (*os.File, int64, error) {
	d := g.disks[0]
	if g.Format == Raw {
		return g.file, d.virtual, nil
	}
	raw, err := g.store.temp()
	if err != nil {
		return nil, 0, err
	}
	err = g.store.convertTo(ctx, g, d, "raw", raw.Name(), progress)
	if err == nil {
		err = hasSize(raw, d.virtual)
	}
	if err != nil {
		discard(raw)
		return nil, 0, err
	}
	return raw, d.virtual, nil
}

func hasSize(f *os.File, size int64) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("converting the image: %w", err)
	}
	if st.Size() != size {
		return fmt.Errorf("converting the image: %d bytes came out, expected %d", st.Size(), size)
	}
	return nil
}

// take brings the file here, and finds out what it is.
func (s *Store) take(ctx context.Context, g *Given, r Request, progress func(Progress)) error {
	from, total, phase := r.Data, r.Size, "receiving"
	if r.URL != "" {
		body, n, err := s.download(ctx, r.URL, r.SHA256 != "")
		if err != nil {
			return err
		}
		defer body.Close()
		from, total, phase = body, n, "downloading"
	}
	if err := s.fits(total); err != nil {
		return err
	}
	sum := sha256.New()
	src := &source{r: io.TeeReader(from, sum), read: func(done int64) { progress(Progress{phase, done, total}) }}
	size, err := s.copyIn(ctx, g, src, r.Format)
	if err != nil {
		if errors.Is(err, ErrNotImage) || errors.Is(err, ErrNoSpace) {
			return err
		}
		return fmt.Errorf("%s the image: %w", phase, err)
	}
	if total > 0 && src.n != total {
		return refuse("the image is truncated: %d of %d bytes came", src.n, total)
	}
	got := hex.EncodeToString(sum.Sum(nil))
	if r.SHA256 != "" && !strings.EqualFold(got, r.SHA256) {
		return fmt.Errorf("the image's %w: SHA-256 is %s, expected %s", ErrChecksum, got, strings.ToLower(r.SHA256))
	}
	g.trusted = r.Format == Raw
	if g.Format == QCOW2 || g.trusted {
		if size, err = padded(g.file, size); err != nil {
			return err
		}
	}
	g.disks = []disk{{format: g.Format, section: section{0, size}}}
	if g.Format != OVA {
		return nil
	}
	if lone, err := holdsOneFile(g.file, size); err != nil {
		return err
	} else if lone {
		return s.takeOut(ctx, g, size)
	}
	held, err := readOVA(ctx, g.file, size)
	if err != nil {
		return err
	}
	g.disks, g.Hints, g.MACs = held.disks, held.hints, held.macs
	return nil
}

// copyIn writes the file as it is, or what is inside if it is compressed.
func (s *Store) copyIn(ctx context.Context, g *Given, src *source, want Format) (int64, error) {
	buffered := bufio.NewReaderSize(src, peekSize)
	head, err := peek(buffered)
	if err != nil {
		return 0, err
	}
	most := int64(MaxSize)
	content := buffered
	u, err := unpack(head, buffered, src)
	if err != nil {
		return 0, err
	}
	if u != nil {
		defer u.close()
		if most, err = s.mostUnpacked(); err != nil {
			return 0, err
		}
		content = bufio.NewReaderSize(u, peekSize)
		if head, err = peek(content); err != nil {
			return 0, err
		}
	}
	if g.Format, err = look(head, want); err != nil {
		return 0, err
	}
	if g.Format == QCOW2 {
		// At once, before much is copied.
		if _, err := parseQCOW2(head); err != nil {
			return 0, err
		}
	}
	out := &sparseWriter{f: g.file}
	n, err := copyWith(ctx, s.within(out), content, most)
	if err == nil && u != nil {
		err = u.rest(buffered)
	}
	if err != nil {
		return 0, err
	}
	return n, out.finish()
}

// padded makes a file end with a sector, as QEMU reads it. A qcow2 file may end
// anywhere: after a snapshot's table, for one.
func padded(f *os.File, size int64) (int64, error) {
	whole := wholeSectors(size)
	if whole == size {
		return size, nil
	}
	if err := f.Truncate(whole); err != nil {
		return 0, fmt.Errorf("keeping the image: %w", err)
	}
	return whole, nil
}

func wholeSectors(size int64) int64 { return (size + sector - 1) / sector * sector }

func peek(r *bufio.Reader) ([]byte, error) {
	head, err := r.Peek(peekSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return head, nil
}

// mostUnpacked bounds what a compressed file may turn into: what the disk could
// ever hold.
func (s *Store) mostUnpacked() (int64, error) {
	_, total, err := s.free(s.dir)
	return int64(min(total, MaxSize)), err
}

func copyWith(ctx context.Context, w io.Writer, r io.Reader, most int64) (int64, error) {
	buf := make([]byte, pieceSize)
	done := int64(0)
	for {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		n, err := r.Read(buf)
		if n > 0 {
			if done += int64(n); done > most {
				return done, fmt.Errorf("%w: it has more than %s, all that the disk can hold", ErrNoSpace, humanize.IBytes(uint64(most)))
			}
			if _, werr := w.Write(buf[:n]); werr != nil {
				return done, werr
			}
		}
		if errors.Is(err, io.EOF) {
			return done, nil
		}
		if err != nil {
			return done, err
		}
	}
}

// fits refuses early what cannot be stored.
func (s *Store) fits(need int64) error {
	free, _, err := s.free(s.dir)
	if err != nil {
		return err
	}
	if need > 0 && uint64(need) > free {
		return fmt.Errorf("%w: it needs %s, %s of %s are free", ErrNoSpace, humanize.IBytes(uint64(need)), humanize.IBytes(free), s.dir)
	}
	return nil
}

// fitsDisk refuses a disk that no file system of this size can ever hold.
func (s *Store) fitsDisk(virtual int64) error {
	_, total, err := s.free(s.dir)
	if err != nil {
		return err
	}
	if uint64(virtual) > total {
		return fmt.Errorf("%w: the disk inside has %s, the disk of %s only %s", ErrNoSpace, humanize.IBytes(uint64(virtual)), s.dir, humanize.IBytes(total))
	}
	return nil
}

// download opens a URL. One that anybody on the way can change is taken only
// with a checksum.
func (s *Store) download(ctx context.Context, address string, checked bool) (io.ReadCloser, int64, error) {
	may := func(u *url.URL) bool { return u.Scheme == "https" || u.Scheme == "http" && checked }
	u, err := url.Parse(address)
	switch {
	case err == nil && u.Scheme == "http" && u.Host != "" && !checked:
		return nil, 0, refuse("%q is not https: anybody on the way could change the image: give its --sha256, or an https URL", address)
	case err != nil || u.Host == "" || !may(u):
		return nil, 0, refuse("%q is not an https URL", address)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, 0, refuse("%q is not an https URL", address)
	}
	client := *s.http
	client.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		if !may(req.URL) {
			return fmt.Errorf("%s leads to %s, which is not https", address, req.URL.Redacted())
		}
		if len(via) >= 10 {
			return fmt.Errorf("%s leads to more than 10 other addresses", address)
		}
		return nil
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("downloading the image: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		_ = res.Body.Close()
		return nil, 0, refuse("downloading %s: the server answered %s", u.Redacted(), res.Status)
	}
	// What the transport unpacked by itself has no length.
	return res.Body, max(res.ContentLength, 0), nil
}
