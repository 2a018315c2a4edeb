package logfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func lines(t *testing.T, dir string, q Query) []string {
	t.Helper()
	var all []string
	if err := Read(t.Context(), dir, q, func(l string) error { all = append(all, l); return nil }); err != nil {
		t.Fatal(err)
	}
	return all
}

// Two files take turns; the last lines are there, and what they take is bounded.
func TestFilesTakeTurns(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	var out bytes.Buffer
	w := newWriter(dir, &out, 1000)
	for i := range 300 {
		fmt.Fprintf(w, "line %d\n", i)
	}
	w.Close()
	got := lines(t, dir, Query{})
	if len(got) < 100 || got[len(got)-1] != "line 299" || strings.Count(out.String(), "\n") != 300 {
		t.Errorf("%d lines, the last %q; %d bytes on the other writer", len(got), got[len(got)-1], out.Len())
	}
	for i, l := range got {
		if want := fmt.Sprintf("line %d", 300-len(got)+i); l != want {
			t.Fatalf("line %d is %q, want %q", i, l, want)
		}
	}
	if last := lines(t, dir, Query{Lines: 2}); !slices.Equal(last, []string{"line 298", "line 299"}) {
		t.Errorf("the last two are %q", last)
	}
	for _, name := range []string{current, previous} {
		about, err := os.Stat(filepath.Join(dir, name))
		if err != nil || about.Size() > 1100 {
			t.Errorf("%s: %v, %v", name, about, err)
		}
	}
}

// A writer goes on where an earlier one has ended.
func TestNextRun(t *testing.T) {
	dir := t.TempDir()
	for i := range 2 {
		w := New(dir, io.Discard)
		fmt.Fprintf(w, "run %d\n", i)
		w.Close()
	}
	if got := lines(t, dir, Query{}); !slices.Equal(got, []string{"run 0", "run 1"}) {
		t.Errorf("got %q", got)
	}
}

// A disk that takes nothing holds nobody up.
func TestNoRoomForFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := New(filepath.Join(file, "log"), &out)
	for range 2 * waiting {
		if _, err := io.WriteString(w, "x\n"); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	if out.Len() != 4*waiting {
		t.Errorf("%d bytes arrived", out.Len())
	}
	if got := lines(t, filepath.Join(filepath.Dir(file), "log"), Query{}); got != nil {
		t.Errorf("got %q", got)
	}
}

func TestSince(t *testing.T) {
	at := time.Date(2026, 12, 1, 10, 0, 0, 0, time.UTC)
	dir := t.TempDir()
	w := New(dir, io.Discard)
	for i := range 3 {
		fmt.Fprintf(w, "time=%s level=INFO msg=%d\npanic: %d\n", at.Add(time.Duration(i)*time.Minute).Format(time.RFC3339Nano), i, i)
	}
	w.Close()
	if got := lines(t, dir, Query{Since: at.Add(time.Minute)}); len(got) != 4 || got[1] != "panic: 1" {
		t.Errorf("got %q", got)
	}
	if got := lines(t, dir, Query{Since: at.Add(time.Hour)}); got != nil {
		t.Errorf("got %q", got)
	}
}

// Who follows sees each line once, also where the files take turns meanwhile.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(dir, io.Discard, 50)
	fmt.Fprintln(w, "line 0")
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	err := Read(ctx, dir, Query{Follow: true}, func(l string) error {
		if want := fmt.Sprintf("line %d", n); l != want {
			return fmt.Errorf("got %q, want %q", l, want)
		}
		if n++; n <= 20 {
			fmt.Fprintf(w, "line %d\n", n)
			return nil
		}
		cancel()
		return nil
	})
	w.Close()
	if err != nil || n != 21 {
		t.Errorf("%d lines, %v", n, err)
	}
	enough := errors.New("enough")
	if err := Read(t.Context(), dir, Query{Follow: true}, func(string) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
}
