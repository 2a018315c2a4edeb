package soak

import (
	"errors"
	"fmt"

	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// ErrWrong says that a volume did what nothing excuses: it lost or damaged
// something, or answered with an error that it must never give.
var ErrWrong = errors.New("the volume is wrong")

// Work lets the ledger use the volume, one request after the other, until it is
// enough. answered is called after each. An error other than ErrWrong is the
// end of the connection.
func (l *Ledger) Work(client *nbdtest.Client, enough <-chan struct{}, answered func()) error {
	for {
		select {
		case <-enough:
			return nil
		default:
		}
		o := l.Begin()
		err := client.Do(call(o))
		answered()
		if wrong := l.End(o, err == nil); wrong != nil {
			return fmt.Errorf("%w: %w", ErrWrong, wrong)
		}
		if err != nil {
			return fmt.Errorf("writing: %w", ofConnection(err))
		}
	}
}

// Verify reads all cells, while nobody works.
func (l *Ledger) Verify(client *nbdtest.Client, answered func()) error {
	const chunk = 512
	buf := make([]byte, chunk*CellSize)
	for first := 0; first < l.Cells(); first += chunk {
		p := buf[:min(chunk, l.Cells()-first)*CellSize]
		if _, err := client.ReadAt(p, l.Off(first)); err != nil {
			return fmt.Errorf("reading what was written: %w", ofConnection(err))
		}
		answered()
		if err := l.Observe(first, p); err != nil {
			return fmt.Errorf("%w: %w", ErrWrong, err)
		}
	}
	return nil
}

func call(o *Op) *nbdtest.Call {
	c := &nbdtest.Call{Off: o.Off, Len: o.Len, Data: o.Data}
	switch o.Kind {
	case Write:
		c.Command = proto.CmdWrite
	case WriteFUA:
		c.Command, c.Flags = proto.CmdWrite, proto.CmdFlagFUA
	case Trim:
		c.Command = proto.CmdTrim
	case Zero:
		c.Command = proto.CmdWriteZeroes
	case Read:
		c.Command = proto.CmdRead
	case Flush:
		c.Command = proto.CmdFlush
	}
	return c
}

// ofConnection keeps an error that ends a connection apart from one that the
// volume must never give.
func ofConnection(err error) error {
	if n := nbdtest.Errno(err); n != 0 && n != proto.ESHUTDOWN {
		return fmt.Errorf("%w: %w", ErrWrong, err)
	}
	return err
}
