package nbd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

func optionBytes(opt proto.Option, data string) []byte {
	b := binary.BigEndian.AppendUint64(nil, proto.OptionMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func lengthened(s string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(len(s)))) + s
}

// answered is one answer to an option.
type answered struct {
	opt  proto.Option
	typ  proto.OptionReply
	data string
}

func parseAnswers(t *testing.T, b []byte) []answered {
	t.Helper()
	var all []answered
	for len(b) > 0 {
		if len(b) < proto.OptionReplySize || binary.BigEndian.Uint64(b) != proto.OptionReplyMagic {
			t.Fatalf("an answer begins with %x", b)
		}
		n := int(binary.BigEndian.Uint32(b[16:]))
		all = append(all, answered{
			opt: proto.Option(binary.BigEndian.Uint32(b[8:])), typ: proto.OptionReply(binary.BigEndian.Uint32(b[12:])),
			data: string(b[proto.OptionReplySize : proto.OptionReplySize+n]),
		})
		b = b[proto.OptionReplySize+n:]
	}
	return all
}

// nothing is a device of 1 MiB that does nothing, at once.
type nothing struct{}

func (nothing) Size() int64              { return 1 << 20 }
func (nothing) Submit(r *volume.Request) { r.Done(nil) }
func (nothing) Extents(_, length int64, found func(int64, bool, bool) bool) error {
	found(length, true, true)
	return nil
}

// haggle sends the client's side of a handshake and returns the server's.
func haggle(client []byte) ([]byte, session, error) {
	var out bytes.Buffer
	h := haggler{r: bufio.NewReader(bytes.NewReader(client)), w: &out, export: "disk", device: nothing{}, stopping: func() bool { return false }}
	s, err := h.run()
	return out.Bytes(), s, err
}

const greetingSize = 18

var clientFlags = []byte{0, 0, 0, proto.FlagFixedNewstyle | proto.FlagNoZeroes}

func TestOptions(t *testing.T) {
	const noInfo, oneName = "\x00\x00", "\x00\x01\x00\x01"
	query := lengthened("disk") + "\x00\x00\x00\x02" + lengthened("qemu:dirty-bitmap:x") + lengthened("base:allocation")
	ack := proto.RepAck
	for name, tc := range map[string]struct {
		options [][]byte
		want    []proto.OptionReply
	}{
		"list":                       {[][]byte{optionBytes(proto.OptList, "")}, []proto.OptionReply{proto.RepServer, ack}},
		"list with data":             {[][]byte{optionBytes(proto.OptList, "x")}, []proto.OptionReply{proto.RepErrInvalid}},
		"info":                       {[][]byte{optionBytes(proto.OptInfo, lengthened("disk")+noInfo)}, []proto.OptionReply{proto.RepInfo, proto.RepInfo, ack}},
		"info with name":             {[][]byte{optionBytes(proto.OptInfo, lengthened("")+oneName)}, []proto.OptionReply{proto.RepInfo, proto.RepInfo, proto.RepInfo, ack}},
		"info of another":            {[][]byte{optionBytes(proto.OptInfo, lengthened("tape")+noInfo)}, []proto.OptionReply{proto.RepErrUnknown}},
		"info, name too long":        {[][]byte{optionBytes(proto.OptInfo, "\x00\x00\x00\x05disk")}, []proto.OptionReply{proto.RepErrInvalid}},
		"info, too few requests":     {[][]byte{optionBytes(proto.OptInfo, lengthened("disk")+"\x00\x02\x00\x00")}, []proto.OptionReply{proto.RepErrInvalid}},
		"info, more than said":       {[][]byte{optionBytes(proto.OptInfo, lengthened("disk")+noInfo+"x")}, []proto.OptionReply{proto.RepErrInvalid}},
		"info, empty":                {[][]byte{optionBytes(proto.OptInfo, "")}, []proto.OptionReply{proto.RepErrInvalid}},
		"go to another, then list":   {[][]byte{optionBytes(proto.OptGo, lengthened("tape")+noInfo), optionBytes(proto.OptList, "")}, []proto.OptionReply{proto.RepErrUnknown, proto.RepServer, ack}},
		"TLS":                        {[][]byte{optionBytes(proto.OptStartTLS, "")}, []proto.OptionReply{proto.RepErrUnsup}},
		"unknown option":             {[][]byte{optionBytes(4711, "some data")}, []proto.OptionReply{proto.RepErrUnsup}},
		"option too long, then list": {[][]byte{optionBytes(proto.OptInfo, strings.Repeat("x", maxOption+1)), optionBytes(proto.OptList, "")}, []proto.OptionReply{proto.RepErrTooBig, proto.RepServer, ack}},
		"structured reply":           {[][]byte{optionBytes(proto.OptStructuredReply, "")}, []proto.OptionReply{ack}},
		"structured reply with data": {[][]byte{optionBytes(proto.OptStructuredReply, "x")}, []proto.OptionReply{proto.RepErrInvalid}},
		"list all contexts":          {[][]byte{optionBytes(proto.OptListMetaContext, lengthened("")+"\x00\x00\x00\x00")}, []proto.OptionReply{proto.RepMetaContext, ack}},
		"list a namespace":           {[][]byte{optionBytes(proto.OptListMetaContext, lengthened("")+"\x00\x00\x00\x01"+lengthened("base:"))}, []proto.OptionReply{proto.RepMetaContext, ack}},
		"list another namespace":     {[][]byte{optionBytes(proto.OptListMetaContext, lengthened("")+"\x00\x00\x00\x01"+lengthened("qemu:"))}, []proto.OptionReply{ack}},
		"set too early":              {[][]byte{optionBytes(proto.OptSetMetaContext, query)}, []proto.OptionReply{proto.RepErrInvalid}},
		"set":                        {[][]byte{optionBytes(proto.OptStructuredReply, ""), optionBytes(proto.OptSetMetaContext, query)}, []proto.OptionReply{ack, proto.RepMetaContext, ack}},
		"set a namespace":            {[][]byte{optionBytes(proto.OptStructuredReply, ""), optionBytes(proto.OptSetMetaContext, lengthened("")+"\x00\x00\x00\x01"+lengthened("base:"))}, []proto.OptionReply{ack, ack}},
		"set on another":             {[][]byte{optionBytes(proto.OptStructuredReply, ""), optionBytes(proto.OptSetMetaContext, lengthened("tape")+query[8:])}, []proto.OptionReply{ack, proto.RepErrUnknown}},
		"query without namespace":    {[][]byte{optionBytes(proto.OptListMetaContext, lengthened("")+"\x00\x00\x00\x01"+lengthened("base"))}, []proto.OptionReply{proto.RepErrInvalid}},
		"4 billion queries":          {[][]byte{optionBytes(proto.OptListMetaContext, lengthened("")+"\xff\xff\xff\xff")}, []proto.OptionReply{proto.RepErrInvalid}},
	} {
		t.Run(name, func(t *testing.T) {
			client := slices.Concat(clientFlags, slices.Concat(tc.options...), optionBytes(proto.OptAbort, "ignored"))
			out, _, err := haggle(client)
			if err != errLeft {
				t.Fatalf("after abort: %v", err)
			}
			var got []proto.OptionReply
			for _, a := range parseAnswers(t, out[greetingSize:]) {
				got = append(got, a.typ)
			}
			if want := append(tc.want, ack); !slices.Equal(got, want) {
				t.Errorf("answers %x, want %x", got, want)
			}
		})
	}
}

func TestContextsMustBeSelectedLast(t *testing.T) {
	set := optionBytes(proto.OptSetMetaContext, lengthened("")+"\x00\x00\x00\x01"+lengthened(proto.BaseAllocation))
	bad := optionBytes(proto.OptSetMetaContext, lengthened("tape")+"\x00\x00\x00\x00")
	none := optionBytes(proto.OptSetMetaContext, lengthened("")+"\x00\x00\x00\x00")
	list := optionBytes(proto.OptListMetaContext, lengthened("disk")+"\x00\x00\x00\x00")
	named := optionBytes(proto.OptGo, lengthened("disk")+"\x00\x00")
	structured, gone := optionBytes(proto.OptStructuredReply, ""), optionBytes(proto.OptGo, lengthened("")+"\x00\x00")
	for name, tc := range map[string]struct {
		options []byte
		want    session
	}{
		"nothing":           {gone, session{}},
		"structured":        {slices.Concat(structured, gone), session{structured: true}},
		"selected":          {slices.Concat(structured, set, gone), session{structured: true, allocation: true}},
		"undone by a wrong": {slices.Concat(structured, set, bad, gone), session{structured: true}},
		"undone by none":    {slices.Concat(structured, set, none, gone), session{structured: true}},
		"of another name":   {slices.Concat(structured, set, named), session{structured: true}},
		"listed later":      {slices.Concat(structured, set, list, gone), session{structured: true, allocation: true}},
		"old, of its name":  {slices.Concat(structured, set, optionBytes(proto.OptExportName, "")), session{structured: true, allocation: true}},
		"old, of another":   {slices.Concat(structured, set, optionBytes(proto.OptExportName, "disk")), session{structured: true}},
	} {
		t.Run(name, func(t *testing.T) {
			_, got, err := haggle(slices.Concat(clientFlags, tc.options))
			if err != nil || got != tc.want {
				t.Errorf("agreed on %+v (%v)", got, err)
			}
		})
	}
}

// A server that stops says so to whoever haggles, but lets them leave.
func TestStoppingRefusesOptions(t *testing.T) {
	for name, tc := range map[string]struct {
		option []byte
		want   []proto.OptionReply
	}{
		"list":        {optionBytes(proto.OptList, ""), []proto.OptionReply{proto.RepErrShutdown}},
		"go":          {optionBytes(proto.OptGo, lengthened("disk")+"\x00\x00"), []proto.OptionReply{proto.RepErrShutdown}},
		"unknown":     {optionBytes(4711, ""), []proto.OptionReply{proto.RepErrShutdown}},
		"abort":       {optionBytes(proto.OptAbort, ""), []proto.OptionReply{proto.RepAck}},
		"export name": {optionBytes(proto.OptExportName, "disk"), nil},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			h := haggler{
				r: bufio.NewReader(bytes.NewReader(slices.Concat(clientFlags, tc.option))), w: &out,
				export: "disk", device: nothing{}, stopping: func() bool { return true },
			}
			if _, err := h.run(); err == nil {
				t.Error("the transmission phase began")
			}
			var got []proto.OptionReply
			for _, a := range parseAnswers(t, out.Bytes()[greetingSize:]) {
				got = append(got, a.typ)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("answers %x, want %x", got, tc.want)
			}
		})
	}
}

// stopper is a device whose server stops with its first request.
type stopper struct {
	nothing
	server    *Server
	submitted int
}

func (d *stopper) Submit(r *volume.Request) {
	d.submitted++
	close(d.server.stopping)
	d.nothing.Submit(r)
}

func TestProvisionEndsWhenTheServerStops(t *testing.T) {
	s := &Server{stopping: make(chan struct{})}
	d := &stopper{server: s}
	buf := make([]byte, provisionPiece)
	r := &request{dev: volume.Request{Len: 2 * provisionPiece}, buf: &buf}
	if err := (&conn{server: s, device: d}).provision(r); err != volume.ErrClosed || d.submitted != 1 {
		t.Errorf("%v after %d requests", err, d.submitted)
	}
}

func TestClippedMessage(t *testing.T) {
	long := strings.Repeat("x", maxMessage-1) + "é"
	for in, want := range map[string]string{
		"":                  "",
		"volume é is full":  "volume é is full",
		long:                long[:maxMessage-1],
		"nul\x00in between": "nulin between",
		"not \xff UTF-8":    "not  UTF-8",
	} {
		if got := clipped(in); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}

func TestExportNamePadding(t *testing.T) {
	for flags, want := range map[byte]int{
		proto.FlagFixedNewstyle:                      10 + proto.ExportNamePadding,
		proto.FlagFixedNewstyle | proto.FlagNoZeroes: 10,
		0: 10 + proto.ExportNamePadding,
	} {
		out, _, err := haggle(slices.Concat([]byte{0, 0, 0, flags}, optionBytes(proto.OptExportName, "disk")))
		if got := len(out) - greetingSize; err != nil || got != want {
			t.Errorf("client flags %d: %d bytes (%v), want %d", flags, got, err, want)
		}
	}
}

func FuzzHandshake(f *testing.F) {
	f.Add(slices.Concat(clientFlags, optionBytes(proto.OptGo, lengthened("disk")+"\x00\x01\x00\x03")))
	f.Add(slices.Concat(clientFlags, optionBytes(proto.OptStructuredReply, ""),
		optionBytes(proto.OptSetMetaContext, lengthened("")+"\x00\x00\x00\x01"+lengthened(proto.BaseAllocation)),
		optionBytes(proto.OptExportName, "")))
	f.Add(slices.Concat(clientFlags, optionBytes(proto.OptList, ""), optionBytes(proto.OptAbort, "")))
	for _, opt := range []proto.Option{proto.OptInfo, proto.OptGo, proto.OptListMetaContext, proto.OptSetMetaContext} {
		f.Add(slices.Concat(clientFlags, optionBytes(proto.OptStructuredReply, ""),
			optionBytes(opt, lengthened("disk")+"\x00\x02\x00\x01\x00\x03"),
			optionBytes(opt, lengthened("disk")+"\x00\x00\x00\x02"+lengthened("base:")+lengthened("qemu:allocation-depth")),
			optionBytes(opt, "\xff\xff\xff\xffdisk"), optionBytes(proto.OptGo, lengthened("disk")+"\x00\x00")))
	}
	f.Add(slices.Concat(clientFlags, optionBytes(proto.OptStartTLS, ""), optionBytes(11, "x"), optionBytes(proto.OptExportName, "disk")))
	f.Fuzz(func(t *testing.T, client []byte) {
		out, s, err := haggle(client)
		if len(out) < greetingSize {
			t.Fatal("no greeting")
		}
		if s.allocation && !s.structured {
			t.Error("contexts without structured replies")
		}
		// The answer to OptExportName has another form and comes last.
		if err != nil {
			parseAnswers(t, out[greetingSize:])
		}
	})
}

// FuzzTransmission sends bytes as requests to a connection. It must answer in
// the protocol's form, request by request, and end.
func FuzzTransmission(f *testing.F) {
	for _, h := range []proto.Request{
		{Command: proto.CmdRead, Len: 4096},
		{Command: proto.CmdWrite, Len: 512, Off: 1 << 40},
		{Command: proto.CmdFlush},
		{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagFastZero, Len: 1 << 19},
		{Command: proto.CmdBlockStatus, Len: 1 << 20, Flags: proto.CmdFlagReqOne},
		{Command: proto.CmdTrim, Off: 1<<64 - 512, Len: 1024},
		{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagNoHole | proto.CmdFlagFUA, Off: 512, Len: 1 << 19},
		{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagNoHole | proto.CmdFlagFastZero, Len: 512},
		{Command: proto.CmdRead, Flags: proto.CmdFlagDF, Off: 1<<20 - 512, Len: 1<<32 - 512},
		{Command: proto.CmdBlockStatus, Off: 512, Len: 1<<32 - 512},
		{Command: proto.CmdCache, Len: 4096},
	} {
		b := append(h.Append(nil), make([]byte, 512)...)
		f.Add(append(b, proto.Request{Command: proto.CmdDisc}.Append(nil)...), true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, requests []byte, structured bool) {
		s := &Server{opts: Options{Device: nothing{}}, log: slog.New(slog.DiscardHandler), stopping: make(chan struct{})}
		ours, theirs := socketPair(t)
		c := newConn(s, 1, ours)
		c.session = session{structured: structured, allocation: structured}
		go func() {
			_, _ = theirs.Write(requests)
			_ = theirs.CloseWrite()
		}()
		answers := make(chan []byte)
		go func() {
			b, _ := io.ReadAll(theirs)
			answers <- b
		}()
		_ = c.transmit()
		_ = ours.Close()
		if c.flying != 0 || c.bytes != 0 {
			t.Errorf("%d requests with %d bytes were not released", c.flying, c.bytes)
		}
		checkAnswers(t, <-answers, wholeRequests(requests), structured)
	})
}

func socketPair(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		t.Cleanup(func() { _ = c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// wholeRequests are those that must be answered.
func wholeRequests(b []byte) []proto.Request {
	var all []proto.Request
	for len(b) >= proto.RequestSize {
		h, ok := proto.ParseRequest(b)
		b = b[proto.RequestSize:]
		if !ok || h.Command == proto.CmdDisc {
			break
		}
		if h.Command == proto.CmdWrite {
			if uint64(len(b)) < uint64(h.Len) {
				break
			}
			b = b[h.Len:]
		}
		all = append(all, h)
	}
	return all
}

// checkAnswers expects answers in order: the device nothing is done at once.
func checkAnswers(t *testing.T, b []byte, requests []proto.Request, structured bool) {
	t.Helper()
	for _, h := range requests {
		if len(b) < proto.SimpleReplySize {
			t.Fatalf("%+v has no answer", h)
		}
		if cookie := binary.BigEndian.Uint64(b[8:]); cookie != h.Cookie {
			t.Fatalf("%+v is answered as %d", h, cookie)
		}
		simple := binary.BigEndian.Uint32(b) == proto.SimpleReplyMagic
		n := proto.SimpleReplySize
		switch {
		case simple && structured && h.Command == proto.CmdRead:
			t.Fatalf("%+v got a simple reply", h)
		case simple && h.Command == proto.CmdRead && binary.BigEndian.Uint32(b[4:]) == 0:
			n += int(h.Len)
		case !simple && !structured:
			t.Fatalf("%+v is answered with %x", h, b[:4])
		case !simple:
			n = proto.StructuredReplySize + int(binary.BigEndian.Uint32(b[16:]))
		}
		if len(b) < n {
			t.Fatalf("%+v has an answer of %d bytes instead of %d", h, len(b), n)
		}
		b = b[n:]
	}
	if len(b) > 0 {
		t.Fatalf("%x was not asked for", b)
	}
}

// TestRestComesFirst: of an answer that the client's socket took only a part of,
// the rest goes out before the next one, also if the writer had that in its
// hands already when the first was begun.
func TestRestComesFirst(t *testing.T) {
	s := &Server{opts: Options{Device: nothing{}}, log: slog.New(slog.DiscardHandler), stopping: make(chan struct{})}
	ours, theirs := socketPair(t)
	c := newConn(s, 1, ours)
	var wg sync.WaitGroup
	c.writing.Lock() // as answerNow does while it writes the first
	wg.Go(c.write)
	r := c.take(0)
	r.cmd, r.cookie = proto.CmdFlush, 4711
	r.complete(nil)
	for taken := false; !taken; runtime.Gosched() {
		c.mu.Lock()
		taken = len(c.ready) == 0
		c.mu.Unlock()
	}
	rest := []byte("the rest of the first answer")
	c.mu.Lock()
	c.rest = rest
	c.mu.Unlock()
	c.writing.Unlock()
	if err := theirs.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil { // a hang, not a measure
		t.Fatal(err)
	}
	got := make([]byte, len(rest)+proto.SimpleReplySize)
	if _, err := io.ReadFull(theirs, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(got, rest) || binary.BigEndian.Uint64(got[len(rest)+8:]) != 4711 {
		t.Errorf("the client got %q", got)
	}
	c.finish()
	wg.Wait()
}

func TestBufferClasses(t *testing.T) {
	var pool buffers
	for n, want := range map[int]int64{0: 4096, 1: 4096, 4096: 4096, 4097: 8192, 1 << 20: 1 << 20, volume.MaxRequest: volume.MaxRequest} {
		b := pool.get(n)
		if int64(len(*b)) != want || bufferSize(n) != want {
			t.Errorf("%d bytes get a buffer of %d, counted as %d; want %d", n, len(*b), bufferSize(n), want)
		}
		pool.put(b)
	}
}

func TestStatusAnswer(t *testing.T) {
	type extent struct {
		n          int64
		hole, zero bool
	}
	for name, tc := range map[string]struct {
		length int64
		one    bool
		found  []extent
		want   []uint32 // length, flags ...
	}{
		"nothing known":     {4096, false, nil, []uint32{4096, 0}},
		"to the end":        {4096, false, []extent{{512, true, true}, {3584, false, false}, {512, true, true}}, []uint32{512, 3, 3584, 0}},
		"beyond the end":    {4096, false, []extent{{512, false, true}, {1 << 20, true, false}}, []uint32{512, 2, 1 << 20, 1}},
		"the same again":    {8192, false, []extent{{512, true, true}, {512, true, true}, {1024, false, false}, {1 << 20, false, false}}, []uint32{1024, 3, 1<<20 + 1024, 0}},
		"one in parts":      {4096, true, []extent{{512, true, true}, {512, true, true}, {512, false, false}}, []uint32{1024, 3}},
		"one, too long":     {1024, true, []extent{{512, true, true}, {1024, true, true}}, []uint32{1024, 3}},
		"the same, > 2^32":  {1 << 31, false, []extent{{512, true, true}, {1 << 40, true, true}, {512, false, false}}, []uint32{maxExtentLen, 3}},
		"only one":          {4096, true, []extent{{1 << 20, true, true}, {512, false, false}}, []uint32{4096, 3}},
		"more than 32 bits": {1 << 31, false, []extent{{1 << 40, true, true}, {512, false, false}}, []uint32{maxExtentLen, 3}},
	} {
		t.Run(name, func(t *testing.T) {
			a := newStatusAnswer(nil, tc.length, tc.one)
			for _, e := range tc.found {
				if !a.add(e.n, e.hole, e.zero) {
					break
				}
			}
			want := binary.BigEndian.AppendUint32(nil, allocationID)
			for _, v := range tc.want {
				want = binary.BigEndian.AppendUint32(want, v)
			}
			if got := a.payload(); !bytes.Equal(got, want) {
				t.Errorf("%x, want %x", got, want)
			}
		})
	}
}
