package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// convert turns a qcow2 file, whose header was found harmless by parseQCOW2,
// into a raw one and returns the disk's size in bytes.
func (s *Store) convert(ctx context.Context, from, to string, progress func(Progress)) (int64, error) {
	out, err := s.run(ctx, "check", "-q", "-f", "qcow2", from)
	if err != nil && !onlyLeaks(err) {
		return 0, explainTool("the qcow2 file is damaged or truncated", out, err)
	}
	size, err := s.measure(ctx, from)
	if err != nil {
		return 0, err
	}
	if err := s.convertTo(ctx, from, to, size, progress); err != nil {
		return 0, err
	}
	st, err := os.Stat(to)
	if err != nil {
		return 0, fmt.Errorf("converting the image: %w", err)
	}
	if st.Size() != size {
		return 0, fmt.Errorf("converting the image: %d bytes came out, expected %d", st.Size(), size)
	}
	return size, nil
}

// onlyLeaks: qemu-img check ends with 3 when clusters are unused but not free,
// which does no harm.
func onlyLeaks(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.ExitCode() == 3
}

// measure finds the disk's size and refuses what does not fit here.
func (s *Store) measure(ctx context.Context, from string) (int64, error) {
	out, err := s.run(ctx, "measure", "--output=json", "-f", "qcow2", "-O", "raw", from)
	if err != nil {
		return 0, explainTool("the qcow2 file is damaged or truncated", out, err)
	}
	var m struct {
		Required  int64 `json:"required"`
		Allocated int64 `json:"fully-allocated"`
	}
	if err := json.Unmarshal(out, &m); err != nil {
		return 0, fmt.Errorf("measuring the image: %w", err)
	}
	if err := checkSize(uint64(m.Allocated)); err != nil {
		return 0, err
	}
	if err := s.fitsDisk(m.Allocated); err != nil {
		return 0, err
	}
	return m.Allocated, s.fits(m.Required)
}

func (s *Store) convertTo(ctx context.Context, from, to string, size int64, progress func(Progress)) error {
	cmd := exec.CommandContext(ctx, s.tool, "convert", "-p", "-f", "qcow2", "-O", "raw", "-S", "4k", from, to)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("converting the image: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return s.noTool(err)
	}
	lines := bufio.NewScanner(stdout)
	lines.Split(scanProgress)
	for lines.Scan() {
		if percent, ok := parsePercent(lines.Text()); ok {
			progress(Progress{"converting", int64(float64(size) * percent / 100), size})
		}
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if bytes.Contains(stderr.Bytes(), []byte("No space left")) {
			return fmt.Errorf("%w in %s: free some, or import on another server", ErrNoSpace, s.dir)
		}
		return explainTool("the qcow2 file could not be converted", stderr.Bytes(), err)
	}
	return nil
}

func (s *Store) run(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, s.tool, args...)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return out, ctx.Err()
	}
	return out, s.noTool(err)
}

func (s *Store) noTool(err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("qcow2 images need %s, which is not installed: install qemu-utils, or give a raw image", s.tool)
	}
	return err
}

// explainTool makes one line of what qemu-img said. The name of the temporary
// file in it would tell the user nothing.
func explainTool(what string, out []byte, err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	line = strings.TrimPrefix(line, "qemu-img: ")
	if i := strings.LastIndex(line, "': "); i >= 0 {
		line = line[i+3:]
	}
	if line == "" {
		line = err.Error()
	}
	return refuse("%s: %s", what, line)
}

// scanProgress splits at the carriage returns of a progress display.
func scanProgress(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexAny(data, "\r\n"); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

// parsePercent reads "    (12.34/100%)".
func parsePercent(line string) (float64, bool) {
	number, _, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "("), "/")
	if !ok {
		return 0, false
	}
	p, err := strconv.ParseFloat(number, 64)
	return p, err == nil && p >= 0 && p <= 100
}
