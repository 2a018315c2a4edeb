package nbd

import (
	"encoding/binary"
	"strings"

	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// maxMessage is how much of an error's text goes to the client, in bytes.
const maxMessage = 256

// reply is what a request is answered with.
type reply struct {
	cookie  uint64
	cmd     proto.Command
	off     int64
	payload int // bytes that follow the head
	errno   proto.Errno
	message string // for people; of an error
}

// appendReply appends all of an answer but its payload. Reads and errors are
// answered with a chunk when structured replies were agreed on, the rest with
// the shorter simple reply, which is allowed then, too.
func appendReply(b []byte, structured bool, r reply) []byte {
	switch {
	case !structured:
		return appendSimple(b, r)
	case r.errno != 0:
		message := clipped(r.message)
		b = appendChunk(b, proto.ReplyError, r.cookie, 6+len(message))
		b = binary.BigEndian.AppendUint32(b, uint32(r.errno))
		b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
		return append(b, message...)
	case r.cmd == proto.CmdBlockStatus:
		return appendChunk(b, proto.ReplyBlockStatus, r.cookie, r.payload)
	case r.cmd == proto.CmdRead && r.payload == 0:
		return appendChunk(b, proto.ReplyNone, r.cookie, 0)
	case r.cmd == proto.CmdRead:
		b = appendChunk(b, proto.ReplyOffsetData, r.cookie, 8+r.payload)
		return binary.BigEndian.AppendUint64(b, uint64(r.off))
	}
	return appendSimple(b, r)
}

// clipped makes of a text what a client takes: UTF-8 without NUL, and short.
func clipped(message string) string {
	message = message[:min(len(message), maxMessage)]
	return strings.ReplaceAll(strings.ToValidUTF8(message, ""), "\x00", "")
}

func appendSimple(b []byte, r reply) []byte {
	b = binary.BigEndian.AppendUint32(b, proto.SimpleReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(r.errno))
	return binary.BigEndian.AppendUint64(b, r.cookie)
}

// appendChunk appends the head of the only chunk of an answer.
func appendChunk(b []byte, typ uint16, cookie uint64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, proto.StructuredReplyMagic)
	b = binary.BigEndian.AppendUint16(b, proto.ReplyFlagDone)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}
