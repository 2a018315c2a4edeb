package network

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is two servers, a and b; guests run where a test says.
type world struct {
	t    *testing.T
	a, b *Ports

	mu        sync.Mutex
	published []Publication
	changed   chan struct{}
	local     map[Target]string
	addresses map[string]chan string // server and port → listening address
}

func newWorld(t *testing.T, change ...func(*Options)) *world {
	w := &world{
		t: t, changed: make(chan struct{}), local: map[Target]string{},
		addresses: map[string]chan string{},
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	t.Cleanup(func() { cancel(); done.Wait() })
	start := func(id string) *Ports {
		o := Options{
			Address:   "127.0.0.1",
			ServerID:  id,
			Published: w.get,
			LocalPort: func(target Target) (string, bool) {
				w.mu.Lock()
				defer w.mu.Unlock()
				address, ok := w.local[target]
				return address, ok
			},
			Dial: func(ctx context.Context, server string) (net.Conn, error) {
				if server != "b" {
					return nil, errors.New("no such server")
				}
				return w.dialTunnel(ctx, &done)
			},
			Busy:       func(Publication, error) {},
			Log:        slog.New(slog.DiscardHandler),
			RetryAfter: time.Millisecond,
			Listen: func(ctx context.Context, network, address string) (net.Listener, error) {
				_, port, _ := net.SplitHostPort(address)
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				if err == nil {
					w.where(id, port) <- ln.Addr().String()
				}
				return ln, err
			},
		}
		for _, c := range change {
			c(&o)
		}
		p := NewPorts(o)
		done.Go(func() {
			if err := p.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		return p
	}
	w.a, w.b = start("a"), start("b")
	return w
}

// dialTunnel connects two TCP ends and lets b serve one of them.
func (w *world) dialTunnel(ctx context.Context, done *sync.WaitGroup) (net.Conn, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return nil, err
	}
	peer, err := ln.Accept()
	if err != nil {
		return nil, err
	}
	done.Go(func() { w.b.ServeTunnel(context.WithoutCancel(ctx), peer) })
	return conn, nil
}

func (w *world) get() ([]Publication, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.published, w.changed
}

func (w *world) publish(p ...Publication) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.published = p
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) where(server, port string) chan string {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.addresses[server+port]
	if c == nil {
		c = make(chan string, 1)
		w.addresses[server+port] = c
	}
	return c
}

func (w *world) dial(address string) *net.TCPConn {
	w.t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn)
}

// guest serves a target: what comes in goes back, in capitals, when the client
// has ended its direction.
func (w *world) guest(target Target) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	var done sync.WaitGroup
	w.t.Cleanup(func() { _ = ln.Close(); done.Wait() })
	w.mu.Lock()
	w.local[target] = ln.Addr().String()
	w.mu.Unlock()
	done.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			done.Go(func() {
				defer conn.Close()
				b, err := io.ReadAll(conn)
				if err == nil {
					_, _ = conn.Write(bytes.ToUpper(b))
				}
			})
		}
	})
}

var web = Target{"M1", 80}

func ask(t *testing.T, conn *net.TCPConn, what string) (string, error) {
	t.Helper()
	if _, err := conn.Write([]byte(what)); err != nil {
		return "", err
	}
	if err := conn.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	return string(b), err
}

func TestEveryServerLeadsToTheGuest(t *testing.T) {
	for _, at := range []string{"a", "b"} {
		t.Run(at, func(t *testing.T) {
			w := newWorld(t)
			w.guest(web)
			w.publish(Publication{Port: 8080, Target: web, ServerID: "b"})
			conn := w.dial(<-w.where(at, "8080"))
			// Longer than any buffer on the way.
			long := strings.Repeat("abc", 1<<20)
			got, err := ask(t, conn, long)
			if err != nil || got != strings.ToUpper(long) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestMachineThatIsNotThere(t *testing.T) {
	for name, p := range map[string]Publication{
		"not placed":     {Port: 8080, Target: web},
		"not local":      {Port: 8080, Target: web, ServerID: "a"},
		"not at b":       {Port: 8080, Target: web, ServerID: "b"},
		"unknown server": {Port: 8080, Target: web, ServerID: "c"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.publish(p)
			wantReset(t, <-w.where("a", "8080"))
		})
	}
}

// wantReset fails unless a new connection is reset, even while it is made.
func wantReset(t *testing.T, address string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err == nil {
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
}

func TestConnectionsEndWhenTheMachineMoves(t *testing.T) {
	w := newWorld(t)
	w.guest(web)
	w.publish(Publication{Port: 8080, Target: web, ServerID: "b", Placement: 1})
	address := <-w.where("a", "8080")
	conn := w.dial(address)
	if _, err := conn.Write([]byte("before")); err != nil {
		t.Fatal(err)
	}
	w.waitCarried(8080)
	w.publish(Publication{Port: 8080, Target: web, ServerID: "a", Placement: 2})
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("got %v, want a reset", err)
	}
	if got, err := ask(t, w.dial(address), "after"); err != nil || got != "AFTER" {
		t.Errorf("after the move: %q, %v", got, err)
	}
}

// waitCarried waits until a's listener knows of a connection.
func (w *world) waitCarried(port uint16) {
	w.t.Helper()
	for w.t.Context().Err() == nil {
		w.a.mu.Lock()
		l := w.a.listeners[port]
		w.a.mu.Unlock()
		l.mu.Lock()
		n := len(l.conns)
		l.mu.Unlock()
		if n > 0 {
			return
		}
	}
}

func TestUnpublishedPortIsClosed(t *testing.T) {
	w := newWorld(t)
	w.guest(web)
	w.publish(Publication{Port: 8080, Target: web, ServerID: "a"})
	address := <-w.where("a", "8080")
	conn := w.dial(address)
	w.waitCarried(8080)
	w.publish()
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("got %v, want a reset", err)
	}
	if c, err := net.Dial("tcp", address); err == nil {
		_ = c.Close()
		t.Error("the port is still open")
	}
}

func TestPortInUse(t *testing.T) {
	type told struct {
		port uint16
		busy bool
	}
	busy := make(chan told, 10)
	var mu sync.Mutex
	tries := 0
	w := newWorld(t, func(o *Options) {
		listen := o.Listen
		if o.ServerID != "a" {
			return
		}
		o.Busy = func(p Publication, err error) { busy <- told{p.Port, err != nil} }
		o.Listen = func(ctx context.Context, network, address string) (net.Listener, error) {
			mu.Lock()
			defer mu.Unlock()
			if tries++; tries < 4 {
				return nil, errors.New("address already in use")
			}
			return listen(ctx, network, address)
		}
	})
	w.guest(web)
	w.publish(Publication{Port: 8080, Target: web, ServerID: "a"})
	if got, err := ask(t, w.dial(<-w.where("a", "8080")), "x"); err != nil || got != "X" {
		t.Errorf("after the port was free: %q, %v", got, err)
	}
	for _, want := range []told{{8080, true}, {8080, false}} {
		if got := <-busy; got != want {
			t.Errorf("told %+v, want %+v", got, want)
		}
	}
	if len(busy) > 0 {
		t.Error("told more than once")
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.MaxConns = 1 })
	w.guest(web)
	w.publish(Publication{Port: 8080, Target: web, ServerID: "b"})
	address := <-w.where("a", "8080")
	first := w.dial(address)
	w.waitCarried(8080)
	wantReset(t, address)
	if got, err := ask(t, first, "first"); err != nil || got != "FIRST" {
		t.Errorf("the first connection: %q, %v", got, err)
	}
}

func TestHeader(t *testing.T) {
	for _, target := range []Target{{"", 80}, {strings.Repeat("x", 65), 80}, {"M", 0}} {
		if _, err := appendHeader(nil, target); err == nil {
			t.Errorf("%+v was encoded", target)
		}
	}
	for name, b := range map[string]string{
		"no id":       "\x00\x00\x50",
		"long id":     "\x41" + strings.Repeat("x", 0x41) + "\x00\x50",
		"port 0":      "\x01M\x00\x00",
		"cut":         "\x01M\x00",
		"cut id":      "\x05M",
		"empty":       "",
		"control":     "\x01\n\x00\x50",
		"not unicode": "\x01\xff\x00\x50",
	} {
		if target, err := readHeader(strings.NewReader(b)); err == nil {
			t.Errorf("%s: got %+v", name, target)
		}
	}
}

func FuzzHeader(f *testing.F) {
	good, err := appendHeader(nil, web)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{64, 1, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		target, err := readHeader(r)
		if err != nil {
			return
		}
		again, err := appendHeader(nil, target)
		if err != nil || !bytes.Equal(again, b[:len(b)-r.Len()]) {
			t.Errorf("%+v became %x, %v", target, again, err)
		}
	})
}
