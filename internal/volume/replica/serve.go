package replica

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/argon-cluster/argon/internal/cork"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

const (
	// workers is how many goroutines serve a connection: all but one may be
	// carrying a request out. Those who wait for the disk together are served
	// together: by its queue, or by one sync of what their writes need first.
	workers = 33
	// window is how many requests of one connection may be unanswered before
	// no more are read. It is more than a holder ever has in flight, or a slow
	// disk would hide its pings.
	window = 1024
	// helloTimeout bounds how long a connection may take to say what it
	// wants.
	helloTimeout = 10 * time.Second
	// idleTimeout is how long a holder is silent, at least, before its
	// connection is ended; at most twice that. It pings every second.
	idleTimeout = 15 * time.Second
)

// Serve serves one holder's connection, which is one session, until it ends or
// ctx does. The peer has been authenticated as a server of this cluster. It
// closes the connection. Garbage ends it with an error.
func Serve(ctx context.Context, nc net.Conn, store *Store) error {
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	defer stop()
	var watching sync.WaitGroup
	defer watching.Wait()
	over, suspended := make(chan struct{}), store.suspension()
	defer close(over)
	watching.Go(func() {
		select {
		case <-suspended:
			_ = nc.Close()
		case <-over:
		}
	})
	c := &serverConn{nc: nc, below: cork.Of(nc), in: bufio.NewReaderSize(nc, 64<<10), out: bufio.NewWriterSize(nc, 64<<10), slots: make(chan struct{}, window)}
	if err := c.hello(store); err != nil {
		return err
	}
	c.turn = newTurn(c.giveTurn)
	defer c.turn.stop()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(c.work)
	}
	wg.Wait()
	// A session that was not closed clean ends with the next one: until then
	// nobody uses it.
	if isClosed(suspended) || errors.Is(c.err, io.EOF) || errors.Is(c.err, cork.ErrCut) || ctx.Err() != nil || errors.Is(c.err, net.ErrClosed) {
		return nil
	}
	return c.err
}

// serverConn is the replica's side of a connection. Its workers take turns: one
// reads requests and carries out those that most likely do not wait for the
// disk. Before it carries out any other it lets the next worker read. So a
// request passes from the network to the disk and back without waiting for
// another goroutine (Schmidt et al. 2000, Leader/Followers).
type serverConn struct {
	nc      net.Conn
	session *Session
	slots   chan struct{} // one for each request that is not answered
	turn    *turn

	reading sync.Mutex // whose turn it is; guards in, err and readBy
	in      *bufio.Reader
	err     error     // why no more is read
	readBy  time.Time // the read deadline
	head    [wire.HeaderSize]byte

	mu    sync.Mutex
	busy  int    // workers that carry a request out
	stuck int    // of them, those that lost their turn to the disk
	todo  []*job // requests that found all others busy

	writing sync.Mutex // guards out, broken and writeBy
	out     *bufio.Writer
	outHead [wire.HeaderSize]byte
	below   *cork.Conn
	broken  bool
	writeBy time.Time    // the write deadline
	queued  atomic.Int32 // who want to write
}

// job is a request and then its answer.
type job struct {
	head wire.Header
	data []byte // a write's, a read's, or an answer's text
	pool *sync.Pool
	buf  *[]byte // what data is in, from the pool
	done bool
}

// Buffers for payloads, most of which are small.
var (
	smallPayloads = sync.Pool{New: func() any { b := make([]byte, atOnce); return &b }}
	largePayloads = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}
)

// take makes room for n bytes; the largest are not kept.
func (j *job) take(n int) {
	j.pool = &smallPayloads
	if n > atOnce {
		j.pool = &largePayloads
	}
	j.buf = j.pool.Get().(*[]byte)
	if len(*j.buf) < n {
		b := make([]byte, n)
		j.pool, j.buf = nil, &b
	}
	j.data = (*j.buf)[:n]
}

func (j *job) takeZeros(n int) {
	j.take(n)
	clear(j.data)
}

// takeSums makes checksums the answer.
func (j *job) takeSums(fill func([]wire.Sum) error) error {
	sums := make([]wire.Sum, wire.SumBytes(j.head.Len)/wire.SumSize)
	err := fill(sums)
	if err == nil {
		j.data = wire.AppendSums(nil, sums)
	}
	return err
}

func (j *job) release() {
	if j.pool != nil {
		j.pool.Put(j.buf)
	}
	j.pool, j.buf, j.data = nil, nil, nil
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
	if werr := errors.Join(c.put(answer), c.send()); werr != nil {
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
	case errors.Is(err, volume.ErrNoSnapshot):
		j.head.Status = wire.NoSnapshot
	case errors.Is(err, volume.ErrDamaged):
		j.head.Status = wire.Damaged
	case errors.Is(err, volume.ErrRange), errors.Is(err, volume.ErrTooManySnapshots),
		errors.Is(err, ErrForeign), errors.Is(err, ErrInUse):
		j.head.Status = wire.Refused
	default:
		j.head.Status = wire.Broken
	}
	j.release()
	j.data = []byte(err.Error())
}

// work takes turns with the other workers until the connection ends.
func (c *serverConn) work() {
	for {
		j, mine := c.read()
		if j == nil {
			return
		}
		for ; mine; j, mine = c.finish() {
			c.carryOut(j)
			c.answer(j, false)
			<-c.slots
		}
	}
}

// claim tells whether the worker should carry out what it has read. If all
// others are busy it goes on reading: somebody must hear the pings.
func (c *serverConn) claim(j *job) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy == workers-1 {
		c.todo = append(c.todo, j)
		return false
	}
	c.busy++
	return true
}

// finish ends a request, and takes the next that has been waiting, if there is
// one.
func (c *serverConn) finish() (*job, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.todo) == 0 {
		c.busy--
		return nil, false
	}
	j := c.todo[0]
	c.todo = c.todo[1:]
	return j, true
}

// read waits for the worker's turn and then serves requests up to the first that
// may wait for the disk, which it returns; mine tells whether the worker should
// carry it out. Nothing is returned when the connection has ended.
func (c *serverConn) read() (j *job, mine bool) {
	c.reading.Lock()
	j = &job{}
	held := false // answers wait to be sent together
	for c.err == nil {
		if err := c.next(j); err != nil {
			c.err = fmt.Errorf("replica connection from %s: %w", c.nc.RemoteAddr(), err)
			break
		}
		if kept := c.tryOut(j); !kept {
			c.unstick()
			c.slots <- struct{}{}
			return j, true
		}
		if !j.done {
			if held {
				c.flush()
			}
			c.slots <- struct{}{}
			mine = c.claim(j)
			c.reading.Unlock()
			return j, mine
		}
		held = c.in.Buffered() > 0 || c.below.Buffered() > 0
		c.answer(j, held)
	}
	c.reading.Unlock()
	return nil, false
}

// tryOut carries out a request if that most likely does not wait for the disk.
// If it did wait the worker may have lost its turn; then it counts as busy.
func (c *serverConn) tryOut(j *job) (kept bool) {
	h := j.head
	if h.Type == wire.Ping {
		// Answered here: it asks whether this process lives, not the disk.
		j.done = true
		return true
	}
	if h.FUA || (h.Type != wire.Write && h.Type != wire.Read) || h.Len > atOnce || !c.mayTry() {
		return true
	}
	mark := c.turn.begin()
	var err error
	if h.Type == wire.Write {
		j.done, err = c.session.TryWriteAt(j.data, h.Off, h.Generation)
	} else {
		j.take(int(h.Len))
		j.done, err = c.session.TryReadAt(j.data, h.Off)
	}
	kept = c.turn.end(mark)
	if j.done && h.Type == wire.Write || !j.done && h.Type == wire.Read {
		j.release()
	}
	j.judge(err)
	return kept
}

// mayTry tells whether the worker that reads may try to carry out a request: if
// the disk holds it up another one must be left to read, and what held up one
// would hold up others.
func (c *serverConn) mayTry() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.busy < workers-1 && c.stuck == 0
}

// giveTurn takes the turn from a worker that the disk holds up, for another one.
func (c *serverConn) giveTurn() {
	c.mu.Lock()
	c.busy++
	c.stuck++
	c.mu.Unlock()
	c.reading.Unlock()
	c.flush()
}

// unstick is for the worker that lost its turn so, when the disk goes on.
func (c *serverConn) unstick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stuck--
}

// deadline is a new one, if the old one is due to be moved.
func deadline(old time.Time) (by time.Time, due bool) {
	now := time.Now()
	return now.Add(2 * idleTimeout), old.Sub(now) < idleTimeout
}

// next reads one request.
func (c *serverConn) next(j *job) error {
	// Setting a deadline costs more than looking at the clock.
	if by, due := deadline(c.readBy); due {
		c.readBy = by
		if err := c.nc.SetReadDeadline(by); err != nil {
			return err
		}
	}
	var err error
	if j.head, err = wire.ReadHeader(c.in, c.head[:]); err != nil {
		return err
	}
	if err := legal(j.head); err != nil {
		return err
	}
	j.done = false
	if n := j.head.Payload; n > 0 {
		j.take(int(n))
		_, err = io.ReadFull(c.in, j.data)
	}
	return err
}

// legal refuses what no holder sends.
func legal(h wire.Header) error {
	payload := int64(0)
	switch {
	case h.Type == wire.Write:
		payload = h.Len
	case h.Type == wire.Mend:
		payload = wire.IDSize + h.Len
	case h.Type.HasID():
		payload = wire.IDSize
	}
	answer := int64(0)
	switch h.Type {
	case wire.Read, wire.ReadSnapshot, wire.ReadVerified, wire.ReadSnapshotVerified:
		answer = h.Len
	case wire.Changed, wire.ChangedSnapshot:
		answer = wire.ChangedBytes(h.Len)
	case wire.Sums, wire.SnapshotSums:
		answer = wire.SumBytes(h.Len)
	}
	if h.Type == wire.Hello || h.Status != wire.OK || int64(h.Payload) != payload || answer > volume.MaxRequest {
		return fmt.Errorf("request of type %d for %d bytes with a payload of %d: %w", h.Type, h.Len, h.Payload, wire.ErrFrame)
	}
	return nil
}

func (c *serverConn) carryOut(j *job) {
	if j.done {
		return
	}
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
		if info, err = c.session.BeginSync(uint64(h.Off), h.Generation, h.Len); err == nil {
			j.data = wire.Info{Incarnation: info.Incarnation, Health: uint8(info.Health), Emptied: info.Emptied}.Marshal()
		}
	case wire.Changed:
		j.takeZeros(int(wire.ChangedBytes(h.Len)))
		err = c.session.Changed(h.Generation, h.Off, h.Len, wire.ChangedGrain, j.data)
	case wire.EndSync:
		err = c.session.EndSync()
	case wire.Prepare:
		err = c.session.PrepareSnapshot()
	case wire.Resize:
		err = c.session.Resize(h.Len)
	case wire.Close:
		err = c.session.Close(true)
	case wire.Sums:
		err = j.takeSums(func(sums []wire.Sum) error { return c.session.Sums(h.Off, h.Len, h.Generation, sums) })
	case wire.ReadVerified:
		j.take(int(h.Len))
		err = c.session.ReadVerified(j.data, h.Off)
	case wire.Snapshot, wire.ReadSnapshot, wire.ChangedSnapshot, wire.Revert, wire.ReadSnapshotVerified, wire.SnapshotSums:
		err = c.onSnapshot(j)
	case wire.Mend:
		err = c.mend(j)
	default:
		err = fmt.Errorf("request of type %d: %w", h.Type, volume.ErrRange)
	}
	j.judge(err)
}

// onSnapshot carries out what names a snapshot.
func (c *serverConn) onSnapshot(j *job) error {
	h := j.head
	id, err := wire.ParseID(j.data)
	j.release()
	if err != nil {
		return err
	}
	switch h.Type {
	case wire.Snapshot:
		return c.session.Snapshot(id, h.Generation)
	case wire.ReadSnapshot:
		j.take(int(h.Len))
		return c.session.ReadSnapshot(id, j.data, h.Off)
	case wire.ChangedSnapshot:
		j.takeZeros(int(wire.ChangedBytes(h.Len)))
		return c.session.ChangedSnapshot(id, h.Generation, h.Off, h.Len, wire.ChangedGrain, j.data)
	case wire.ReadSnapshotVerified:
		j.take(int(h.Len))
		return c.session.ReadSnapshotVerified(id, j.data, h.Off)
	case wire.SnapshotSums:
		return j.takeSums(func(sums []wire.Sum) error { return c.session.SnapshotSums(id, h.Off, h.Len, sums) })
	}
	return c.session.Revert(id, h.Off, h.Len, h.Generation)
}

func (c *serverConn) mend(j *job) error {
	id, err := wire.ParseID(j.data[:wire.IDSize])
	if err == nil {
		err = c.session.Mend(id, j.data[wire.IDSize:], j.head.Off)
	}
	j.release()
	return err
}

// answer sends an answer. Those who come while another one writes are sent
// with one system call, by the last of them; so are those of which more follow
// at once.
func (c *serverConn) answer(j *job, more bool) {
	c.queued.Add(1)
	c.writing.Lock()
	defer c.writing.Unlock()
	last := c.queued.Add(-1) == 0 && !more
	c.check(c.put(j))
	if last {
		c.check(c.send())
	}
	j.release()
}

// flush sends the answers that wait for more.
func (c *serverConn) flush() {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.check(c.send())
}

// check ends the connection after an error; answers then only pass through.
func (c *serverConn) check(err error) {
	if err != nil && !c.broken {
		c.broken = true
		_ = c.nc.Close() // the reader ends, too
	}
}

// put writes an answer to the buffer, or, if that is full, to the connection.
// Errors of the buffer stay.
func (c *serverConn) put(j *job) error {
	if by, due := deadline(c.writeBy); due {
		c.writeBy = by
		if err := c.nc.SetWriteDeadline(by); err != nil {
			return err
		}
	}
	c.below.Cork()
	j.head.Payload = uint32(len(j.data))
	j.head.Put(c.outHead[:])
	if _, err := c.out.Write(c.outHead[:]); err != nil {
		return err
	}
	_, err := c.out.Write(j.data)
	return err
}

func (c *serverConn) send() error { return errors.Join(c.out.Flush(), c.below.Uncork()) }
