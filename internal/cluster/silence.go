package cluster

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"time"
)

const (
	// silentFor is how long nothing may come after something was sent until it
	// is asked whether anybody is there.
	silentFor = time.Second
	// answersWithin is how long the answer to that may take: less than a slow
	// disk keeps a request, as it needs none.
	answersWithin = 700 * time.Millisecond
)

// silenceWatch ends connections to servers that hang: their kernel still takes
// what is sent, and nobody answers. gRPC's own pings notice that after 13
// seconds, as it allows none more often than every ten; until then it would
// send each third request there, and every watch that was there would be quiet.
//
// That nothing comes back is only a suspicion: an etcd may be slow, or what was
// sent may need no answer. So a second connection is made to the same address.
// A server that lives answers its first message, whatever its disk does.
type silenceWatch struct {
	config *tls.Config
	// For tests.
	silent, answers time.Duration
}

// dial makes a connection that is watched, for gRPC.
func (w *silenceWatch) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	asking, cancel := context.WithCancel(context.Background())
	c := &watchedConn{Conn: conn, watch: w, address: address, asking: asking, cancel: cancel}
	c.timer = time.AfterFunc(w.silent, c.suspect)
	c.timer.Stop()
	return c, nil
}

// alive reports whether somebody at an address finishes a handshake.
func (w *silenceWatch) alive(ctx context.Context, address string) bool {
	ctx, cancel := context.WithTimeout(ctx, w.answers)
	defer cancel()
	conn, err := (&tls.Dialer{Config: w.config}).DialContext(ctx, "tcp", address)
	if err != nil {
		return false
	}
	_ = conn.Close() // nothing was sent
	return true
}

// watchedConn is closed when what was sent is not answered, and nobody is
// there. Safe for concurrent use, as connections are.
type watchedConn struct {
	net.Conn
	watch   *silenceWatch
	address string
	// asking ends when the connection is closed.
	asking context.Context
	cancel context.CancelFunc

	mu    sync.Mutex
	timer *time.Timer
	// unanswered: something was sent after what came last.
	unanswered bool
	// sent: something was sent after it was last asked whether anybody is there.
	sent   bool
	closed bool
	// asked is for the goroutine that asks whether anybody is there.
	asked sync.WaitGroup
}

// Write implements net.Conn.
func (c *watchedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.sent = true
	if !c.unanswered && !c.closed {
		c.unanswered = true
		c.timer.Reset(c.watch.silent)
	}
	c.mu.Unlock()
	return c.Conn.Write(p)
}

// Read implements net.Conn.
func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.answered()
	}
	return n, err
}

func (c *watchedConn) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unanswered {
		c.unanswered = false
		c.timer.Stop()
	}
}

// suspect asks whether anybody is there, and ends the connection if nobody is.
func (c *watchedConn) suspect() {
	c.mu.Lock()
	doubtful := c.unanswered && !c.closed
	if doubtful {
		c.sent = false
		c.asked.Add(1)
	}
	c.mu.Unlock()
	if !doubtful {
		return
	}
	defer c.asked.Done()
	switch alive := c.watch.alive(c.asking, c.address); {
	case c.asking.Err() != nil:
	case alive:
		c.goOn()
	default:
		_ = c.Conn.Close() // whoever reads or writes learns of it
	}
}

// goOn watches what was sent meanwhile, or what is sent next: a connection that
// is quiet is not asked about again and again.
func (c *watchedConn) goOn() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unanswered && c.sent && !c.closed {
		c.timer.Reset(c.watch.silent)
		return
	}
	c.unanswered = false
}

// Close implements net.Conn.
func (c *watchedConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.timer.Stop()
	c.mu.Unlock()
	c.cancel()
	err := c.Conn.Close()
	c.asked.Wait()
	return err
}
