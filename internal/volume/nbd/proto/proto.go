// Package proto holds the numbers of the NBD protocol that the server (nbd/)
// and the client for tests (nbdtest/) use.
//
// What lives here: constants and the request header. What must not: any
// behaviour; neither side may learn from the other what to do.
//
// The names follow doc/proto.md of https://github.com/NetworkBlockDevice/nbd,
// section "Values", without their NBD_ prefix. All numbers are big-endian on
// the wire.
package proto

import "encoding/binary"

// Magic numbers.
const (
	InitMagic            uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	OptionMagic          uint64 = 0x49484156454F5054 // "IHAVEOPT"
	OptionReplyMagic     uint64 = 0x3e889045565a9
	RequestMagic         uint32 = 0x25609513
	SimpleReplyMagic     uint32 = 0x67446698
	StructuredReplyMagic uint32 = 0x668e33ef
)

// Handshake flags of the server (16 bits) and the client (32 bits).
const (
	FlagFixedNewstyle = 1 << 0
	FlagNoZeroes      = 1 << 1
)

// ExportNamePadding is how many zeroes follow the answer to OptExportName
// unless both sides set FlagNoZeroes.
const ExportNamePadding = 124

// MaxString is the longest string, in bytes.
const MaxString = 4096

// Transmission flags.
const (
	FlagHasFlags        uint16 = 1 << 0
	FlagReadOnly        uint16 = 1 << 1
	FlagSendFlush       uint16 = 1 << 2
	FlagSendFUA         uint16 = 1 << 3
	FlagRotational      uint16 = 1 << 4
	FlagSendTrim        uint16 = 1 << 5
	FlagSendWriteZeroes uint16 = 1 << 6
	FlagSendDF          uint16 = 1 << 7
	FlagCanMultiConn    uint16 = 1 << 8
	FlagSendResize      uint16 = 1 << 9
	FlagSendCache       uint16 = 1 << 10
	FlagSendFastZero    uint16 = 1 << 11
)

// Option is what a client asks for in the handshake.
type Option uint32

// The options.
const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
)

// OptionReply is the type of an answer to an option.
type OptionReply uint32

// The types of answers. Those with bit 31 are errors.
const (
	RepAck         OptionReply = 1
	RepServer      OptionReply = 2
	RepInfo        OptionReply = 3
	RepMetaContext OptionReply = 4
	RepErrUnsup    OptionReply = 1<<31 + 1
	RepErrPolicy   OptionReply = 1<<31 + 2
	RepErrInvalid  OptionReply = 1<<31 + 3
	RepErrUnknown  OptionReply = 1<<31 + 6
	RepErrShutdown OptionReply = 1<<31 + 7
	RepErrTooBig   OptionReply = 1<<31 + 9
)

// IsError tells whether the option failed.
func (r OptionReply) IsError() bool { return r&(1<<31) != 0 }

// Kinds of information in RepInfo.
const (
	InfoExport      uint16 = 0
	InfoName        uint16 = 1
	InfoDescription uint16 = 2
	InfoBlockSize   uint16 = 3
)

// Command is what a client asks for in the transmission phase.
type Command uint16

// The commands.
const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisc        Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
)

// CommandFlags go with a command.
type CommandFlags uint16

// The command flags.
const (
	CmdFlagFUA      CommandFlags = 1 << 0
	CmdFlagNoHole   CommandFlags = 1 << 1
	CmdFlagDF       CommandFlags = 1 << 2
	CmdFlagReqOne   CommandFlags = 1 << 3
	CmdFlagFastZero CommandFlags = 1 << 4
)

// ReplyFlagDone marks the last chunk of a structured reply.
const ReplyFlagDone uint16 = 1 << 0

// Types of chunks. Those with bit 15 are errors.
const (
	ReplyNone        uint16 = 0
	ReplyOffsetData  uint16 = 1
	ReplyOffsetHole  uint16 = 2
	ReplyBlockStatus uint16 = 5
	ReplyError       uint16 = 1<<15 + 1
	ReplyErrorOffset uint16 = 1<<15 + 2
)

// Flags of an extent in the context base:allocation.
const (
	StateHole uint32 = 1 << 0
	StateZero uint32 = 1 << 1
)

// BaseAllocation is the metadata context that tells what is allocated.
const BaseAllocation = "base:allocation"

// Errno is the error in a reply; 0 is success.
type Errno uint32

// The errors, "Error values" in the protocol's document.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Sizes of headers, in bytes.
const (
	OptionSize          = 16
	OptionReplySize     = 20
	RequestSize         = 28
	SimpleReplySize     = 16
	StructuredReplySize = 20
)

// Request is the header of a request, without its magic number.
type Request struct {
	Flags   CommandFlags
	Command Command
	Cookie  uint64
	Off     uint64
	Len     uint32
}

// ParseRequest reads a header of RequestSize bytes; false when it does not
// begin with the magic number.
func ParseRequest(b []byte) (Request, bool) {
	_ = b[RequestSize-1]
	return Request{
		Flags:   CommandFlags(binary.BigEndian.Uint16(b[4:])),
		Command: Command(binary.BigEndian.Uint16(b[6:])),
		Cookie:  binary.BigEndian.Uint64(b[8:]),
		Off:     binary.BigEndian.Uint64(b[16:]),
		Len:     binary.BigEndian.Uint32(b[24:]),
	}, binary.BigEndian.Uint32(b) == RequestMagic
}

// Append appends the header with its magic number.
func (r Request) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, RequestMagic)
	b = binary.BigEndian.AppendUint16(b, uint16(r.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.Command))
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Off)
	return binary.BigEndian.AppendUint32(b, r.Len)
}
