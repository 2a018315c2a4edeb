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
	// URL is downloaded; https only, also after redirects.
	URL string
	// Format is "" (found by looking), QCOW2 or Raw.
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
	given, err := s.temp()
	if err != nil {
		return nil, err
	}
	defer discard(given)
	format, size, err := s.take(ctx, given, r, progress)
	if err != nil {
		return nil, s.explain(err)
	}
	raw := given
	if format == QCOW2 {
		if raw, err = s.temp(); err != nil {
			return nil, err
		}
		defer discard(raw)
		if size, err = s.convert(ctx, given.Name(), raw.Name(), progress); err != nil {
			return nil, s.explain(err)
		}
	} else if err := checkRaw(given, size); err != nil {
		return nil, err
	}
	sum, err := sumFile(ctx, raw, size, func(done int64) { progress(Progress{"checking", done, size}) })
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.fresh[id] = true
	s.mu.Unlock()
	staged := &Staged{Format: format, Size: size, SHA256: sum, store: s, id: id}
	if err := s.keep(raw, path); err != nil {
		return nil, errors.Join(err, staged.Discard())
	}
	return staged, nil
}

// take brings the file here, as it was given.
func (s *Store) take(ctx context.Context, into *os.File, r Request, progress func(Progress)) (Format, int64, error) {
	src, total, phase := r.Data, r.Size, "receiving"
	if r.URL != "" {
		body, n, err := s.download(ctx, r.URL)
		if err != nil {
			return "", 0, err
		}
		defer body.Close()
		src, total, phase = body, n, "downloading"
	}
	if err := s.fits(total); err != nil {
		return "", 0, err
	}
	buffered := bufio.NewReaderSize(src, peekSize)
	head, err := buffered.Peek(peekSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", 0, fmt.Errorf("%s the image: %w", phase, err)
	}
	format, err := look(head, r.Format)
	if err != nil {
		return "", 0, err
	}
	if format == QCOW2 {
		if _, err := parseQCOW2(head); err != nil {
			return "", 0, err
		}
	}
	sum := sha256.New()
	out := &sparseWriter{f: into}
	n, err := copyWith(ctx, io.MultiWriter(out, sum), buffered, func(done int64) {
		progress(Progress{phase, done, total})
	})
	if err != nil {
		return "", 0, fmt.Errorf("%s the image: %w", phase, err)
	}
	if total > 0 && n != total {
		return "", 0, refuse("the image is truncated: %d of %d bytes came", n, total)
	}
	got := hex.EncodeToString(sum.Sum(nil))
	if r.SHA256 != "" && !strings.EqualFold(got, r.SHA256) {
		return "", 0, fmt.Errorf("the image's %w: SHA-256 is %s, expected %s", ErrChecksum, got, strings.ToLower(r.SHA256))
	}
	return format, n, out.finish()
}

func copyWith(ctx context.Context, w io.Writer, r io.Reader, progress func(done int64)) (int64, error) {
	buf := make([]byte, pieceSize)
	done := int64(0)
	for {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return done, werr
			}
			done += int64(n)
			progress(done)
			if done > MaxSize {
				return done, refuse("the image is larger than %s", humanize.IBytes(MaxSize))
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

func (s *Store) download(ctx context.Context, address string) (io.ReadCloser, int64, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, 0, refuse("%q is not an https URL", address)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, 0, refuse("%q is not an https URL", address)
	}
	client := *s.http
	client.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		if req.URL.Scheme != "https" {
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
	return res.Body, max(res.ContentLength, 0), nil
}
