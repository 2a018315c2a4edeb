package nonblock_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/nonblock"
)

// pair is two ends of a unix socket, the near one as a Conn.
func pair(t *testing.T) (near *nonblock.Conn, far net.Conn) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if far, err = net.Dial("unix", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	nc, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = nc.Close(), far.Close() })
	near, ok := nonblock.New(nc).(*nonblock.Conn)
	if !ok {
		t.Fatal("a unix socket is not taken for a socket")
	}
	return near, far
}

// pieces are n bytes, cut at random, more often than one call takes.
func pieces(n int) (cut net.Buffers, whole []byte) {
	r := rand.New(rand.NewPCG(1, 2))
	whole = make([]byte, n)
	for i := range whole {
		whole[i] = byte(r.Uint32())
	}
	for rest := whole; len(rest) > 0; {
		k := min(len(rest), r.IntN(2*n/3000))
		cut = append(cut, rest[:k])
		rest = rest[k:]
	}
	return cut, whole
}

func TestBothWays(t *testing.T) {
	near, far := pair(t)
	cut, whole := pieces(3 << 20) // more than a socket takes at once
	echoed := make(chan error, 1)
	go func() {
		_, err := io.CopyN(far, far, int64(len(whole)))
		echoed <- err
	}()
	written := make(chan error, 1)
	go func() {
		n, err := near.WriteAll(cut)
		if n != int64(len(whole)) && err == nil {
			err = io.ErrShortWrite
		}
		written <- err
	}()
	got := make([]byte, len(whole))
	if _, err := io.ReadFull(near, got); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-written, <-echoed); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, whole) {
		t.Error("what came back is something else")
	}
}

// WriteNow takes what there is room for, and tells how much that was.
func TestWriteNow(t *testing.T) {
	near, far := pair(t)
	cut, whole := pieces(3 << 20)
	n, err := near.WriteNow(cut)
	if err != nil || n == 0 || n == int64(len(whole)) {
		t.Fatalf("%d bytes of %d, %v", n, len(whole), err)
	}
	if more, err := near.WriteNow(cut); more != 0 || err != nil {
		t.Errorf("%d bytes more, %v", more, err)
	}
	got := make([]byte, n)
	if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, whole[:n]) {
		t.Errorf("what arrived is something else, %v", err)
	}
}

func TestEnds(t *testing.T) {
	near, far := pair(t)
	if err := near.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	_ = near.SetReadDeadline(time.Time{})
	_ = far.Close()
	if _, err := near.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the other end is closed: %v", err)
	}
	if _, err := near.Write([]byte("x")); err == nil {
		t.Error("written to nobody")
	}
	_ = near.Close()
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after it is closed: %v", err)
	}
}

func TestNotASocket(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	if nonblock.New(near) != near {
		t.Error("a pipe within memory is taken for a socket")
	}
}
