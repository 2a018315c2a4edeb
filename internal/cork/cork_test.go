package cork_test

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
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
