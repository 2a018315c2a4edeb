package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd"
	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
	"github.com/argon-cluster/argon/internal/volume/volumetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testSize = 4 << 20

// plain hides what else a device implements.
type plain struct{ volume.Device }

func socketPath(t testing.TB) string {
	t.Helper()
	// Shorter than t.TempDir, for the sake of the kernel's limit.
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// serve serves the device until the test ends.
func serve(t testing.TB, d volume.Device) (string, *nbd.Server) {
	t.Helper()
	path := socketPath(t)
	s, err := nbd.Serve(context.Background(), nbd.Options{
		SocketPath: path, Device: d, Export: "disk", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return path, s
}

func memDevice(t testing.TB) *volumetest.MemDevice {
	t.Helper()
	d := volumetest.New(testSize, 1)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func dial(t testing.TB, path string, opts nbdtest.Options) *nbdtest.Client {
	t.Helper()
	c, err := nbdtest.Dial(context.Background(), path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Abort)
	return c
}

func pattern(n int, first byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i%251)
	}
	return b
}

// dialects are all ways to connect.
var dialects = map[string]nbdtest.Options{
	"structured replies": {Export: "disk"},
	"default export":     {},
	"simple replies":     {Simple: true},
	"old handshake":      {OldHandshake: true, Simple: true, Export: "disk"},
}

func TestReadsWhatWasWritten(t *testing.T) {
	for name, opts := range dialects {
		t.Run(name, func(t *testing.T) {
			d := memDevice(t)
			path, _ := serve(t, d)
			c := dial(t, path, opts)
			if c.Size != testSize {
				t.Fatalf("size %d", c.Size)
			}
			for _, n := range []int{512, 4096, 5120, 1 << 20} {
				want := pattern(n, byte(n>>9))
				if _, err := c.WriteAt(want, 1024); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, n)
				if _, err := c.ReadAt(got, 1024); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Fatalf("%d bytes differ from what was written", n)
				}
			}
			if err := c.Zero(1024, 4096); err != nil {
				t.Fatal(err)
			}
			if err := c.Trim(8192, 4096); err != nil {
				t.Fatal(err)
			}
			got := d.Bytes()
			if !bytes.Equal(got[1024:5120], make([]byte, 4096)) || !bytes.Equal(got[8192:12288], make([]byte, 4096)) {
				t.Fatal("zeroed or trimmed ranges hold data")
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestAnnounces(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	bare, _ := serve(t, plain{d})
	common := proto.FlagHasFlags | proto.FlagSendFlush | proto.FlagSendFUA | proto.FlagSendTrim |
		proto.FlagSendWriteZeroes | proto.FlagSendFastZero | proto.FlagCanMultiConn
	for name, tc := range map[string]struct {
		path     string
		opts     nbdtest.Options
		flags    uint16
		contexts bool
	}{
		"structured":       {path, nbdtest.Options{}, common | proto.FlagSendDF, true},
		"without extents":  {bare, nbdtest.Options{}, common | proto.FlagSendDF, false},
		"simple":           {path, nbdtest.Options{Simple: true}, common, false},
		"by its name only": {path, nbdtest.Options{OldHandshake: true}, common, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, tc.path, tc.opts)
			if c.Flags != tc.flags || c.Contexts != tc.contexts {
				t.Errorf("flags %#x, contexts %v; want %#x, %v", c.Flags, c.Contexts, tc.flags, tc.contexts)
			}
			if !tc.opts.OldHandshake && (c.MinBlock != volume.SectorSize || c.MaxPayload != volume.MaxRequest) {
				t.Errorf("block sizes from %d to %d", c.MinBlock, c.MaxPayload)
			}
		})
	}
}

func TestFlushAndFUAAreDurable(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	flushed, forced, lost := pattern(4096, 1), pattern(4096, 2), pattern(4096, 3)
	for _, err := range []error{
		c.Do(&nbdtest.Call{Command: proto.CmdWrite, Data: flushed, Off: 0}),
		c.Flush(),
		c.Do(&nbdtest.Call{Command: proto.CmdWrite, Data: lost, Off: 8192}),
		c.Do(&nbdtest.Call{Command: proto.CmdWrite, Data: forced, Off: 4096, Flags: proto.CmdFlagFUA}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	d.PowerCut()
	want := append(append(append([]byte(nil), flushed...), forced...), make([]byte, 4096)...)
	if !bytes.Equal(d.Bytes()[:len(want)], want) {
		t.Error("not exactly what was made durable survived")
	}
}

func TestFlagsReachTheDevice(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	var last atomic.Pointer[volume.Request]
	d.Judge(func(r *volume.Request) error {
		last.Store(&volume.Request{Op: r.Op, Off: r.Off, Len: r.Len, FUA: r.FUA})
		return nil
	})
	for name, tc := range map[string]struct {
		call nbdtest.Call
		want volume.Request
	}{
		"FUA write":       {nbdtest.Call{Command: proto.CmdWrite, Flags: proto.CmdFlagFUA, Data: make([]byte, 512)}, volume.Request{Op: volume.OpWrite, Len: 512, FUA: true}},
		"FUA trim":        {nbdtest.Call{Command: proto.CmdTrim, Flags: proto.CmdFlagFUA, Off: 512, Len: 512}, volume.Request{Op: volume.OpTrim, Off: 512, Len: 512, FUA: true}},
		"FUA read":        {nbdtest.Call{Command: proto.CmdRead, Flags: proto.CmdFlagFUA, Data: make([]byte, 512)}, volume.Request{Op: volume.OpRead, Len: 512}},
		"zero, no hole":   {nbdtest.Call{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagNoHole, Len: 512}, volume.Request{Op: volume.OpWrite, Len: 512}},
		"the same, FUA":   {nbdtest.Call{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagNoHole | proto.CmdFlagFUA, Len: 512}, volume.Request{Op: volume.OpWrite, Len: 512, FUA: true}},
		"fast zero":       {nbdtest.Call{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagFastZero, Len: testSize}, volume.Request{Op: volume.OpZero, Len: testSize}},
		"unsplit read":    {nbdtest.Call{Command: proto.CmdRead, Flags: proto.CmdFlagDF, Data: make([]byte, 512)}, volume.Request{Op: volume.OpRead, Len: 512}},
		"flush, with FUA": {nbdtest.Call{Command: proto.CmdFlush, Flags: proto.CmdFlagFUA}, volume.Request{Op: volume.OpFlush}},
	} {
		t.Run(name, func(t *testing.T) {
			call := tc.call
			if err := c.Do(&call); err != nil {
				t.Fatal(err)
			}
			got := last.Load()
			if got.Op != tc.want.Op || got.Off != tc.want.Off || got.Len != tc.want.Len || got.FUA != tc.want.FUA {
				t.Errorf("the device got %+v", got)
			}
		})
	}
}

// Zeros that must keep their space are written, piece by piece, whatever they
// cover; an error ends that.
func TestProvision(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	if _, err := c.WriteAt(pattern(testSize, 1), 0); err != nil {
		t.Fatal(err)
	}
	var written atomic.Int64
	d.Judge(func(r *volume.Request) error {
		if r.Op == volume.OpZero {
			return errors.New("a hole is made")
		}
		written.Add(r.Len)
		if r.Off+r.Len == testSize {
			return volume.ErrNoSpace
		}
		return nil
	})
	zero := nbdtest.Call{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagNoHole, Off: 512, Len: testSize - 1024}
	if err := c.Do(&zero); err != nil || written.Load() != zero.Len {
		t.Fatalf("%d bytes written: %v", written.Load(), err)
	}
	if got := d.Bytes(); !bytes.Equal(got[512:testSize-512], make([]byte, testSize-1024)) || got[511] == 0 || got[testSize-512] == 0 {
		t.Error("not exactly the range is zeros")
	}
	zero.Len += 512
	if err := c.Do(&zero); nbdtest.Errno(err) != proto.ENOSPC {
		t.Errorf("without room: %v", err)
	}
}

// TestFlushCoversOtherConnections: what one connection was told is written,
// another one's flush makes durable, as NBD_FLAG_CAN_MULTI_CONN says.
func TestFlushCoversOtherConnections(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	a, b := dial(t, path, nbdtest.Options{}), dial(t, path, nbdtest.Options{Simple: true})
	want := pattern(4096, 9)
	if _, err := a.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if _, err := b.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the other connection reads something else (%v)", err)
	}
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}
	d.PowerCut()
	if !bytes.Equal(d.Bytes()[4096:8192], want) {
		t.Error("the flush did not cover the other connection's write")
	}
}

// TestBadRequests sends, on one connection, what must be refused, and after
// each a request that shows that both sides still understand each other.
func TestBadRequests(t *testing.T) {
	big := make([]byte, volume.MaxRequest+512)
	for name, opts := range dialects {
		overlong := proto.EOVERFLOW
		if opts.Simple {
			overlong = proto.EINVAL
		}
		for what, tc := range map[string]struct {
			call nbdtest.Call
			want proto.Errno
		}{
			"read beyond the end":   {nbdtest.Call{Command: proto.CmdRead, Off: testSize - 512, Data: make([]byte, 1024)}, proto.EINVAL},
			"write beyond the end":  {nbdtest.Call{Command: proto.CmdWrite, Off: testSize - 512, Data: make([]byte, 1024)}, proto.ENOSPC},
			"write at 2^64-512":     {nbdtest.Call{Command: proto.CmdWrite, Off: -512, Data: make([]byte, 1024)}, proto.ENOSPC},
			"trim beyond the end":   {nbdtest.Call{Command: proto.CmdTrim, Off: testSize, Len: 512}, proto.EINVAL},
			"zero beyond the end":   {nbdtest.Call{Command: proto.CmdWriteZeroes, Off: testSize, Len: 512}, proto.ENOSPC},
			"unaligned read":        {nbdtest.Call{Command: proto.CmdRead, Off: 1, Data: make([]byte, 512)}, proto.EINVAL},
			"unaligned write":       {nbdtest.Call{Command: proto.CmdWrite, Data: make([]byte, 511)}, proto.EINVAL},
			"too long a read":       {nbdtest.Call{Command: proto.CmdRead, Data: big}, overlong},
			"too long a write":      {nbdtest.Call{Command: proto.CmdWrite, Data: big}, proto.EINVAL},
			"unknown command":       {nbdtest.Call{Command: 4711}, proto.EINVAL},
			"cache":                 {nbdtest.Call{Command: proto.CmdCache, Len: 512}, proto.EINVAL},
			"unknown flag":          {nbdtest.Call{Command: proto.CmdRead, Flags: 1 << 5, Data: make([]byte, 512)}, proto.EINVAL},
			"flag of another":       {nbdtest.Call{Command: proto.CmdWrite, Flags: proto.CmdFlagNoHole, Data: make([]byte, 512)}, proto.EINVAL},
			"flush of a range":      {nbdtest.Call{Command: proto.CmdFlush, Off: 512, Len: 512}, proto.EINVAL},
			"zero: fast, no hole":   {nbdtest.Call{Command: proto.CmdWriteZeroes, Flags: proto.CmdFlagFastZero | proto.CmdFlagNoHole, Len: 512}, proto.ENOTSUP},
			"status beyond the end": {nbdtest.Call{Command: proto.CmdBlockStatus, Off: testSize, Len: 512}, proto.EINVAL},
			"status of nothing":     {nbdtest.Call{Command: proto.CmdBlockStatus}, proto.EINVAL},
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				path, _ := serve(t, memDevice(t))
				c := dial(t, path, opts)
				call := tc.call
				if got := nbdtest.Errno(c.Do(&call)); got != tc.want {
					t.Errorf("answered with %d, want %d (%v)", got, tc.want, call.Err)
				}
				if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
					t.Errorf("next request: %v", err)
				}
			})
		}
	}
}

func TestEmptyRequestsDoNothing(t *testing.T) {
	for name, opts := range dialects {
		t.Run(name, func(t *testing.T) {
			d := memDevice(t)
			d.Judge(func(*volume.Request) error { return errors.New("the device was asked") })
			path, _ := serve(t, d)
			c := dial(t, path, opts)
			for _, cmd := range []proto.Command{proto.CmdRead, proto.CmdWrite, proto.CmdTrim, proto.CmdWriteZeroes} {
				if err := c.Do(&nbdtest.Call{Command: cmd, Off: 512}); err != nil {
					t.Errorf("command %d: %v", cmd, err)
				}
			}
		})
	}
}

func TestErrorsOfTheDevice(t *testing.T) {
	for name, opts := range dialects {
		t.Run(name, func(t *testing.T) {
			d := memDevice(t)
			path, _ := serve(t, d)
			c := dial(t, path, opts)
			for err, want := range map[error]proto.Errno{
				volume.ErrNoSpace:        proto.ENOSPC,
				volume.ErrClosed:         proto.ESHUTDOWN,
				volume.ErrRange:          proto.EINVAL,
				errors.New("bad sector"): proto.EIO,
			} {
				d.Judge(func(*volume.Request) error { return err })
				_, readErr := c.ReadAt(make([]byte, 4096), 0)
				_, writeErr := c.WriteAt(make([]byte, 4096), 0)
				if nbdtest.Errno(readErr) != want || nbdtest.Errno(writeErr) != want || nbdtest.Errno(c.Flush()) != want {
					t.Errorf("%v: read %v, write %v", err, readErr, writeErr)
				}
			}
			d.Judge(nil)
			if _, err := c.ReadAt(make([]byte, 4096), 0); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestOutOfOrderAnswers(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	const n = 200
	if _, err := c.WriteAt(pattern(n*512, 9), 0); err != nil {
		t.Fatal(err)
	}
	d.Stall()
	done := make(chan *nbdtest.Call, n)
	for i := range n {
		c.Go(&nbdtest.Call{Command: proto.CmdRead, Off: int64(i) * 512, Data: make([]byte, 512), Done: done})
	}
	d.AwaitWaiting(n)
	d.Resume()
	want := d.Bytes()
	for range n {
		call := <-done
		if call.Err != nil || !bytes.Equal(call.Data, want[call.Off:call.Off+512]) {
			t.Fatalf("read at %d: %v", call.Off, call.Err)
		}
	}
}

// A client that reads slowly gets every answer whole, though its socket takes
// only parts of them at once.
func TestSlowClient(t *testing.T) {
	const size, reads = 60 << 10, 50
	d := memDevice(t)
	path, _ := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	want := pattern(size, 3)
	if _, err := c.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	// Nobody takes the first call that is done, so the client reads no more.
	// First one at a time, as far as that can be without hearing an answer, then
	// many at once.
	done := make(chan *nbdtest.Call)
	for i := range reads {
		c.Go(&nbdtest.Call{Command: proto.CmdRead, Data: make([]byte, size), Done: done})
		if i < reads/5 {
			time.Sleep(5 * time.Millisecond)
		}
	}
	for i := range reads {
		if call := <-done; call.Err != nil || !bytes.Equal(call.Data, want) {
			t.Fatalf("read %d: %v, or wrong data", i, call.Err)
		}
	}
}

func TestStatus(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	if _, err := c.WriteAt(pattern(8192, 1), 65536); err != nil {
		t.Fatal(err)
	}
	got, err := c.Status(0, testSize)
	if err != nil {
		t.Fatal(err)
	}
	const hole = proto.StateHole | proto.StateZero
	want := []nbdtest.Extent{{Len: 65536, Flags: hole}, {Len: 8192}, {Len: testSize - 65536 - 8192, Flags: hole}}
	if len(got) != 3 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("got %v", got)
	}
	one := &nbdtest.Call{Command: proto.CmdBlockStatus, Flags: proto.CmdFlagReqOne, Len: 4096}
	if err := c.Do(one); err != nil || len(one.Extents) != 1 || one.Extents[0] != (nbdtest.Extent{Len: 4096, Flags: hole}) {
		t.Errorf("one extent: %v, %v", one.Extents, err)
	}
}

func TestDeviceGrows(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	d.Grow(2 * testSize)
	if _, err := c.WriteAt(pattern(4096, 1), testSize); err != nil {
		t.Error(err)
	}
	if again := dial(t, path, nbdtest.Options{}); again.Size != 2*testSize {
		t.Errorf("a new connection sees %d bytes", again.Size)
	}
}

func TestSocketIsPrivateAndReplaced(t *testing.T) {
	d := memDevice(t)
	path, s := serve(t, d)
	fi, err := os.Stat(path)
	if err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("socket: %v, %v", fi.Mode(), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	// As a killed server leaves it.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	again, err := nbd.Serve(context.Background(), nbd.Options{SocketPath: path, Device: d, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}

func TestCloseAnswersWhatIsInFlight(t *testing.T) {
	d := memDevice(t)
	path, s := serve(t, d)
	c := dial(t, path, nbdtest.Options{})
	d.Stall()
	done := make(chan *nbdtest.Call, 3)
	for i := range 3 {
		c.Go(&nbdtest.Call{Command: proto.CmdWrite, Off: int64(i) * 4096, Data: pattern(4096, 7), Done: done})
	}
	d.AwaitWaiting(3)
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	d.Resume()
	for range 3 {
		if call := <-done; call.Err != nil {
			t.Error(call.Err)
		}
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := c.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("a read after Close was answered")
	}
}

func TestContextEndsTheServer(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s, err := nbd.Serve(ctx, nbd.Options{SocketPath: socketPath(t), Device: memDevice(t), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestHangUpWithRequestsInFlight(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	other := dial(t, path, nbdtest.Options{})
	c := dial(t, path, nbdtest.Options{})
	d.Stall()
	want := pattern(1<<20, 5)
	for i := range 3 {
		c.Go(&nbdtest.Call{Command: proto.CmdWrite, Off: int64(i) << 20, Data: want})
	}
	d.AwaitWaiting(3)
	c.Abort()
	d.Resume()
	// They were taken, so they are carried out, with the data that was sent.
	next := dial(t, path, nbdtest.Options{})
	for i := range 3 {
		got := make([]byte, 1<<20)
		if _, err := next.ReadAt(got, int64(i)<<20); err != nil || !bytes.Equal(got, want) {
			t.Errorf("write %d: lost or damaged (%v)", i, err)
		}
	}
	if _, err := other.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("another client: %v", err)
	}
}

// TestSuccessorWaitsForTheDead lets a client die with writes in its socket
// that the server could not take yet. Its successor must never see them happen
// after its own.
func TestSuccessorWaitsForTheDead(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	dead := dial(t, path, nbdtest.Options{})
	alive := dial(t, path, nbdtest.Options{})
	d.Stall()
	// As much as a connection may have in flight, and a few that stay unread.
	for range volume.MaxRequest >> 20 {
		dead.Go(&nbdtest.Call{Command: proto.CmdWrite, Data: pattern(1<<20, 1)})
	}
	for range 20 {
		dead.Go(&nbdtest.Call{Command: proto.CmdWrite, Data: pattern(512, 1)})
	}
	d.AwaitWaiting(volume.MaxRequest >> 20)
	dead.Abort()
	successor := dial(t, path, nbdtest.Options{})
	want := pattern(1<<20, 2)
	wrote := make(chan error)
	go func() {
		_, err := successor.WriteAt(want, 0)
		wrote <- err
	}()
	d.Resume()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if _, err := alive.ReadAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
	got := make([]byte, 1<<20)
	if _, err := successor.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the dead client's write came last (%v)", err)
	}
}

func TestGarbageHarmsOnlyItsSender(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	other := dial(t, path, nbdtest.Options{})
	for name, garbage := range map[string][]byte{
		"no client flags":     {1},
		"unknown flags":       {0xff, 0xff, 0xff, 0xff},
		"no option":           append([]byte{0, 0, 0, 3}, "GET / HTTP/1.1\r\n\r\n"...),
		"wrong export":        append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x01x"...),
		"half an option":      append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x09x"...),
		"garbage for request": append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00garbage garbage garbage garbage"...),
	} {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = nc.Close() }()
			if _, err := nc.Write(garbage); err != nil {
				t.Fatal(err)
			}
			_ = nc.(*net.UnixConn).CloseWrite()
			_, _ = io.Copy(io.Discard, nc) // until the server hangs up
			if _, err := other.ReadAt(make([]byte, 512), 0); err != nil {
				t.Errorf("another client: %v", err)
			}
		})
	}
}
