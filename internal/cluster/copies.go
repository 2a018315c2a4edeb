package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/catalog"
)

// This file: the copies of the catalog that every server keeps by itself, voter or
// not, for `argon cluster recover`.

const (
	copyEvery = time.Hour
	// copySpread spreads the servers' copies, so that they don't all ask at once.
	copySpread = 5 * time.Minute
	// copyPause is the least time between two copies, whatever changes; a change
	// of the servers is copied after it.
	copyPause = 10 * time.Second
	// keptHourly newest copies are kept, and the newest of each of keptDaily days;
	// no more than keptBytes, but two at least.
	keptHourly, keptDaily = 24, 7
	keptBytes             = 256 << 20
	copyTimeout           = 2 * time.Minute
	copySuffix            = ".catalog"
	copyTime              = "20060102T150405Z"
)

func (d directory) copies() string { return d.path("catalog-copies") }

// KeepCopies takes copies of the catalog into this server's directory until ctx
// ends: at the start, each hour, and soon after the servers have changed.
func (m *Member) KeepCopies(ctx context.Context, view *catalog.View) error {
	trouble := complaint{log: m.opts.Log, about: "the catalog can't be copied; trying again"}
	copied := ""
	for ctx.Err() == nil {
		if st := view.State(); st != nil {
			now := serversIn(st)
			if trouble.tell(ctx, m.copyCatalog(ctx)) {
				now = ""
			}
			copied = now
		}
		if err := sleep(ctx, copyPause); err != nil {
			return nil
		}
		if copied != "" {
			untilDifferent(ctx, view, copied, copyEvery-rand.N(copySpread))
		}
	}
	return nil
}

// untilDifferent waits until the servers are others than those that were copied, or
// for so long.
func untilDifferent(ctx context.Context, view *catalog.View, copied string, most time.Duration) {
	t := time.NewTimer(most)
	defer t.Stop()
	for {
		changed := view.Changed()
		if st := view.State(); st == nil || serversIn(st) != copied {
			return
		}
		select {
		case <-changed:
		case <-t.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// serversIn is which servers there are, and by which certificates.
func serversIn(st *catalog.State) string {
	var all []string
	for id, s := range st.Servers {
		all = append(all, id+s.GetCertificateSerial()+s.GetAddress())
	}
	slices.Sort(all)
	return fmt.Sprint(st.Cluster.GetIncarnation(), strings.Join(all, " "))
}

// copyCatalog takes one copy, and deletes old ones.
func (m *Member) copyCatalog(ctx context.Context) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	if m.opts.NoRoom() {
		return fmt.Errorf("copy the catalog into %s: %w", m.dir.copies(), unix.ENOSPC)
	}
	if err := os.MkdirAll(m.dir.copies(), 0o700); err != nil {
		return fmt.Errorf("make the directory of the catalog's copies: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	now := m.opts.Now()
	if _, err := writeCopy(ctx, p.client, filepath.Join(m.dir.copies(), now.UTC().Format(copyTime)+copySuffix), now); err != nil {
		return err
	}
	all, err := m.dir.listCopies()
	if err != nil {
		return err
	}
	for _, c := range superfluous(all) {
		if err := os.Remove(c.path); err != nil {
			return fmt.Errorf("delete an old copy of the catalog: %w", err)
		}
	}
	return nil
}

// storedCopy is one in the directory.
type storedCopy struct {
	path string
	size int64
	head CopyHead
}

// compare orders copies by what is in them, not by a clock.
func (c CopyHead) compare(o CopyHead) int {
	return cmp.Or(cmp.Compare(c.Incarnation, o.Incarnation), cmp.Compare(c.Revision, o.Revision))
}

// listCopies are those that can be read, the newest first.
func (d directory) listCopies() ([]storedCopy, error) {
	entries, err := os.ReadDir(d.copies())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the catalog's copies: %w", err)
	}
	var all []storedCopy
	for _, e := range entries {
		path := filepath.Join(d.copies(), e.Name())
		if strings.HasPrefix(e.Name(), ".copying-") { // a crash left it, or it is being made
			continue
		}
		head, err := readCopyHead(path)
		info, statErr := e.Info()
		if err != nil || statErr != nil {
			continue
		}
		all = append(all, storedCopy{path: path, size: info.Size(), head: head})
	}
	slices.SortStableFunc(all, func(a, b storedCopy) int { return b.head.compare(a.head) })
	return all, nil
}

// superfluous are the copies to delete, of all, the newest first.
func superfluous(all []storedCopy) []storedCopy {
	var drop []storedCopy
	var bytes int64
	days := map[string]bool{}
	for i, c := range all {
		day := c.head.Taken.UTC().Format(time.DateOnly)
		first := !days[day]
		days[day] = true
		keep := i < keptHourly || first && len(days) <= keptDaily
		if keep && (i < 2 || bytes+c.size <= keptBytes) {
			bytes += c.size
			continue
		}
		drop = append(drop, c)
	}
	return drop
}

// clearCopying removes what a crash left half-made.
func (d directory) clearCopying() error {
	for _, pattern := range []string{filepath.Join(d.copies(), ".copying-*"), d.path(".backup-*")} {
		left, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, path := range left {
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("clear the copies of the catalog: %w", err)
			}
		}
	}
	return nil
}
