package cork_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"testing"

	"github.com/argon-cluster/argon/internal/cork"
)

// counted counts the system calls that would be made.
type counted struct {
	net.Conn
	writes int
}

func (c *counted) Write(p []byte) (int, error) {
	c.writes++
	return c.Conn.Write(p)
}

func TestCork(t *testing.T) {
	near, far := net.Pipe()
	lower := &counted{Conn: near}
	c := cork.New(lower)
	got := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(far)
		got <- b
	}()
	var want []byte
	write := func(n int) {
		p := bytes.Repeat([]byte{byte(len(want))}, n)
		want = append(want, p...)
		if _, err := c.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	calls := func(what string, n int) {
		t.Helper()
		if lower.writes != n {
			t.Errorf("%s: %d calls, want %d", what, lower.writes, n)
		}
	}
	write(10)
	calls("without a cork", 1)
	c.Cork()
	for range 5 {
		write(1000)
	}
	calls("held back", 1)
	if err := c.Uncork(); err != nil {
		t.Fatal(err)
	}
	calls("uncorked", 2)
	if err := c.Uncork(); err != nil {
		t.Fatal(err)
	}
	calls("nothing held back", 2)
	c.Cork()
	write(300 << 10)
	calls("more than it holds", 3)
	if err := c.Uncork(); err != nil {
		t.Fatal(err)
	}
	write(1)
	calls("a cork pulled", 4)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(<-got, want) {
		t.Error("what arrived is something else")
	}
}

func TestOf(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	c := cork.New(near)
	if cork.Of(tls.Client(c, &tls.Config{})) != c || cork.Of(c) != c {
		t.Error("not found")
	}
	none := cork.Of(tls.Client(far, &tls.Config{}))
	none.Cork()
	if err := none.Uncork(); err != nil {
		t.Error(err)
	}
}

// What TLS has ended is whole; what TCP has ended is not.
func TestCutIsNoEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(*tls.Conn) error
		want error
	}{
		"ended":            {(*tls.Conn).Close, nil},
		"ended in one way": {(*tls.Conn).CloseWrite, nil},
		"given up":         {func(c *tls.Conn) error { return c.NetConn().Close() }, cork.ErrCut},
		"cut in a record": {func(c *tls.Conn) error {
			_, err := c.NetConn().Write([]byte{23, 3, 3, 0, 100})
			return errors.Join(err, c.NetConn().Close())
		}, cork.ErrCut},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := pair(t)
			_, err := far.Write([]byte("hello"))
			if err := errors.Join(err, tt.end(far)); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(near)
			if string(got) != "hello" || !errors.Is(err, tt.want) {
				t.Errorf("read %q, %v, want %v", got, err, tt.want)
			}
		})
	}
}

// pair is two ends of a TLS connection.
func pair(t *testing.T) (client, server *tls.Conn) {
	t.Helper()
	certified := httptest.NewUnstartedServer(nil)
	certified.StartTLS()
	certified.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	near, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	client = tls.Client(cork.New(near), &tls.Config{InsecureSkipVerify: true})
	server = tls.Server(cork.New(far), &tls.Config{Certificates: certified.TLS.Certificates})
	t.Cleanup(func() { _, _ = client.Close(), server.Close() })
	shaken := make(chan error, 1)
	go func() { shaken <- server.HandshakeContext(t.Context()) }()
	if err := errors.Join(client.HandshakeContext(t.Context()), <-shaken); err != nil {
		t.Fatal(err)
	}
	return client, server
}
