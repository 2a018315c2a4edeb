package network

import (
	"bytes"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"
)

// pair is two ends of a TCP connection.
func pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

// All connections of a machine share one pace each way, which follows its record;
// what is carried is whole.
func TestRates(t *testing.T) {
	var limit atomic.Uint64
	r := &rates{limit: func(string) uint64 { return limit.Load() }}
	guest1, far1 := pair(t)
	guest2, _ := pair(t)
	one, two := r.of(t.Context(), "m", guest1).(*paced), r.of(t.Context(), "m", guest2).(*paced)
	other := r.of(t.Context(), "n", guest2).(*paced)
	if one.pace != two.pace || one.pace == other.pace {
		t.Error("a pace is not a machine's own")
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 10<<10) // ten pieces
	received := make(chan []byte, 1)
	go func() {
		got, _ := io.ReadAll(far1)
		received <- got
	}()
	for _, l := range []uint64{0, 1 << 30, 0} {
		limit.Store(l)
		if _, err := one.Write(data); err != nil {
			t.Fatal(err)
		}
		want := rate.Inf
		if l > 0 {
			want = rate.Limit(l)
		}
		if got := one.pace.to.Limit(); got != want {
			t.Errorf("the pace is %v, want %v", got, want)
		}
	}
	if err := one.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := <-received; !bytes.Equal(got, bytes.Repeat(data, 3)) {
		t.Errorf("%d bytes came, or others; %d were sent", len(got), 3*len(data))
	}
	_, _, _ = one.Close(), two.Close(), other.Close()
	if len(r.all) != 0 {
		t.Errorf("paces are left: %v", r.all)
	}
}

// A limit costs its time: so much by the limiter's own account, whatever the
// machine that this runs on is doing.
func TestRateIsKept(t *testing.T) {
	r := &rates{limit: func(string) uint64 { return 64 << 10 }}
	guest, far := pair(t)
	conn := r.of(t.Context(), "m", guest).(*paced)
	go func() { _, _ = io.Copy(io.Discard, far) }()
	began := time.Now()
	if _, err := conn.Write(make([]byte, 3*piece)); err != nil {
		t.Fatal(err)
	}
	// The first piece is free.
	if took := time.Since(began); took < 2*time.Second*piece/(64<<10) {
		t.Errorf("%d bytes at 64 KiB/s took %v", 3*piece, took)
	}
	_ = conn.Close()
}

// Closing ends a wait, and so does a reset.
func TestRateEndsWithItsConnection(t *testing.T) {
	for name, end := range map[string]func(net.Conn){
		"closed": func(c net.Conn) { _ = c.Close() },
		"reset":  reset,
	} {
		t.Run(name, func(t *testing.T) {
			r := &rates{limit: func(string) uint64 { return 1 }}
			guest, far := pair(t)
			conn := r.of(t.Context(), "m", guest)
			done := make(chan error, 1)
			go func() {
				_, err := conn.Write(make([]byte, 10*piece))
				done <- err
			}()
			// The first piece is free; then it waits.
			if _, err := io.ReadFull(far, make([]byte, piece)); err != nil {
				t.Fatal(err)
			}
			end(conn)
			if err := <-done; err == nil {
				t.Error("all was written to a connection that has ended")
			}
			_ = conn.Close()
		})
	}
}
