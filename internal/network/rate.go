package network

import (
	"context"
	"net"
	"sync"

	"golang.org/x/time/rate"
)

// rates keep machines' published ports to so many bytes per second, all of a
// machine's connections together, each way for itself. They are kept where the
// machine runs, which all connections come to. Safe for concurrent use.
type rates struct {
	// limit is a machine's, now; 0: none.
	limit func(machineID string) uint64

	mu  sync.Mutex
	all map[string]*pace
}

// pace is one machine's.
type pace struct {
	to, from *rate.Limiter
	users    int
}

// piece is how much is carried at once when there is a limit, in bytes: small, so
// that several connections get their turns.
const piece = 16 << 10

// of wraps a connection to a machine. It closes with the connection.
func (r *rates) of(ctx context.Context, machineID string, conn net.Conn) net.Conn {
	if r.limit == nil {
		return conn
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.all[machineID]
	if p == nil {
		p = &pace{to: rate.NewLimiter(rate.Inf, piece), from: rate.NewLimiter(rate.Inf, piece)}
		if r.all == nil {
			r.all = map[string]*pace{}
		}
		r.all[machineID] = p
	}
	p.users++
	ctx, cancel := context.WithCancel(ctx)
	return &paced{Conn: conn, rates: r, machineID: machineID, pace: p, ctx: ctx, cancel: cancel}
}

// paced is a connection to a machine, which may have a limit at any time.
type paced struct {
	net.Conn
	rates     *rates
	machineID string
	pace      *pace
	ctx       context.Context
	cancel    context.CancelFunc
	closing   sync.Once
}

// wait waits until n bytes may pass one way.
func (c *paced) wait(l *rate.Limiter, n int) error {
	limit := rate.Inf
	if bytes := c.rates.limit(c.machineID); bytes > 0 {
		limit = rate.Limit(bytes)
	}
	if l.Limit() != limit {
		l.SetLimit(limit)
	}
	for n > 0 {
		now := min(n, piece)
		if err := l.WaitN(c.ctx, now); err != nil {
			return net.ErrClosed // with the connection, which is why nobody waits any more
		}
		n -= now
	}
	return nil
}

// Read implements net.Conn. What was read is paid for before more is.
func (c *paced) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		if werr := c.wait(c.pace.from, n); werr != nil && err == nil {
			err = werr
		}
	}
	return n, err
}

// Write implements net.Conn.
func (c *paced) Write(b []byte) (int, error) {
	done := 0
	for len(b) > 0 {
		part := b[:min(len(b), piece)]
		if err := c.wait(c.pace.to, len(part)); err != nil {
			return done, err
		}
		n, err := c.Conn.Write(part)
		if done += n; err != nil {
			return done, err
		}
		b = b[n:]
	}
	return done, nil
}

// Close implements net.Conn.
func (c *paced) Close() error {
	c.closing.Do(func() {
		c.cancel()
		c.rates.mu.Lock()
		defer c.rates.mu.Unlock()
		if c.pace.users--; c.pace.users == 0 {
			delete(c.rates.all, c.machineID)
		}
	})
	return c.Conn.Close()
}

// CloseWrite closes one direction.
func (c *paced) CloseWrite() error { return c.Conn.(interface{ CloseWrite() error }).CloseWrite() }
