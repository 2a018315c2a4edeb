package mirror_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testSize = 8 << 20
	testWait = 30 * time.Second // a hang, not a measure
)

var greeting = wire.Greeting{ClusterID: "c", VolumeID: "v", ReplicaID: 1, Epoch: 3}

// replicaServer serves one replica on loopback.
type replicaServer struct {
	t     *testing.T
	store *replica.Store
	ln    net.Listener

	ends chan error // of connections, as they end

	mu    sync.Mutex
	conns []net.Conn
}

func newReplicaServer(t *testing.T) *replicaServer {
	t.Helper()
	store, err := replica.Open(replica.Options{
		FS: layer.OS{}, Dir: t.TempDir(), ClusterID: "c", BootID: "b", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: testSize}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &replicaServer{t: t, store: store, ln: ln, ends: make(chan error, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, nc)
			s.mu.Unlock()
			wg.Go(func() { s.ends <- replica.Serve(ctx, nc, store) })
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = ln.Close()
		wg.Wait()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// cut ends all connections.
func (s *replicaServer) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		_ = c.Close()
	}
}

func (s *replicaServer) dial() net.Conn {
	s.t.Helper()
	nc, err := net.Dial("tcp", s.ln.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	return nc
}

func (s *replicaServer) link(g wire.Greeting) (mirror.Link, mirror.Info, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testWait)
	defer cancel()
	return mirror.NewRemoteLink(ctx, s.dial(), g)
}

// call sends a message and waits for its answer.
func call(t *testing.T, l mirror.Link, m mirror.Message) (mirror.Info, error) {
	t.Helper()
	type answer struct {
		info mirror.Info
		err  error
	}
	answers := make(chan answer, 1)
	m.Done = func(i mirror.Info, err error) { answers <- answer{i, err} }
	l.Send(&m, false)
	select {
	case a := <-answers:
		return a.info, a.err
	case <-time.After(testWait):
		t.Fatal("no answer")
		panic("unreachable")
	}
}

func TestRemoteLink(t *testing.T) {
	s := newReplicaServer(t)
	l, info, err := s.link(greeting)
	if err != nil {
		t.Fatal(err)
	}
	if info.Health != mirror.Good || info.Incarnation != 1 {
		t.Errorf("sealed: %+v", info)
	}
	data := make([]byte, 1<<20)
	_, _ = rand.Read(data)
	must := func(m mirror.Message) mirror.Info {
		t.Helper()
		info, err := call(t, l, m)
		if err != nil {
			t.Fatalf("%v: %v", m.Verb, err)
		}
		return info
	}
	read := func(off int64, n int) []byte {
		t.Helper()
		b := make([]byte, n)
		must(mirror.Message{Verb: mirror.VerbRead, Off: off, Len: int64(n), Data: b})
		return b
	}
	must(mirror.Message{Verb: mirror.VerbWrite, Off: 512, Len: int64(len(data)), Data: data})
	if !bytes.Equal(read(512, len(data)), data) {
		t.Error("what was written is not read")
	}
	must(mirror.Message{Verb: mirror.VerbZero, Off: 1024, Len: 512})
	must(mirror.Message{Verb: mirror.VerbTrim, Off: 2048, Len: 512, FUA: true})
	copy(data[512:1024], make([]byte, 512))
	copy(data[1536:2048], make([]byte, 512))
	must(mirror.Message{Verb: mirror.VerbFlush})
	if !bytes.Equal(read(512, len(data)), data) {
		t.Error("what was zeroed is not zero, or more than that is")
	}
	if _, err := call(t, l, mirror.Message{Verb: mirror.VerbRead, Off: testSize, Len: 512, Data: make([]byte, 512)}); err == nil {
		t.Error("a read behind the end was answered")
	}
	must(mirror.Message{Verb: mirror.VerbWrite, Off: 2 << 20, Len: 512, Data: data[:512], Generation: 7})
	bits := make([]byte, 1)
	if must(mirror.Message{Verb: mirror.VerbChanged, Len: testSize, Data: bits, Generation: 7}); bits[0] != 1<<2 {
		t.Errorf("changed since generation 7: %b", bits)
	}
	must(mirror.Message{Verb: mirror.VerbSnapshot, Snapshot: 1, Generation: 8})
	sums, region := make([]byte, wire.SumSize), make([]byte, 1<<20)
	ofSnapshot := mirror.Message{Snapshot: 1, Off: 2 << 20, Len: 1 << 20, Data: region}
	ofSnapshot.Verb = mirror.VerbReadVerified
	if must(ofSnapshot); !bytes.Equal(region[:512], data[:512]) {
		t.Error("a verified read of the snapshot is not what was written")
	}
	ofSnapshot.Verb, ofSnapshot.Data = mirror.VerbSums, sums
	if must(ofSnapshot); sums[0] != wire.SumNew {
		t.Errorf("the sum of a snapshot is of state %d", sums[0])
	}
	if must(ofSnapshot); sums[0] != wire.SumSame {
		t.Errorf("recorded, it is of state %d", sums[0])
	}
	ofSnapshot.Verb, ofSnapshot.Data = mirror.VerbMend, make([]byte, 1<<20)
	must(ofSnapshot)
	ofSnapshot.Verb, ofSnapshot.Data = mirror.VerbReadVerified, region
	if _, err := call(t, l, ofSnapshot); !errors.Is(err, volume.ErrDamaged) {
		t.Errorf("what was recorded differs from what it was made: %v", err)
	}
	if info := must(mirror.Message{Verb: mirror.VerbBeginSync, Base: 7, Generation: 8}); info.Incarnation != 2 || info.Health != mirror.Syncing || info.Emptied {
		t.Errorf("after BeginSync with a base: %+v", info)
	}
	if !bytes.Equal(read(512, 512), data[:512]) {
		t.Error("a replica with a base was emptied")
	}
	if info := must(mirror.Message{Verb: mirror.VerbBeginSync, Generation: 9}); info.Incarnation != 3 || info.Health != mirror.Syncing || !info.Emptied {
		t.Errorf("after BeginSync: %+v", info)
	}
	if !bytes.Equal(read(0, 4096), make([]byte, 4096)) {
		t.Error("a replica that is being copied to was not emptied")
	}
	must(mirror.Message{Verb: mirror.VerbEndSync})
	l.Close(true)
	if _, err := call(t, l, mirror.Message{Verb: mirror.VerbFlush}); !errors.Is(err, mirror.ErrSessionOver) {
		t.Errorf("after the end: %v", err)
	}
}

func TestRemoteLinkRefused(t *testing.T) {
	s := newReplicaServer(t)
	l, _, err := s.link(greeting)
	if err != nil {
		t.Fatal(err)
	}
	older, foreign, none := greeting, greeting, greeting
	older.Epoch = 2
	foreign.ClusterID = "d"
	none.ReplicaID = 9
	_, _, err = s.link(older)
	if sealed := (*mirror.SealedError)(nil); !errors.As(err, &sealed) || sealed.Epoch != 3 {
		t.Errorf("an older epoch: %v", err)
	}
	if _, _, err = s.link(foreign); err == nil {
		t.Error("another cluster's holder was let in")
	}
	if _, _, err = s.link(none); err == nil {
		t.Error("a replica that is not there was sealed")
	}
	// A newer holder ends the older one's session.
	newer := greeting
	newer.Epoch = 4
	l2, _, err := s.link(newer)
	if err != nil {
		t.Fatal(err)
	}
	defer l2.Close(false)
	if _, err := call(t, l, mirror.Message{Verb: mirror.VerbWrite, Len: 512, Data: make([]byte, 512)}); !errors.Is(err, mirror.ErrSessionOver) {
		t.Errorf("a write of an older epoch: %v", err)
	}
	select {
	case <-l.Done():
	case <-time.After(testWait):
		t.Error("a link whose session is over does not say so")
	}
	l.Close(false)
}

// TestRemoteLinkBreaks cuts the connection under load: every message is
// answered exactly once, and Close returns after the last.
func TestRemoteLinkBreaks(t *testing.T) {
	s := newReplicaServer(t)
	for round := range 20 {
		l, _, err := s.link(greeting)
		if err != nil {
			t.Fatal(err)
		}
		const messages = 200
		var mu sync.Mutex
		answers := make([]int, messages)
		begun := make(chan struct{})
		for i := range messages {
			data := make([]byte, 4096)
			l.Send(&mirror.Message{Verb: mirror.VerbWrite, Off: int64(i) * 4096, Len: 4096, Data: data, Done: func(_ mirror.Info, err error) {
				mu.Lock()
				defer mu.Unlock()
				if err == nil && i == round*5 {
					close(begun)
				}
				answers[i]++
				data[0]++ // whoever owns the buffer now writes to it
			}}, i%2 == 0)
		}
		select {
		case <-begun:
		case <-time.After(testWait):
			t.Fatal("nothing was answered")
		}
		s.cut()
		<-l.Done()
		l.Close(false)
		mu.Lock()
		for i, n := range answers {
			if n != 1 {
				t.Errorf("round %d: message %d was answered %d times", round, i, n)
			}
		}
		mu.Unlock()
	}
}

func TestServeGarbage(t *testing.T) {
	frame := func(h wire.Header, payload ...byte) []byte {
		b := make([]byte, wire.HeaderSize)
		h.Put(b)
		return append(b, payload...)
	}
	hello := greeting.Marshal()
	welcome := frame(wire.Header{Type: wire.Hello, Payload: uint32(len(hello))}, hello...)
	for name, bad := range map[string][]byte{
		"noise":                   bytes.Repeat([]byte("garbage!"), 100),
		"no hello":                frame(wire.Header{Type: wire.Flush}),
		"an empty hello":          frame(wire.Header{Type: wire.Hello}),
		"a second hello":          append(bytes.Clone(welcome), welcome...),
		"noise after the hello":   append(bytes.Clone(welcome), bytes.Repeat([]byte{0xff}, 64)...),
		"a write of another size": append(bytes.Clone(welcome), frame(wire.Header{Type: wire.Write, Len: 1024, Payload: 512}, make([]byte, 512)...)...),
		"a flush with a payload":  append(bytes.Clone(welcome), frame(wire.Header{Type: wire.Flush, Payload: 4}, 1, 2, 3, 4)...),
		"a huge list":             append(bytes.Clone(welcome), frame(wire.Header{Type: wire.Changed, Len: 1<<63 - 1})...),
		"a huge read":             append(bytes.Clone(welcome), frame(wire.Header{Type: wire.Read, Len: 1 << 40})...),
	} {
		t.Run(name, func(t *testing.T) {
			s := newReplicaServer(t)
			nc := s.dial()
			defer nc.Close()
			if err := nc.SetDeadline(time.Now().Add(testWait)); err != nil {
				t.Fatal(err)
			}
			if _, err := nc.Write(bad); err != nil {
				t.Fatal(err)
			}
			// The server hangs up by itself; a reset is as good as an end.
			_, err := io.Copy(io.Discard, nc)
			if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
				t.Fatal("garbage does not end the connection")
			}
			if err := <-s.ends; err == nil {
				t.Error("Serve returned no error")
			}
			// And serves the next.
			l, _, err := s.link(greeting)
			if err != nil {
				t.Fatal(err)
			}
			l.Close(false)
		})
	}
}

// FuzzServe: whatever comes from a peer, the server neither panics nor hangs.
func FuzzServe(f *testing.F) {
	hello := greeting.Marshal()
	b := make([]byte, wire.HeaderSize)
	wire.Header{Type: wire.Hello, Payload: uint32(len(hello))}.Put(b)
	f.Add(append(b, hello...), uint8(wire.Write), int64(0), int64(512), uint32(512))
	f.Add(append(b, hello...), uint8(wire.Read), int64(1<<62), int64(1<<62), uint32(0))
	f.Add([]byte("x"), uint8(0), int64(-1), int64(-1), uint32(0))
	store, err := replica.Open(replica.Options{FS: layer.OS{}, Dir: f.TempDir(), ClusterID: "c", BootID: "b", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = store.Close() })
	if _, err := store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: 1 << 20}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, first []byte, typ uint8, off, n int64, payload uint32) {
		here, there := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() { _ = replica.Serve(t.Context(), there, store) })
		wg.Go(func() { _, _ = io.Copy(io.Discard, here) })
		_ = here.SetWriteDeadline(time.Now().Add(testWait))
		_, _ = here.Write(first)
		b := make([]byte, wire.HeaderSize, wire.HeaderSize+int(payload%4096))
		wire.Header{Type: wire.Type(typ), Off: off, Len: n, Payload: payload % 4096}.Put(b)
		_, _ = here.Write(b[:cap(b)])
		_ = here.Close()
		wg.Wait()
	})
}
