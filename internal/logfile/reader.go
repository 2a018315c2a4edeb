package logfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// lookAgain is how often a followed file is looked at.
const lookAgain = 100 * time.Millisecond

// maxLine is where a line that does not end is cut, in bytes.
const maxLine = 64 << 10

// Query says what is read.
type Query struct {
	// Lines is how many of the last ones; 0: all.
	Lines int
	// Since leaves out what was logged before; zero: nothing.
	Since time.Time
	// Follow goes on with what is logged from now on, until the context ends.
	Follow bool
}

// Read hands over the lines of the files in a directory, the oldest first, without
// their newlines. No file is no line. A context that ends while it follows is no
// error.
func Read(ctx context.Context, dir string, q Query, send func(line string) error) error {
	old, err := readLines(filepath.Join(dir, previous))
	if err != nil {
		return err
	}
	t := &tail{path: filepath.Join(dir, current)}
	defer t.close()
	now, err := t.read()
	if err != nil {
		return err
	}
	lines := since(append(old, now...), q.Since)
	if q.Lines > 0 {
		lines = lines[max(0, len(lines)-q.Lines):]
	}
	for {
		for _, l := range lines {
			if err := send(l); err != nil {
				return err
			}
		}
		if !q.Follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookAgain):
		}
		if lines, err = t.read(); err != nil {
			return err
		}
	}
}

// since leaves out what was logged before a time. A line without one, as a crash
// writes them, belongs to the line before it.
func since(lines []string, from time.Time) []string {
	for i, l := range lines {
		if at, ok := timeOf(l); ok && !at.Before(from) {
			return lines[i:]
		}
	}
	if from.IsZero() {
		return lines
	}
	return nil
}

// timeOf is the time that a line begins with, as slog's text has it.
func timeOf(line string) (time.Time, bool) {
	const begin = "time="
	if len(line) < len(begin) || line[:len(begin)] != begin {
		return time.Time{}, false
	}
	word, _, _ := bytes.Cut([]byte(line[len(begin):]), []byte(" "))
	at, err := time.Parse(time.RFC3339Nano, string(word))
	return at, err == nil
}

func readLines(path string) ([]string, error) {
	t := &tail{path: path}
	defer t.close()
	return t.read()
}

// tail reads a file that grows, and goes on with the next one when its turn is over.
type tail struct {
	path string
	f    *os.File
	rest []byte // a line that has not ended yet
}

func (t *tail) close() {
	if t.f != nil {
		_ = t.f.Close()
		t.f = nil
	}
}

// read is what has come since the last time.
func (t *tail) read() ([]string, error) {
	var lines []string
	for {
		if t.f == nil {
			f, err := os.Open(t.path)
			if errors.Is(err, fs.ErrNotExist) {
				return lines, nil
			}
			if err != nil {
				return nil, fmt.Errorf("read the log: %w", err)
			}
			t.f = f
		}
		over := t.isOver() // before it is read: what is written meanwhile is read, too
		data, err := io.ReadAll(t.f)
		if err != nil {
			return nil, fmt.Errorf("read the log: %w", err)
		}
		lines = append(lines, t.split(data)...)
		if !over {
			return lines, nil
		}
		t.close()
	}
}

// isOver reports whether another file is written to now.
func (t *tail) isOver() bool {
	ours, err := t.f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(t.path)
	return errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(ours, now)
}

func (t *tail) split(data []byte) []string {
	var lines []string
	t.rest = append(t.rest, data...)
	for {
		line, rest, ends := bytes.Cut(t.rest, []byte("\n"))
		if !ends && len(t.rest) < maxLine {
			return lines
		}
		if len(line) > maxLine {
			line, rest = t.rest[:maxLine], t.rest[maxLine:]
		}
		lines, t.rest = append(lines, string(line)), rest
	}
}
