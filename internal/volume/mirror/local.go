package mirror

import (
	"errors"
	"sync"

	"github.com/argon-cluster/argon/internal/volume/wire"
)

// Copy is a sealed session with a replica on this server. Its errors are those
// of Message.Done. Safe for concurrent use on ranges that do not overlap.
type Copy interface {
	ReadAt(p []byte, off int64) error
	WriteAt(p []byte, off int64, generation uint64, fua bool) error
	Zero(off, n int64, generation uint64, fua bool) error
	Trim(off, n int64, generation uint64, fua bool) error
	Flush() error
	Changed(since uint64, off, n, grain int64, bits []byte) error
	BeginSync(base, generation uint64, size int64) (Info, error)
	EndSync() error
	ReadVerified(p []byte, off int64) error
	Sums(off, n int64, generation uint64, sums []wire.Sum) error
	ReadSnapshotVerified(id uint32, p []byte, off int64) error
	SnapshotSums(id uint32, off, n int64, sums []wire.Sum) error
	Mend(id uint32, p []byte, off int64) error
	PrepareSnapshot() error
	Snapshot(id uint32, generation uint64) error
	ReadSnapshot(id uint32, p []byte, off int64) error
	ChangedSnapshot(id uint32, since uint64, off, n, grain int64, bits []byte) error
	Revert(id uint32, off, n int64, generation uint64) error
	Resize(size int64) error
	Close(clean bool) error
	// TryReadAt and TryWriteAt do the same as the others, but only if that
	// does not wait for the disk; otherwise done is false.
	TryReadAt(p []byte, off int64) (done bool, err error)
	TryWriteAt(p []byte, off int64, generation uint64) (done bool, err error)
	// Extents calls found for each stretch of the range, hole or data, until
	// that returns false. Holes read as zeros.
	Extents(off, n int64, found func(n int64, hole bool) bool) error
}

const (
	// localWorkers is how many operations on the local replica are under way
	// at once: enough to keep a disk's queue filled.
	localWorkers = 32
	// localQueue has room for everything that a holder has in flight.
	localQueue = 4 * maxInFlight
)

// localLink is a Link to a replica on this server, without a network.
type localLink struct {
	copy  Copy
	queue chan *Message
	wg    sync.WaitGroup
	once  sync.Once
	done  chan struct{}

	mu     sync.Mutex
	closed bool
}

// NewLocalLink makes a Link of a session on this server, which it owns.
func NewLocalLink(c Copy) Link {
	l := &localLink{copy: c, queue: make(chan *Message, localQueue), done: make(chan struct{})}
	for range localWorkers {
		l.wg.Go(l.work)
	}
	return l
}

func (l *localLink) Send(m *Message, now bool) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		l.wg.Go(func() { m.Done(Info{}, ErrSessionOver) })
		return
	}
	if !now {
		l.queue <- m
		l.mu.Unlock()
		return
	}
	l.wg.Add(1)
	defer l.wg.Done()
	l.mu.Unlock()
	if done, err := l.try(m); done {
		l.finish(m, Info{}, err)
		return
	}
	l.Send(m, false)
}

// try carries out what does not wait for the disk.
func (l *localLink) try(m *Message) (done bool, err error) {
	switch {
	case m.Verb == VerbRead && m.Snapshot == 0:
		return l.copy.TryReadAt(m.Data, m.Off)
	case m.Verb == VerbWrite && !m.FUA:
		return l.copy.TryWriteAt(m.Data, m.Off, m.Generation)
	}
	return false, nil
}

func (l *localLink) finish(m *Message, info Info, err error) {
	if errors.Is(err, ErrSessionOver) {
		l.once.Do(func() { close(l.done) })
	}
	m.Done(info, err)
}

func (l *localLink) Done() <-chan struct{} { return l.done }

func (l *localLink) Close(clean bool) {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.queue)
	}
	l.mu.Unlock()
	l.wg.Wait()
	// What Close cannot make clean, the next opening finds out.
	_ = l.copy.Close(clean)
}

func (l *localLink) work() {
	for m := range l.queue {
		info, err := CarryOut(l.copy, m, wire.ChangedGrain)
		l.finish(m, info, err)
	}
}

// CarryOut has a copy do what a message asks, and fills its data. Lists of what has
// changed have a bit for each grain, in bytes.
func CarryOut(c Copy, m *Message, grain int64) (info Info, err error) {
	switch m.Verb {
	case VerbWrite:
		err = c.WriteAt(m.Data, m.Off, m.Generation, m.FUA)
	case VerbZero:
		err = c.Zero(m.Off, m.Len, m.Generation, m.FUA)
	case VerbTrim:
		err = c.Trim(m.Off, m.Len, m.Generation, m.FUA)
	case VerbRevert:
		err = c.Revert(m.Snapshot, m.Off, m.Len, m.Generation)
	case VerbMend:
		err = c.Mend(m.Snapshot, m.Data, m.Off)
	case VerbFlush:
		err = c.Flush()
	case VerbPrepare:
		err = c.PrepareSnapshot()
	case VerbSnapshot:
		err = c.Snapshot(m.Snapshot, m.Generation)
	case VerbResize:
		err = c.Resize(m.Len)
	case VerbBeginSync:
		info, err = c.BeginSync(m.Base, m.Generation, m.Len)
	case VerbEndSync:
		err = c.EndSync()
	default:
		err = read(c, m, grain)
	}
	return info, err
}

// read carries out what fills the message's data.
func read(c Copy, m *Message, grain int64) error {
	switch {
	case m.Verb == VerbRead && m.Snapshot != 0:
		return c.ReadSnapshot(m.Snapshot, m.Data, m.Off)
	case m.Verb == VerbRead:
		return c.ReadAt(m.Data, m.Off)
	case m.Verb == VerbChanged && m.Snapshot != 0:
		return c.ChangedSnapshot(m.Snapshot, m.Generation, m.Off, m.Len, grain, m.Data)
	case m.Verb == VerbReadVerified && m.Snapshot != 0:
		return c.ReadSnapshotVerified(m.Snapshot, m.Data, m.Off)
	case m.Verb == VerbReadVerified:
		return c.ReadVerified(m.Data, m.Off)
	case m.Verb == VerbChanged:
		return c.Changed(m.Generation, m.Off, m.Len, grain, m.Data)
	}
	sums := make([]wire.Sum, len(m.Data)/wire.SumSize)
	var err error
	if m.Snapshot != 0 {
		err = c.SnapshotSums(m.Snapshot, m.Off, m.Len, sums)
	} else {
		err = c.Sums(m.Off, m.Len, m.Generation, sums)
	}
	if err != nil {
		return err
	}
	copy(m.Data, wire.AppendSums(nil, sums))
	return nil
}
