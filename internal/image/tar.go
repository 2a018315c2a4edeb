package image

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// This file takes a disk out of a tar archive that holds nothing else, as some
// images for clouds are shipped: disk.raw in a tar.gz or tar.xz.

// holdsOneFile reports whether an archive is one file, and not the description
// of a machine.
func holdsOneFile(f io.ReaderAt, size int64) (bool, error) {
	archive, n := tar.NewReader(io.NewSectionReader(f, 0, size)), 0
	for {
		h, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF):
			return n == 1, nil
		case err != nil:
			return false, refuse("the tar archive is damaged or truncated: %v", err)
		case h.Typeflag == tar.TypeDir:
			continue
		}
		n++
		if n > 1 || !isFile(h) || strings.EqualFold(path.Ext(h.Name), ".ovf") {
			return false, nil
		}
	}
}

// isFile: an ordinary one, with holes or without.
func isFile(h *tar.Header) bool { return h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeGNUSparse }

// takeOut puts the archive's only file in the place of the archive. Its name
// does not matter.
func (s *Store) takeOut(ctx context.Context, g *Given, size int64) error {
	archive := tar.NewReader(io.NewSectionReader(g.file, 0, size))
	for {
		h, err := archive.Next()
		if err != nil {
			return refuse("the tar archive is damaged or truncated: %v", err)
		}
		if isFile(h) {
			break
		}
	}
	most, err := s.mostUnpacked()
	if err != nil {
		return err
	}
	content := bufio.NewReaderSize(archive, peekSize)
	head, err := peek(content)
	if err != nil {
		return refuse("the tar archive is damaged or truncated: %v", err)
	}
	format, err := look(head, "")
	if err != nil {
		return fmt.Errorf("the file in the tar archive: %w", err)
	}
	if format == OVA {
		return refuse("the tar archive holds an archive, not a disk: unpack it first")
	}
	file, err := s.temp()
	if err != nil {
		return err
	}
	n, err := s.copyOut(ctx, file, content, most)
	if err == nil && format == QCOW2 {
		n, err = padded(file, n)
	}
	if err != nil {
		discard(file)
		return err
	}
	discard(g.file)
	g.file, g.Format = file, format
	g.disks = []disk{{format: format, section: section{0, n}}}
	return nil
}

func (s *Store) copyOut(ctx context.Context, to *os.File, from io.Reader, most int64) (int64, error) {
	out := &sparseWriter{f: to}
	n, err := copyWith(ctx, s.within(out), from, most)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, refuse("the tar archive is truncated")
	}
	if err != nil {
		return 0, err
	}
	return n, out.finish()
}
