package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// listener is a server that finishes handshakes while it lives, and never says
// anything but that.
type listener struct {
	net.Listener
	hangs      atomic.Bool
	handshakes chan struct{}
}

func newListener(t *testing.T) *listener {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1)}
	cert, err := x509.CreateCertificate(rand.Reader, about, about, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &listener{Listener: tcp, handshakes: make(chan struct{}, 100)}
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}}
	var conns []net.Conn
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			conns = append(conns, conn)
			if l.hangs.Load() {
				continue // the kernel has taken it, and nobody comes
			}
			if tls.Server(conn, config).Handshake() == nil {
				l.handshakes <- struct{}{}
			}
		}
	})
	t.Cleanup(func() {
		_ = tcp.Close()
		wg.Wait()
		for _, c := range conns {
			_ = c.Close()
		}
	})
	return l
}

// connect makes a watched connection, as gRPC does.
func (l *listener) connect(t *testing.T) *tls.Conn {
	t.Helper()
	config := &tls.Config{InsecureSkipVerify: true}
	w := &silenceWatch{config: config, silent: 20 * time.Millisecond, answers: 500 * time.Millisecond}
	conn, err := w.dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	c := tls.Client(conn, config)
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-l.handshakes
	return c
}

// TestSilenceEndsAConnection: what was sent to a server that hangs fails, long
// before anybody else notices.
func TestSilenceEndsAConnection(t *testing.T) {
	l := newListener(t)
	c := l.connect(t)
	l.hangs.Store(true)
	if _, err := c.Write([]byte("who is there?")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("reading what does not come: %v, want that it is closed", err)
	}
}

// TestSilenceOfTheLiving: a server that is slow, or owes no answer, keeps its
// connection, and each silence is looked into.
func TestSilenceOfTheLiving(t *testing.T) {
	l := newListener(t)
	c := l.connect(t)
	for range 3 {
		if _, err := c.Write([]byte("take your time")); err != nil {
			t.Fatal(err)
		}
		<-l.handshakes // it was asked whether anybody is there
	}
	l.hangs.Store(true)
	for {
		// The last answer may still be on its way.
		if _, err := c.Write([]byte("and now?")); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
}

// TestSilenceAfterClose: nobody is asked any more, and nothing is left.
func TestSilenceAfterClose(t *testing.T) {
	l := newListener(t)
	c := l.connect(t)
	l.hangs.Store(true)
	if _, err := c.Write([]byte("goodbye")); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
