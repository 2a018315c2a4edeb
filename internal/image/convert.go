package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// options name a disk to qemu-img: its driver is said, never found by QEMU, and
// it sees that part of the file only. Only of qcow2 it may end within a sector;
// the rest of that is empty.
func (g *Given) options(d disk) string {
	if d.format == QCOW2 {
		d.size = wholeSectors(d.size)
	}
	return fmt.Sprintf("driver=%s,file.driver=raw,file.offset=%d,file.size=%d,file.file.driver=file,file.file.filename=%s",
		d.format, d.off, d.size, strings.ReplaceAll(g.file.Name(), ",", ",,"))
}

// measure checks a disk, and finds its size. What would make QEMU open other
// files of this server is refused before QEMU gets to see it.
func (s *Store) measure(ctx context.Context, g *Given, d *disk) error {
	if d.empty {
		return checkSize(uint64(d.virtual))
	}
	content := io.NewSectionReader(g.file, d.off, d.size)
	virtual, err := inspect(content, d, g.trusted)
	if err != nil {
		return err
	}
	if d.format == Raw {
		d.virtual = d.size
		return nil
	}
	if err := s.fitsDisk(int64(virtual)); err != nil { // 0: not known yet
		return err
	}
	if out, err := s.run(ctx, "check", "-q", "--image-opts", g.options(*d)); err != nil && !onlyLeaks(err) {
		return explainTool(fmt.Sprintf("the %s file is damaged or truncated", d.format), out, err)
	}
	if d.virtual, err = s.virtualSize(ctx, g, *d); err != nil {
		return err
	}
	if err := checkSize(uint64(d.virtual)); err != nil {
		return err
	}
	if err := s.fitsDisk(d.virtual); err != nil {
		return err
	}
	return s.fitsData(ctx, g, *d)
}

// fitsData refuses a disk whose data has no room here. What a qcow2 file would
// need is what is not zeros; a raw one is measured with its holes.
func (s *Store) fitsData(ctx context.Context, g *Given, d disk) error {
	out, err := s.run(ctx, "measure", "--output=json", "--image-opts", "-O", "qcow2", g.options(d))
	if err != nil {
		return explainTool(fmt.Sprintf("the %s file is damaged or truncated", d.format), out, err)
	}
	var m struct {
		Required int64 `json:"required"`
	}
	if err := json.Unmarshal(out, &m); err != nil {
		return fmt.Errorf("measuring the image: %w", err)
	}
	return s.fits(m.Required)
}

// inspect reads what a disk says of itself; 0 for a size that only QEMU finds.
func inspect(content *io.SectionReader, d *disk, trusted bool) (uint64, error) {
	switch d.format {
	case Raw:
		return uint64(d.size), checkRaw(content, d.size, trusted)
	case QCOW2:
		head := make([]byte, min(d.size, peekSize))
		if err := readAt(content, head, 0); err != nil {
			return 0, fmt.Errorf("reading the image's first bytes: %w", err)
		}
		h, err := parseQCOW2(head)
		return h.size, err
	case VMDK:
		return checkVMDK(content, d.size)
	case VDI:
		return checkVDI(content, d.size)
	}
	return 0, nil
}

// onlyLeaks: qemu-img check ends with 3 when clusters are unused but not free,
// which does no harm.
func onlyLeaks(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.ExitCode() == 3
}

// virtualSize asks QEMU for a disk's size, and looks once more whether it is a
// disk of its own.
func (s *Store) virtualSize(ctx context.Context, g *Given, d disk) (int64, error) {
	out, err := s.run(ctx, "info", "--output=json", "--image-opts", g.options(d))
	if err != nil {
		return 0, explainTool(fmt.Sprintf("the %s file is damaged or truncated", d.format), out, err)
	}
	var info struct {
		Size      int64  `json:"virtual-size"`
		Format    string `json:"format"`
		Backing   string `json:"backing-filename"`
		Encrypted bool   `json:"encrypted"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return 0, fmt.Errorf("measuring the image: %w", err)
	}
	switch {
	case info.Backing != "":
		return 0, refuse("the %s file needs a backing file: flatten it first with `qemu-img convert`", d.format)
	case info.Encrypted:
		return 0, refuse("the %s file is encrypted: decrypt it first", d.format)
	case info.Format != string(d.format):
		return 0, fmt.Errorf("measuring the image: it is %s, expected %s", info.Format, d.format)
	}
	return info.Size, nil
}

// convertTo writes a disk to a file, or, of the format "nbd", to a volume that
// has only zeros.
func (s *Store) convertTo(ctx context.Context, g *Given, d disk, format, to string, progress func(Progress)) error {
	args := []string{"convert", "-p", "--image-opts", "-O", "raw", "-S", "4k"}
	if format == "nbd" {
		args = append(args, "-n", "--target-is-zero", "-t", "writeback")
	}
	return s.convert(ctx, append(args, g.options(d), to), d.virtual, progress)
}

// convert runs qemu-img convert.
func (s *Store) convert(ctx context.Context, args []string, size int64, progress func(Progress)) error {
	cmd := exec.CommandContext(ctx, s.tool, args...)
	stderr := &firstWords{}
	cmd.Stderr = stderr
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
		if bytes.Contains(stderr.said, []byte("No space left")) {
			return fmt.Errorf("%w in %s: free some, or import on another server", ErrNoSpace, s.dir)
		}
		return explainTool("the disk could not be converted", stderr.said, err)
	}
	return nil
}

func (s *Store) run(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, s.tool, args...)
	out := &firstWords{}
	cmd.Stdout, cmd.Stderr = out, out
	err := cmd.Run()
	if ctx.Err() != nil {
		return out.said, ctx.Err()
	}
	return out.said, s.noTool(err)
}

// mostSaid bounds what is kept of what qemu-img prints, in bytes. It has a line for
// each thing that is wrong with a file, which may be more than the file.
const mostSaid = 1 << 20

// firstWords keeps the beginning of what is printed. One goroutine writes at a time,
// also where it is both standard output and error.
type firstWords struct{ said []byte }

// Write implements io.Writer.
func (w *firstWords) Write(p []byte) (int, error) {
	w.said = append(w.said, p[:min(len(p), mostSaid-len(w.said))]...)
	return len(p), nil
}

func (s *Store) noTool(err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("all images but raw ones need %s, which is not installed: install qemu-utils, or give a raw image", s.tool)
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
