package nbd

import (
	"errors"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// session is what a client and the server agreed on in the handshake.
type session struct {
	structured bool // structured replies
	allocation bool // the context base:allocation was selected
}

// allowedFlags are the flags that go with a command. FUA goes with all of
// them, as there are clients that set it everywhere.
func (s session) allowedFlags(cmd proto.Command) proto.CommandFlags {
	flags := proto.CmdFlagFUA
	switch cmd {
	case proto.CmdRead:
		if s.structured {
			flags |= proto.CmdFlagDF
		}
	case proto.CmdWriteZeroes:
		flags |= proto.CmdFlagNoHole | proto.CmdFlagFastZero
	case proto.CmdBlockStatus:
		flags |= proto.CmdFlagReqOne
	}
	return flags
}

// check tells what is wrong with a request for a device of the given size, 0
// if nothing is: sections "Size constraints", "Request types" and "Error
// values".
func (s session) check(h proto.Request, size int64) proto.Errno {
	if h.Flags&^s.allowedFlags(h.Command) != 0 {
		return proto.EINVAL
	}
	switch h.Command {
	case proto.CmdRead:
		if h.Len > volume.MaxRequest && s.structured {
			return proto.EOVERFLOW
		}
		if h.Len > volume.MaxRequest {
			return proto.EINVAL
		}
		return inside(h, size, proto.EINVAL)
	case proto.CmdWrite:
		if h.Len > volume.MaxRequest {
			return proto.EINVAL
		}
		return inside(h, size, proto.ENOSPC)
	case proto.CmdTrim:
		return inside(h, size, proto.EINVAL)
	case proto.CmdWriteZeroes:
		// No data goes to the replicas, which makes it fast, unless they have
		// to allocate.
		if h.Flags&proto.CmdFlagFastZero != 0 && h.Flags&proto.CmdFlagNoHole != 0 {
			return proto.ENOTSUP
		}
		return inside(h, size, proto.ENOSPC)
	case proto.CmdBlockStatus:
		if !s.allocation || h.Len == 0 {
			return proto.EINVAL
		}
		return inside(h, size, proto.EINVAL)
	case proto.CmdFlush:
		if h.Off != 0 || h.Len != 0 {
			return proto.EINVAL
		}
		return 0
	}
	return proto.EINVAL
}

// inside checks the range; beyond is the error for one that ends beyond the
// device.
func inside(h proto.Request, size int64, beyond proto.Errno) proto.Errno {
	if h.Off > uint64(size) || uint64(h.Len) > uint64(size)-h.Off {
		return beyond
	}
	if h.Off%volume.SectorSize != 0 || h.Len%volume.SectorSize != 0 {
		return proto.EINVAL
	}
	return 0
}

// deviceOp is the device's operation for a command that passed check.
func deviceOp(cmd proto.Command) volume.Op {
	switch cmd {
	case proto.CmdRead:
		return volume.OpRead
	case proto.CmdWrite:
		return volume.OpWrite
	case proto.CmdTrim:
		return volume.OpTrim
	case proto.CmdWriteZeroes:
		return volume.OpZero
	}
	return volume.OpFlush
}

// errnoOf maps an error of the device.
func errnoOf(err error) proto.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, volume.ErrNoSpace):
		return proto.ENOSPC
	case errors.Is(err, volume.ErrClosed):
		return proto.ESHUTDOWN
	case errors.Is(err, volume.ErrRange):
		return proto.EINVAL
	}
	return proto.EIO
}
