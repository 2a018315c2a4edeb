package qemu

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// historySize is how much of what was printed is kept, in bytes.
	historySize = 64 << 10
	// logSize is how long the log of the console may grow.
	logSize = 1 << 20
	// backlog is how much a reader may be behind before it misses something.
	backlog = 256 << 10
	// inputTimeout bounds how long a guest may not take what was typed.
	inputTimeout = 5 * time.Second
)

// console is a guest's serial port, of which QEMU lets only one client have a
// share: it keeps what was printed last and lets several readers have it. Safe
// for concurrent use.
type console struct {
	dir string
	pid int // QEMU's
	log *slog.Logger

	mu      sync.Mutex
	conn    net.Conn // nil while there is none
	history []byte
	printed int // bytes in the log file, about
	readers map[*reader]bool
	ended   bool
}

// newConsole begins with what the log kept from before the daemon was started.
func newConsole(dir string, pid int, log *slog.Logger) *console {
	c := &console{dir: dir, pid: pid, log: log, readers: map[*reader]bool{}}
	if data, err := readOwn(consoleLog(dir)); err == nil {
		c.printed = len(data)
		c.history = tail(data)
	}
	return c
}

func tail(b []byte) []byte { return b[max(0, len(b)-historySize):] }

// run reads what the guest prints until it is gone, or ctx ends. It reads
// always: a serial port that nobody reads holds up its guest.
func (c *console) run(ctx context.Context, done <-chan struct{}) {
	defer c.end()
	for {
		c.readOnce(ctx, done)
		select {
		case <-ctx.Done():
			return
		case <-done:
			return
		case <-time.After(lookEvery):
		}
	}
}

// readOnce reads from one connection until it ends.
func (c *console) readOnce(ctx context.Context, done <-chan struct{}) {
	conn, err := dial(ctx, consoleSocket(c.dir), c.pid)
	if err != nil {
		return
	}
	ended := make(chan struct{})
	var closing sync.WaitGroup
	closing.Go(func() {
		select {
		case <-ctx.Done():
		case <-done:
		case <-ended:
		}
		_ = conn.Close()
	})
	c.mu.Lock()
	c.conn = conn
	c.mu.Unlock()
	buf := make([]byte, 16<<10)
	for {
		n, err := conn.Read(buf)
		c.print(buf[:n])
		if err != nil {
			break
		}
	}
	c.mu.Lock()
	c.conn = nil
	c.mu.Unlock()
	close(ended)
	closing.Wait()
}

// print keeps what was printed and hands it to the readers.
func (c *console) print(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.history = tail(append(c.history, b...))
	for r := range c.readers {
		r.add(b)
	}
	if c.printed += len(b); c.printed > logSize {
		c.shorten()
	}
}

// shorten keeps the log from growing: QEMU appends to it for ever.
func (c *console) shorten() {
	c.printed = len(c.history)
	f, err := openOwn(consoleLog(c.dir), os.O_WRONLY|os.O_APPEND)
	if err == nil {
		if err = f.Truncate(0); err == nil {
			_, err = f.Write(c.history)
		}
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		c.log.Warn("the log of a console can't be shortened", "path", consoleLog(c.dir), "err", err)
	}
}

func (c *console) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	for r := range c.readers {
		r.finish()
	}
}

// open makes one more reader, which first gets the history.
func (c *console) open() (io.ReadWriteCloser, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := &reader{console: c, more: make(chan struct{}, 1)}
	r.add(c.history)
	if c.ended {
		r.finish()
	} else {
		c.readers[r] = true
	}
	return r, nil
}

// reader is one open console.
type reader struct {
	console *console
	more    chan struct{}

	mu       sync.Mutex
	pending  []byte
	finished bool
}

// add never waits: whoever is too far behind misses what is oldest.
func (r *reader) add(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending = append(r.pending, b...)
	r.pending = r.pending[max(0, len(r.pending)-backlog):]
	r.wake()
}

func (r *reader) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finished = true
	r.wake()
}

func (r *reader) wake() {
	select {
	case r.more <- struct{}{}:
	default:
	}
}

// Read waits until something was printed. io.EOF when the guest is gone or the
// console was closed. One Read at a time.
func (r *reader) Read(p []byte) (int, error) {
	for {
		r.mu.Lock()
		n := copy(p, r.pending)
		r.pending = r.pending[n:]
		finished := r.finished
		r.mu.Unlock()
		if n > 0 || len(p) == 0 {
			return n, nil
		}
		if finished {
			return 0, io.EOF
		}
		<-r.more
	}
}

// Write types into the guest.
func (r *reader) Write(p []byte) (int, error) {
	r.console.mu.Lock()
	conn := r.console.conn
	r.console.mu.Unlock()
	if conn == nil {
		return 0, errors.New("the guest's console is not there")
	}
	if err := conn.SetWriteDeadline(time.Now().Add(inputTimeout)); err != nil {
		return 0, err
	}
	return conn.Write(p)
}

// Close ends the reader; a Read that waits ends.
func (r *reader) Close() error {
	r.console.mu.Lock()
	delete(r.console.readers, r)
	r.console.mu.Unlock()
	r.finish()
	return nil
}
