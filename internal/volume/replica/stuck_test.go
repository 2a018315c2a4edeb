package replica_test

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// stuckFS is a file system whose writes, or syncs, wait while that is set, until
// it goes on.
type stuckFS struct {
	layer.FS
	writes, syncs atomic.Bool

	free   chan struct{} // closed when it goes on
	goesOn func()
}

func newStuckFS() *stuckFS {
	free := make(chan struct{})
	return &stuckFS{FS: layer.OS{}, free: free, goesOn: sync.OnceFunc(func() { close(free) })}
}

type stuckFile struct {
	layer.File
	fs *stuckFS
}

func (s *stuckFS) Open(name string, create bool) (layer.File, error) {
	f, err := s.FS.Open(name, create)
	return stuckFile{f, s}, err
}

func (f stuckFile) WriteAt(p []byte, off int64) (int, error) {
	if f.fs.writes.Load() {
		<-f.fs.free
	}
	return f.File.WriteAt(p, off)
}

func (f stuckFile) Sync() error {
	if f.fs.syncs.Load() {
		<-f.fs.free
	}
	return f.File.Sync()
}

// pipelined is a holder that does not wait for answers before it sends more.
type pipelined struct {
	t  *testing.T
	nc net.Conn
	id uint64
}

// send sends frames at once.
func (h *pipelined) send(heads ...wire.Header) {
	h.t.Helper()
	var b []byte
	for _, head := range heads {
		var payload []byte
		switch head.Type {
		case wire.Hello:
			payload = wire.Greeting{ClusterID: "c", VolumeID: "v", ReplicaID: 1, Epoch: 1}.Marshal()
		case wire.Write:
			payload = make([]byte, head.Len)
		}
		h.id++
		head.ID, head.Payload = h.id, uint32(len(payload))
		at := len(b)
		b = append(b, make([]byte, wire.HeaderSize)...)
		head.Put(b[at:])
		b = append(b, payload...)
	}
	if _, err := h.nc.Write(b); err != nil {
		h.t.Fatal(err)
	}
}

func (h *pipelined) answer(want wire.Type) {
	h.t.Helper()
	if head := h.read(); head.Type != want || head.Status != wire.OK {
		h.t.Fatalf("answer of type %d with status %d, want one of type %d", head.Type, head.Status, want)
	}
}

func (h *pipelined) read() wire.Header {
	h.t.Helper()
	head, err := wire.ReadHeader(h.nc, make([]byte, wire.HeaderSize))
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, h.nc, int64(head.Payload)); err != nil {
		h.t.Fatal(err)
	}
	return head
}

// serveOn serves a replica on a file system to a holder, who has greeted and
// written a page.
func serveOn(t *testing.T, fs *stuckFS) *pipelined {
	t.Helper()
	h, _ := serveStoreOn(t, fs)
	return h
}

func serveStoreOn(t *testing.T, fs *stuckFS) (*pipelined, *replica.Store) {
	t.Helper()
	store, err := replica.Open(replica.Options{FS: fs, Dir: t.TempDir(), ClusterID: "c", BootID: "b", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- replica.Serve(t.Context(), far, store) }()
	t.Cleanup(func() {
		fs.goesOn()
		_ = near.Close()
		if err := errors.Join(<-served, store.Close()); err != nil {
			t.Error(err)
		}
	})
	h := &pipelined{t: t, nc: near}
	h.send(wire.Header{Type: wire.Hello})
	h.answer(wire.Hello)
	h.send(page(0)) // stamps the region: the next writes need not wait for that
	h.answer(wire.Write)
	return h, store
}

func page(i int) wire.Header {
	return wire.Header{Type: wire.Write, Off: int64(i) * 4096, Len: 4096, Generation: 1}
}

// Whatever the disk does, pings are answered, and once it goes on so is all else.
func TestStuckDisk(t *testing.T) {
	fs := newStuckFS()
	h := serveOn(t, fs)
	fs.writes.Store(true)
	const writes = 40 // more than there are workers
	for i := range writes {
		h.send(page(i), wire.Header{Type: wire.Ping})
		h.answer(wire.Ping)
	}
	fs.goesOn()
	for range writes {
		h.answer(wire.Write)
	}
	h.send(page(0))
	h.answer(wire.Write)
}

// What was carried out is answered though something that came with it waits.
func TestAnswersDoNotWait(t *testing.T) {
	fs := newStuckFS()
	h := serveOn(t, fs)
	fs.syncs.Store(true)
	h.send(page(0), page(1), wire.Header{Type: wire.Flush})
	h.answer(wire.Write)
	h.answer(wire.Write)
	fs.writes.Store(true)
	h.send(page(0), wire.Header{Type: wire.Ping})
	h.answer(wire.Ping)
	fs.goesOn()
	for range 2 {
		head := h.read()
		if head.Type != wire.Flush && head.Type != wire.Write {
			t.Errorf("answer of type %d", head.Type)
		}
	}
}

// Who waits for a disk that hangs is told that it is of no use, and nobody else
// begins to wait; when it goes on, all is as before.
func TestSuspension(t *testing.T) {
	fs := newStuckFS()
	h, store := serveStoreOn(t, fs)
	r, err := store.Get("v", 1)
	if err != nil {
		t.Fatal(err)
	}
	fs.writes.Store(true)
	h.send(page(0), wire.Header{Type: wire.Ping})
	h.answer(wire.Ping)
	store.Suspend()
	if _, err := h.nc.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection: %v", err)
	}
	if _, _, err := r.Seal(2); !errors.Is(err, replica.ErrSuspended) {
		t.Errorf("a new session: %v", err)
	}
	fs.writes.Store(false)
	fs.goesOn()
	store.Resume()
	s, _, err := r.Seal(2)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WriteAt(make([]byte, 4096), 0, 2, false); err != nil {
		t.Error(err)
	}
}
