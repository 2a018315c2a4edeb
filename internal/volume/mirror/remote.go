package mirror

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/cork"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

const (
	pingEvery = time.Second
	// silence is how long a replica's server may say nothing, though asked,
	// before its connection counts as broken; half a second less at times. TCP alone would wait for
	// minutes when packets just vanish.
	silence = 3 * time.Second
)

// remoteLink is a Link to a replica on another server.
type remoteLink struct {
	nc net.Conn
	in *bufio.Reader
	// readBy is the read deadline.
	readBy time.Time
	wg     sync.WaitGroup
	done   chan struct{} // closed when the connection is of no use any more
	queue  chan *Message
	// written is closed when the writer has ended: no message's data is in
	// use by it any more, and all that were queued are pending.
	written chan struct{}

	writing sync.Mutex // guards out and what is below
	out     *bufio.Writer
	below   *cork.Conn

	mu      sync.Mutex
	err     error // why it ended
	nextID  uint64
	pending map[uint64]*Message
}

// NewRemoteLink seals a replica over an authenticated connection, which it
// owns from now on. ctx bounds the sealing.
func NewRemoteLink(ctx context.Context, nc net.Conn, g wire.Greeting) (Link, Info, error) {
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	l := &remoteLink{
		nc: nc, below: cork.Of(nc), in: bufio.NewReaderSize(nc, 64<<10), out: bufio.NewWriterSize(nc, 64<<10), done: make(chan struct{}), written: make(chan struct{}),
		queue: make(chan *Message, localQueue), pending: map[uint64]*Message{},
	}
	info, err := l.hello(g)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, Info{}, errors.Join(err, nc.Close())
	}
	l.wg.Go(l.write)
	l.wg.Go(l.read)
	return l, info, nil
}

func (l *remoteLink) hello(g wire.Greeting) (Info, error) {
	payload := g.Marshal()
	b := make([]byte, wire.HeaderSize, wire.HeaderSize+len(payload))
	wire.Header{Type: wire.Hello, Payload: uint32(len(payload))}.Put(b)
	if _, err := l.nc.Write(append(b, payload...)); err != nil {
		return Info{}, fmt.Errorf("seal replica %d: %w", g.ReplicaID, err)
	}
	h, err := wire.ReadHeader(l.in, b)
	if err != nil {
		return Info{}, fmt.Errorf("seal replica %d: %w", g.ReplicaID, err)
	}
	answer := make([]byte, h.Payload)
	if _, err := io.ReadFull(l.in, answer); err != nil {
		return Info{}, fmt.Errorf("seal replica %d: %w", g.ReplicaID, err)
	}
	if h.Type != wire.Hello {
		return Info{}, fmt.Errorf("seal replica %d: answer of type %d: %w", g.ReplicaID, h.Type, wire.ErrFrame)
	}
	if h.Status != wire.OK {
		return Info{}, fmt.Errorf("seal replica %d: %w", g.ReplicaID, refusal(h, answer))
	}
	return parseInfo(answer)
}

func parseInfo(b []byte) (Info, error) {
	i, err := wire.ParseInfo(b)
	if h := Health(i.Health); err == nil && (h < Good || h > Failed) {
		err = fmt.Errorf("health %d: %w", h, wire.ErrFrame)
	}
	return Info{Incarnation: i.Incarnation, Health: Health(i.Health), Emptied: i.Emptied}, err
}

// refusal is what a status that is not OK means.
func refusal(h wire.Header, text []byte) error {
	switch h.Status {
	case wire.Sealed:
		return &SealedError{Epoch: uint64(h.Off)}
	case wire.NoSpace:
		return volume.ErrNoSpace
	case wire.Fenced:
		return ErrSessionOver
	case wire.NoSnapshot:
		return fmt.Errorf("%s: %w", text, volume.ErrNoSnapshot)
	case wire.Damaged:
		return fmt.Errorf("%s: %w", text, volume.ErrDamaged)
	default:
		return errors.New(string(text))
	}
}

func (l *remoteLink) Done() <-chan struct{} { return l.done }

// few is how many messages may be unanswered for the next to be sent by whoever
// has it: that saves waking the writer. With more it is better to let the writer
// send several at once.
const few = 3

// Send hands a message to the writer, or writes it itself. The queue has room
// for everything that a holder has in flight.
func (l *remoteLink) Send(m *Message, now bool) {
	if now && l.sendNow(m) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		l.wg.Go(func() { m.Done(Info{}, ErrSessionOver) })
		return
	}
	l.queue <- m
}

// sendNow writes a message, unless somebody else writes or there is much to
// write. The connection may end meanwhile; then the reader answers it.
func (l *remoteLink) sendNow(m *Message) bool {
	if !l.writing.TryLock() {
		return false
	}
	defer l.writing.Unlock()
	l.mu.Lock()
	ok := l.err == nil && len(l.queue) == 0 && len(l.pending) < few
	var h wire.Header
	if ok {
		h = l.expect(m)
	}
	l.mu.Unlock()
	if !ok {
		return false
	}
	l.below.Cork()
	l.put(h, m)
	l.flush()
	return true
}

// Close ends the session. The writer sends what is queued before a clean
// close; nothing is in flight then.
func (l *remoteLink) Close(clean bool) {
	if clean {
		finished := make(chan struct{})
		l.Send(&Message{Verb: verbClose, Done: func(Info, error) { close(finished) }}, false)
		select {
		case <-finished:
		case <-l.done:
		}
	}
	l.fail(net.ErrClosed)
	l.wg.Wait()
}

// verbClose and verbPing are the connection's own messages.
const (
	verbClose Verb = 200 + iota
	verbPing
)

var types = map[Verb]wire.Type{
	VerbRead: wire.Read, VerbWrite: wire.Write, VerbZero: wire.Zero, VerbTrim: wire.Trim, VerbFlush: wire.Flush,
	VerbChanged: wire.Changed, VerbBeginSync: wire.BeginSync, VerbEndSync: wire.EndSync, verbClose: wire.Close, verbPing: wire.Ping,
	VerbReadVerified: wire.ReadVerified, VerbSums: wire.Sums, VerbRevert: wire.Revert, VerbMend: wire.Mend,
	VerbPrepare: wire.Prepare, VerbSnapshot: wire.Snapshot, VerbResize: wire.Resize,
}

// typeOf is the type of a message's frame. What is asked of a snapshot has types
// of its own.
func typeOf(m *Message) wire.Type {
	switch {
	case m.Snapshot != 0 && m.Verb == VerbRead:
		return wire.ReadSnapshot
	case m.Snapshot != 0 && m.Verb == VerbChanged:
		return wire.ChangedSnapshot
	case m.Snapshot != 0 && m.Verb == VerbReadVerified:
		return wire.ReadSnapshotVerified
	case m.Snapshot != 0 && m.Verb == VerbSums:
		return wire.SnapshotSums
	}
	return types[m.Verb]
}

// fail ends the connection, once. The reader answers what is pending when it
// ends: until then buffers may be in use.
func (l *remoteLink) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	l.err = err
	close(l.done)
	close(l.queue)
	_ = l.nc.Close()
}

// write sends messages, and a ping every second, until the queue is closed and
// empty.
func (l *remoteLink) write() {
	defer close(l.written)
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	for {
		select {
		case m, ok := <-l.queue:
			if !ok {
				return
			}
			l.sendAll(m)
		case <-t.C:
			l.sendAll(&Message{Verb: verbPing, Done: func(Info, error) {}})
		}
	}
}

// sendAll sends a message and what else is queued, in one system call.
func (l *remoteLink) sendAll(m *Message) {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.below.Cork()
	l.send(m)
	for len(l.queue) > 0 {
		if next, ok := <-l.queue; ok {
			l.send(next)
		}
	}
	l.flush()
}

// send writes one message. After an error the rest of the queue only passes
// through, to be answered.
func (l *remoteLink) send(m *Message) {
	l.mu.Lock()
	h := l.expect(m)
	failed := l.err != nil
	l.mu.Unlock()
	if !failed {
		l.put(h, m)
	}
}

// expect notes that a message will be answered. The lock is held.
func (l *remoteLink) expect(m *Message) wire.Header {
	h := wire.Header{Type: typeOf(m), FUA: m.FUA, Off: m.Off, Len: m.Len, Generation: m.Generation}
	switch {
	case m.Verb == VerbWrite:
		h.Payload = uint32(len(m.Data))
	case m.Verb == VerbMend:
		h.Payload = wire.IDSize + uint32(len(m.Data))
	case m.Verb == VerbBeginSync:
		h.Off = int64(m.Base)
	case h.Type.HasID():
		h.Payload = wire.IDSize
	}
	l.nextID++
	h.ID = l.nextID
	l.pending[h.ID] = m
	return h
}

// put writes a frame to the buffer, or, if that is full, to the connection.
func (l *remoteLink) put(h wire.Header, m *Message) {
	var head [wire.HeaderSize]byte
	h.Put(head[:])
	_, err := l.out.Write(head[:])
	if err == nil && (h.Type.HasID() || h.Type == wire.Mend) {
		_, err = l.out.Write(binary.LittleEndian.AppendUint32(head[:0], m.Snapshot))
	}
	if err == nil && (h.Type == wire.Write || h.Type == wire.Mend) {
		_, err = l.out.Write(m.Data)
	}
	if err != nil {
		l.fail(err)
	}
}

func (l *remoteLink) flush() {
	if err := errors.Join(l.out.Flush(), l.below.Uncork()); err != nil {
		l.fail(err)
	}
}

// read takes answers until the connection ends, and then answers what is left.
func (l *remoteLink) read() {
	var buf [wire.HeaderSize]byte
	for {
		if err := l.readOne(buf[:]); err != nil {
			l.fail(err)
			break
		}
	}
	<-l.written
	l.writing.Lock() // whoever still writes is through, and nobody begins
	l.mu.Lock()
	left := l.pending
	l.pending = map[uint64]*Message{}
	l.mu.Unlock()
	l.writing.Unlock()
	for _, m := range left {
		m.Done(Info{}, ErrSessionOver)
	}
}

func (l *remoteLink) readOne(buf []byte) error {
	// Setting a deadline costs more than looking at the clock.
	if now := time.Now(); l.readBy.Sub(now) < silence-pingEvery/2 {
		l.readBy = now.Add(silence)
		if err := l.nc.SetReadDeadline(l.readBy); err != nil {
			return err
		}
	}
	h, err := wire.ReadHeader(l.in, buf)
	if err != nil {
		return err
	}
	l.mu.Lock()
	m := l.pending[h.ID]
	delete(l.pending, h.ID)
	l.mu.Unlock()
	if m == nil {
		return fmt.Errorf("an answer to nothing: %w", wire.ErrFrame)
	}
	info, status, err := l.payload(h, m)
	if err != nil {
		m.Done(Info{}, ErrSessionOver)
		return err
	}
	m.Done(info, status)
	if errors.Is(status, ErrSessionOver) {
		return status
	}
	return nil
}

// payload reads what comes with an answer; status is what the answer says, err
// that the connection is of no use.
func (l *remoteLink) payload(h wire.Header, m *Message) (info Info, status, err error) {
	if h.Status == wire.OK && m.Verb.Reads() {
		if int(h.Payload) != len(m.Data) {
			return info, nil, fmt.Errorf("%d bytes where %d were asked for: %w", h.Payload, len(m.Data), wire.ErrFrame)
		}
		_, err = io.ReadFull(l.in, m.Data)
		return info, nil, err
	}
	b := make([]byte, h.Payload)
	if _, err = io.ReadFull(l.in, b); err != nil {
		return info, nil, err
	}
	if h.Status != wire.OK {
		return info, refusal(h, b), nil
	}
	if m.Verb == VerbBeginSync {
		info, err = parseInfo(b)
	}
	return info, nil, err
}
