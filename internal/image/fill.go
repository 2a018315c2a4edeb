package image

import (
	"context"
	"fmt"
	"os"
)

// Fill writes the only disk of the file to an NBD export that has nothing but
// zeros and is as large at least.
func (g *Given) Fill(ctx context.Context, uri string, progress func(Progress)) error {
	return g.WriteDisk(ctx, 0, uri, progress)
}

// Spool is a file that goes with its end, for what is on its way.
func (s *Store) Spool() (*os.File, error) {
	f, err := s.temp()
	if err != nil {
		return nil, err
	}
	// It is found by its descriptor only, and is gone after a crash.
	if err := os.Remove(f.Name()); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("making a file for what is on its way: %w", err)
	}
	return f, nil
}

// QCOW2 makes a qcow2 file of a disk that fill writes into an empty raw file of
// that size. The caller closes it, and it is gone then.
func (s *Store) QCOW2(ctx context.Context, size int64, fill func(*os.File) error, progress func(Progress)) (*os.File, error) {
	raw, err := s.temp()
	if err != nil {
		return nil, err
	}
	defer discard(raw)
	if err := raw.Truncate(size); err != nil {
		return nil, fmt.Errorf("making a raw file: %w", s.explain(err))
	}
	if err := fill(raw); err != nil {
		return nil, s.explain(err)
	}
	out, err := s.temp()
	if err != nil {
		return nil, err
	}
	defer os.Remove(out.Name())
	if err := s.convert(ctx, []string{"convert", "-p", "-f", "raw", "-O", "qcow2", raw.Name(), out.Name()}, size, progress); err != nil {
		_ = out.Close()
		return nil, err
	}
	return out, nil
}
