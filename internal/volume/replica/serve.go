package replica

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

const (
	// workers is how many operations of one connection are under way at once.
	workers = 8
	// window is how many requests of one connection may be unanswered before
	// no more are read. It is more than a holder ever has in flight, or a slow
	// disk would hide its pings.
	window = 1024
	// helloTimeout bounds how long a connection may take to say what it
	// wants.
	helloTimeout = 10 * time.Second
	// idleTimeout ends a connection whose holder is silent: it pings every
	// second.
	idleTimeout = 15 * time.Second
)

// Serve serves one holder's connection, which is one session, until it ends or
// ctx does. The peer has been authenticated as a server of this cluster. It
// closes the connection. Garbage ends it with an error.
func Serve(ctx context.Context, nc net.Conn, store *Store) error {
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	defer stop()
	c := &serverConn{
		nc: nc, in: bufio.NewReaderSize(nc, 64<<10), out: bufio.NewWriterSize(nc, 64<<10),
		todo: make(chan *job, window), answers: make(chan *job, window), slots: make(chan struct{}, window),
	}
	if err := c.hello(store); err != nil {
		return err
	}
	var working, writing sync.WaitGroup
	for range workers {
		working.Go(c.work)
	}
	writing.Go(c.write)
	err := c.read()
	close(c.todo)
	working.Wait()
	close(c.answers)
	writing.Wait()
	// A session that was not closed clean ends with the next one: until then
	// nobody uses it.
	if errors.Is(err, io.EOF) || ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// serverConn is the replica's side of a connection.
type serverConn struct {
	nc      net.Conn
	in      *bufio.Reader
	out     *bufio.Writer // the writer's, after the greeting
	session *Session
	todo    chan *job
	answers chan *job
	slots   chan struct{} // one for each request that is not answered
}

// job is a request and then its answer.
type job struct {
	head wire.Header
	data []byte // a write's, a read's, or an answer's text
	pool *[]byte
}

var payloads = sync.Pool{New: func() any { b := make([]byte, 0, 256<<10); return &b }}

// take makes room for n bytes; large ones are not kept.
func (j *job) take(n int) {
	j.pool = payloads.Get().(*[]byte)
	if cap(*j.pool) < n {
		*j.pool = make([]byte, n)
	}
	j.data = (*j.pool)[:n]
}

func (j *job) release() {
	if j.pool != nil && cap(*j.pool) <= 1<<20 {
		payloads.Put(j.pool)
	}
	j.pool, j.data = nil, nil
}

// hello seals the replica for the holder that the connection is from.
func (c *serverConn) hello(store *Store) error {
	if err := c.nc.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	var buf [wire.HeaderSize]byte
	h, err := wire.ReadHeader(c.in, buf[:])
	if err != nil {
		return fmt.Errorf("replica connection from %s: %w", c.nc.RemoteAddr(), err)
	}
	if h.Type != wire.Hello {
		return fmt.Errorf("replica connection from %s begins with type %d: %w", c.nc.RemoteAddr(), h.Type, wire.ErrFrame)
	}
	payload := make([]byte, h.Payload)
	if _, err := io.ReadFull(c.in, payload); err != nil {
		return err
	}
	g, err := wire.ParseGreeting(payload)
	if err != nil {
		return err
	}
	answer := &job{head: wire.Header{Type: wire.Hello, ID: h.ID}}
	info, err := c.seal(store, g)
	answer.judge(err)
	if err == nil {
		answer.data = wire.Info{Incarnation: info.Incarnation, Health: uint8(info.Health)}.Marshal()
	}
	if werr := c.send(answer, true); werr != nil {
		return werr
	}
	return err
}

func (c *serverConn) seal(store *Store, g wire.Greeting) (Info, error) {
	if g.ClusterID != store.opts.ClusterID {
		return Info{}, fmt.Errorf("a holder of cluster %s: %w", g.ClusterID, ErrForeign)
	}
	r, err := store.Get(g.VolumeID, g.ReplicaID)
	if err != nil {
		return Info{}, err
	}
	var info Info
	c.session, info, err = r.Seal(g.Epoch)
	return info, err
}

// judge puts an error into an answer.
func (j *job) judge(err error) {
	var sealed *SealedError
	switch {
	case err == nil:
		return
	case errors.As(err, &sealed):
		j.head.Status, j.head.Off = wire.Sealed, int64(sealed.Epoch)
	case errors.Is(err, volume.ErrNoSpace):
		j.head.Status = wire.NoSpace
	case errors.Is(err, ErrFenced):
		j.head.Status = wire.Fenced
	case errors.Is(err, ErrNotFound):
		j.head.Status = wire.NotFound
	case errors.Is(err, volume.ErrRange), errors.Is(err, ErrForeign):
		j.head.Status = wire.Refused
	default:
		j.head.Status = wire.Broken
	}
	j.release()
	j.data = []byte(err.Error())
}

// read takes requests until the connection ends.
func (c *serverConn) read() error {
	var buf [wire.HeaderSize]byte
	for {
		if err := c.nc.SetReadDeadline(time.Now().Add(idleTimeout)); err != nil {
			return err
		}
		h, err := wire.ReadHeader(c.in, buf[:])
		if err != nil {
			return fmt.Errorf("replica connection from %s: %w", c.nc.RemoteAddr(), err)
		}
		if err := legal(h); err != nil {
			return fmt.Errorf("replica connection from %s: %w", c.nc.RemoteAddr(), err)
		}
		c.slots <- struct{}{}
		j := &job{head: h}
		if h.Payload > 0 {
			j.take(int(h.Payload))
			if _, err := io.ReadFull(c.in, j.data); err != nil {
				return err
			}
		}
		if h.Type == wire.Ping {
			// Answered here: it asks whether this process lives, not the disk.
			c.answers <- j
			continue
		}
		c.todo <- j
	}
}

// legal refuses what no holder sends.
func legal(h wire.Header) error {
	switch {
	case h.Type == wire.Hello, h.Status != wire.OK,
		h.Type == wire.Write && int64(h.Payload) != h.Len,
		h.Type != wire.Write && h.Payload != 0,
		h.Type == wire.Read && h.Len > volume.MaxRequest,
		h.Type == wire.Changed && (h.Len+wire.ChangedGrain-1)/wire.ChangedGrain > 8*volume.MaxRequest:
		return fmt.Errorf("request of type %d for %d bytes with a payload of %d: %w", h.Type, h.Len, h.Payload, wire.ErrFrame)
	}
	return nil
}

func (c *serverConn) work() {
	for j := range c.todo {
		c.carryOut(j)
		c.answers <- j
	}
}

func (c *serverConn) carryOut(j *job) {
	h := j.head
	var err error
	switch h.Type {
	case wire.Read:
		j.take(int(h.Len))
		err = c.session.ReadAt(j.data, h.Off)
	case wire.Write:
		err = c.session.WriteAt(j.data, h.Off, h.Generation, h.FUA)
		j.release()
	case wire.Zero:
		err = c.session.Zero(h.Off, h.Len, h.Generation, h.FUA)
	case wire.Trim:
		err = c.session.Trim(h.Off, h.Len, h.Generation, h.FUA)
	case wire.Flush:
		err = c.session.Flush()
	case wire.BeginSync:
		var info Info
		if info, err = c.session.BeginSync(uint64(h.Off), h.Generation); err == nil {
			j.data = wire.Info{Incarnation: info.Incarnation, Health: uint8(info.Health), Emptied: info.Emptied}.Marshal()
		}
	case wire.Changed:
		grains := (h.Len + wire.ChangedGrain - 1) / wire.ChangedGrain
		j.take(int((grains + 7) / 8))
		clear(j.data)
		err = c.session.Changed(h.Generation, h.Off, h.Len, wire.ChangedGrain, j.data)
	case wire.EndSync:
		err = c.session.EndSync()
	case wire.Close:
		err = c.session.Close(true)
	}
	j.judge(err)
}

// write sends answers, several in one system call when there are several. After
// an error the rest only passes through.
func (c *serverConn) write() {
	broken := false
	for j := range c.answers {
		if !broken {
			if err := c.send(j, len(c.answers) == 0); err != nil {
				broken = true
				_ = c.nc.Close() // the reader ends, too
			}
		}
		j.release()
		<-c.slots
	}
}

func (c *serverConn) send(j *job, flush bool) error {
	if err := c.nc.SetWriteDeadline(time.Now().Add(idleTimeout)); err != nil {
		return err
	}
	var head [wire.HeaderSize]byte
	j.head.Payload = uint32(len(j.data))
	j.head.Put(head[:])
	_, err := c.out.Write(head[:])
	if err == nil {
		_, err = c.out.Write(j.data)
	}
	if err == nil && flush {
		err = c.out.Flush()
	}
	return err
}
