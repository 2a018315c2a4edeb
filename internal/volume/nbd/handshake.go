package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// preferredBlock is the size below which a request costs as much as one of
// that size, in bytes.
const preferredBlock = 4096

// maxOption is the longest option that is looked at, in bytes. It has room for
// the longest export name and queries beside it.
const maxOption = 64 << 10

// errLeft says that the client ended the handshake as it may.
var errLeft = errors.New("the client left")

// haggler is the server's side of one fixed newstyle handshake, section
// "Handshake".
type haggler struct {
	r      *bufio.Reader
	w      io.Writer
	export string
	device volume.Device
	// stopping tells that the server takes no new clients.
	stopping func() bool

	noZeroes bool
	session  session
	// contextsOf is the name under which metadata contexts were selected.
	contextsOf string
	reply      []byte
}

// run returns what was agreed once the client chose the export. Errors:
// errLeft; any other means that the client broke the protocol or went away.
func (h *haggler) run() (session, error) {
	if err := h.greet(); err != nil {
		return session{}, err
	}
	for {
		opt, data, err := h.next()
		if err != nil {
			return session{}, err
		}
		chosen, err := h.answer(opt, data)
		if err != nil || chosen {
			return h.session, err
		}
	}
}

func (h *haggler) greet() error {
	const ours = proto.FlagFixedNewstyle | proto.FlagNoZeroes
	b := binary.BigEndian.AppendUint64(nil, proto.InitMagic)
	b = binary.BigEndian.AppendUint64(b, proto.OptionMagic)
	b = binary.BigEndian.AppendUint16(b, ours)
	if _, err := h.w.Write(b); err != nil {
		return fmt.Errorf("greet: %w", err)
	}
	var flags [4]byte
	if _, err := io.ReadFull(h.r, flags[:]); err != nil {
		return fmt.Errorf("read client flags: %w", err)
	}
	theirs := binary.BigEndian.Uint32(flags[:])
	if theirs&^uint32(ours) != 0 {
		return fmt.Errorf("unknown client flags %#x", theirs)
	}
	h.noZeroes = theirs&proto.FlagNoZeroes != 0
	return nil
}

// next reads an option. Data is nil for one that is too long to look at.
func (h *haggler) next() (proto.Option, []byte, error) {
	var head [proto.OptionSize]byte
	if _, err := io.ReadFull(h.r, head[:]); err != nil {
		return 0, nil, fmt.Errorf("read option: %w", err)
	}
	if magic := binary.BigEndian.Uint64(head[:]); magic != proto.OptionMagic {
		return 0, nil, fmt.Errorf("option begins with %#x", magic)
	}
	opt := proto.Option(binary.BigEndian.Uint32(head[8:]))
	length := binary.BigEndian.Uint32(head[12:])
	if length > maxOption {
		if _, err := io.CopyN(io.Discard, h.r, int64(length)); err != nil {
			return 0, nil, fmt.Errorf("skip option %d of %d bytes: %w", opt, length, err)
		}
		return opt, nil, nil
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(h.r, data); err != nil {
		return 0, nil, fmt.Errorf("read option %d of %d bytes: %w", opt, length, err)
	}
	return opt, data, nil
}

// answer answers one option and tells whether the transmission phase begins.
func (h *haggler) answer(opt proto.Option, data []byte) (bool, error) {
	h.reply = h.reply[:0]
	chosen := false
	switch {
	case opt == proto.OptExportName:
		return true, h.exportName(data)
	case opt == proto.OptAbort:
		h.add(opt, proto.RepAck, nil)
	case h.stopping():
		h.fail(opt, proto.RepErrShutdown, "the server stops")
	case data == nil:
		h.fail(opt, proto.RepErrTooBig, "option is too long")
	case opt == proto.OptList:
		h.list(opt, data)
	case opt == proto.OptInfo:
		h.info(opt, data)
	case opt == proto.OptGo:
		chosen = h.info(opt, data)
	case opt == proto.OptStructuredReply:
		h.structuredReply(opt, data)
	case h.knowsExtents() && opt == proto.OptListMetaContext:
		h.listContexts(opt, data)
	case h.knowsExtents() && opt == proto.OptSetMetaContext:
		h.setContexts(opt, data)
	default:
		h.fail(opt, proto.RepErrUnsup, "option is not supported")
	}
	if _, err := h.w.Write(h.reply); err != nil {
		return false, fmt.Errorf("answer option %d: %w", opt, err)
	}
	if opt == proto.OptAbort {
		return false, errLeft
	}
	return chosen, nil
}

// add appends an answer; answers go out together once the option is done.
func (h *haggler) add(opt proto.Option, typ proto.OptionReply, data []byte) {
	h.reply = binary.BigEndian.AppendUint64(h.reply, proto.OptionReplyMagic)
	h.reply = binary.BigEndian.AppendUint32(h.reply, uint32(opt))
	h.reply = binary.BigEndian.AppendUint32(h.reply, uint32(typ))
	h.reply = binary.BigEndian.AppendUint32(h.reply, uint32(len(data)))
	h.reply = append(h.reply, data...)
}

func (h *haggler) fail(opt proto.Option, typ proto.OptionReply, why string) {
	h.add(opt, typ, []byte(why))
}

func (h *haggler) serves(export string) bool { return export == "" || export == h.export }

// choose begins the transmission phase with an export. Contexts that were
// selected under another name of it don't count.
func (h *haggler) choose(export string) {
	h.session.allocation = h.session.allocation && h.contextsOf == export
}

func (h *haggler) knowsExtents() bool {
	_, ok := h.device.(Extents)
	return ok
}

// exportName has no way to say no but to hang up.
func (h *haggler) exportName(data []byte) error {
	if data == nil || !h.serves(string(data)) || h.stopping() {
		return fmt.Errorf("there is no export %.100q", data)
	}
	h.choose(string(data))
	b := binary.BigEndian.AppendUint64(nil, uint64(h.device.Size()))
	b = binary.BigEndian.AppendUint16(b, h.flags())
	if !h.noZeroes {
		b = append(b, make([]byte, proto.ExportNamePadding)...)
	}
	if _, err := h.w.Write(b); err != nil {
		return fmt.Errorf("answer export name: %w", err)
	}
	return nil
}

func (h *haggler) list(opt proto.Option, data []byte) {
	if len(data) != 0 {
		h.fail(opt, proto.RepErrInvalid, "list has no data")
		return
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(len(h.export)))
	h.add(opt, proto.RepServer, append(b, h.export...))
	h.add(opt, proto.RepAck, nil)
}

// info answers OptInfo and OptGo and tells whether it could.
func (h *haggler) info(opt proto.Option, data []byte) bool {
	req, ok := parseInfoRequest(data)
	switch {
	case !ok:
		h.fail(opt, proto.RepErrInvalid, "malformed request for information")
		return false
	case !h.serves(req.export):
		h.fail(opt, proto.RepErrUnknown, "there is no such export")
		return false
	}
	b := binary.BigEndian.AppendUint16(nil, proto.InfoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(h.device.Size()))
	b = binary.BigEndian.AppendUint16(b, h.flags())
	h.add(opt, proto.RepInfo, b)

	b = binary.BigEndian.AppendUint16(b[:0], proto.InfoBlockSize)
	b = binary.BigEndian.AppendUint32(b, volume.SectorSize)
	b = binary.BigEndian.AppendUint32(b, preferredBlock)
	b = binary.BigEndian.AppendUint32(b, volume.MaxRequest)
	h.add(opt, proto.RepInfo, b)

	if slices.Contains(req.wanted, proto.InfoName) {
		b = binary.BigEndian.AppendUint16(b[:0], proto.InfoName)
		h.add(opt, proto.RepInfo, append(b, h.export...))
	}
	h.add(opt, proto.RepAck, nil)
	if opt == proto.OptGo {
		h.choose(req.export)
	}
	return true
}

// flags are the transmission flags. Several connections are one to the
// device: it has no cache that differs among them, and a flush covers all.
func (h *haggler) flags() uint16 {
	flags := proto.FlagHasFlags | proto.FlagSendFlush | proto.FlagSendFUA |
		proto.FlagSendTrim | proto.FlagSendWriteZeroes | proto.FlagSendFastZero |
		proto.FlagCanMultiConn
	if h.session.structured {
		flags |= proto.FlagSendDF
	}
	return flags
}

func (h *haggler) structuredReply(opt proto.Option, data []byte) {
	if len(data) != 0 {
		h.fail(opt, proto.RepErrInvalid, "structured reply has no data")
		return
	}
	h.session.structured = true
	h.add(opt, proto.RepAck, nil)
}

func (h *haggler) listContexts(opt proto.Option, data []byte) {
	if !h.contextsFor(opt, data, func(q contextQuery) bool {
		return len(q.queries) == 0 || slices.Contains(q.queries, proto.BaseAllocation) || slices.Contains(q.queries, "base:")
	}, 0) {
		return
	}
	h.add(opt, proto.RepAck, nil)
}

func (h *haggler) setContexts(opt proto.Option, data []byte) {
	h.session.allocation = false
	if !h.session.structured {
		h.fail(opt, proto.RepErrInvalid, "metadata contexts need structured replies")
		return
	}
	selects := func(q contextQuery) bool {
		h.session.allocation, h.contextsOf = slices.Contains(q.queries, proto.BaseAllocation), q.export
		return h.session.allocation
	}
	if !h.contextsFor(opt, data, selects, allocationID) {
		return
	}
	h.add(opt, proto.RepAck, nil)
}

// contextsFor answers with the one context there is, if the queries match it.
// It is false when the request was answered with an error.
func (h *haggler) contextsFor(opt proto.Option, data []byte, match func(contextQuery) bool, id uint32) bool {
	q, ok := parseContextQuery(data)
	switch {
	case !ok:
		h.fail(opt, proto.RepErrInvalid, "malformed query for metadata contexts")
		return false
	case !h.serves(q.export):
		h.fail(opt, proto.RepErrUnknown, "there is no such export")
		return false
	}
	if match(q) {
		b := binary.BigEndian.AppendUint32(nil, id)
		h.add(opt, proto.RepMetaContext, append(b, proto.BaseAllocation...))
	}
	return true
}

// infoRequest is the data of OptInfo and OptGo.
type infoRequest struct {
	export string
	wanted []uint16
}

func parseInfoRequest(data []byte) (infoRequest, bool) {
	p := parser{data: data, ok: true}
	req := infoRequest{export: p.string()}
	n := int(p.uint16())
	for range n {
		if !p.ok {
			break
		}
		req.wanted = append(req.wanted, p.uint16())
	}
	return req, p.finished()
}

// contextQuery is the data of OptListMetaContext and OptSetMetaContext.
type contextQuery struct {
	export  string
	queries []string
}

func parseContextQuery(data []byte) (contextQuery, bool) {
	p := parser{data: data, ok: true}
	q := contextQuery{export: p.string()}
	n := p.uint32()
	for ; n > 0 && p.ok; n-- {
		query := p.string()
		if !strings.Contains(query, ":") {
			return q, false
		}
		q.queries = append(q.queries, query)
	}
	return q, p.finished()
}

// parser takes an option's data apart. Once something is missing, ok is false
// and all that follows is empty.
type parser struct {
	data []byte
	ok   bool
}

func (p *parser) take(n int) []byte {
	if !p.ok || n > len(p.data) {
		p.ok = false
		return nil
	}
	b := p.data[:n]
	p.data = p.data[n:]
	return b
}

func (p *parser) uint16() uint16 {
	if b := p.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (p *parser) uint32() uint32 {
	if b := p.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// string is preceded by its length, 32 bits.
func (p *parser) string() string {
	n := p.uint32()
	if n > proto.MaxString {
		p.ok = false
		return ""
	}
	return string(p.take(int(n)))
}

func (p *parser) finished() bool { return p.ok && len(p.data) == 0 }
