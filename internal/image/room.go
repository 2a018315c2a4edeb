package image

import (
	"fmt"
	"io"
)

// checkRoomEvery is after how many bytes it is looked at again what is free.
const checkRoomEvery = 16 << 20

// roomCheck is to be asked before bytes are written: it fails once nothing is free
// any more of what images may take (Options.Free), though the disk has some left.
func (s *Store) roomCheck() func(n int) error {
	unchecked := checkRoomEvery
	return func(n int) error {
		if unchecked += n; unchecked < checkRoomEvery {
			return nil
		}
		unchecked = 0
		free, _, err := s.free(s.dir)
		if err == nil && free == 0 {
			err = s.noSpace()
		}
		return err
	}
}

func (s *Store) noSpace() error {
	return fmt.Errorf("%w in %s: free some, or import on another server", ErrNoSpace, s.dir)
}

// within is a writer that leaves what images may not take.
func (s *Store) within(w io.Writer) io.Writer { return roomWriter{w, s.roomCheck()} }

type roomWriter struct {
	to    io.Writer
	check func(n int) error
}

func (w roomWriter) Write(p []byte) (int, error) {
	if err := w.check(len(p)); err != nil {
		return 0, err
	}
	return w.to.Write(p)
}
