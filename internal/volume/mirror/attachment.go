package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
)

// Catalog is where the volume's record is.
type Catalog interface {
	// UpdateVolume reads the record, lets change alter it, and writes it back
	// if nobody else did in between; otherwise it begins again. It returns
	// the record as written. Errors of change come back as they are.
	UpdateVolume(ctx context.Context, id string, change func(*argonv1.Volume) error) (*argonv1.Volume, error)
	// GetVolume reads the newest record, from a majority.
	GetVolume(ctx context.Context, id string) (*argonv1.Volume, error)
}

// View is what is known of the cluster without asking; it may be behind.
type View interface {
	// Volume is nil when it is not known.
	Volume(id string) *argonv1.Volume
	// ServerAlive tells whether the server has a lease.
	ServerAlive(id string) bool
	// Changed is closed at the next change.
	Changed() <-chan struct{}
}

// Message is one request to a replica, in a session.
type Message struct {
	Verb Verb
	// Snapshot is whose content is meant; 0: the volume's.
	Snapshot uint32
	Off      int64
	Len      int64
	// Data is written from or read into; nobody else touches it until Done.
	Data []byte
	FUA  bool
	// Generation of a change or a snapshot, or for VerbChanged since which.
	// Base: see VerbBeginSync.
	Generation, Base uint64
	// Done is called exactly once. Info goes with the answer to VerbBeginSync.
	// The error is nil, volume.ErrNoSpace, ErrDamaged or ErrNoSnapshot,
	// ErrSessionOver, or what is wrong with the replica's disk.
	Done func(Info, error)
}

// ErrSessionOver says that the session ended, by a broken connection or by a
// newer session, before the replica answered. The link's Done is closed, too.
var ErrSessionOver = errors.New("the session with the replica is over")

// Link is a session with a sealed replica.
type Link interface {
	// Send starts a message. now: the caller may be held up for as long as a
	// system call takes that does not wait, to save waking another goroutine;
	// Done may then be called before Send returns.
	Send(m *Message, now bool)
	// Close ends the session; when it returns, every message's Done was
	// called and nothing touches a buffer. clean: nothing is unflushed.
	Close(clean bool)
	// Done is closed when the session broke.
	Done() <-chan struct{}
}

// SealedError says that a replica refused because it has seen a higher epoch.
type SealedError struct{ Epoch uint64 }

func (e *SealedError) Error() string { return fmt.Sprintf("sealed in epoch %d", e.Epoch) }

// Dialer reaches replicas and seals them.
type Dialer interface {
	// Dial seals the replica in the epoch. Errors: *SealedError; any other
	// means that it could not be reached now.
	Dial(ctx context.Context, v *argonv1.Volume, r *argonv1.Replica, epoch uint64) (Link, Info, error)
}

// Options are what an attachment needs.
type Options struct {
	VolumeID string
	Holder   Holder
	// Epoch is the record's when it was decided to attach; Attach fails with
	// ErrDeposed if somebody else was faster.
	Epoch   uint64
	Catalog Catalog
	View    View
	Dialer  Dialer
	Config  Config
	Log     *slog.Logger
	// Group lets volumes that are snapshotted together wait for each other. May
	// be nil: then no such snapshot is taken.
	Group Group
	// Note is called for what an operator should know. May be nil.
	Note func(Note)
}

// Group lets the holders of volumes that are snapshotted together wait until all
// of them stand still.
type Group interface {
	// Meet returns when size volumes have met under the name, and an error if
	// they do not. ctx ends when this attachment does.
	Meet(ctx context.Context, name string, size int) error
}

// Limits of what an attachment carries at once.
const (
	maxInFlight = 256
	tick        = 100 * time.Millisecond
)

// ErrAbandoned is the reason of an attachment that was given up unclean.
var ErrAbandoned = errors.New("the attachment was given up")

// Attachment is a volume attached to this server: a volume.Device that waits
// while too few replicas are in reach, and fails only when it is over. Safe
// for concurrent use.
type Attachment struct {
	opts   Options
	volume *argonv1.Volume // as taken
	start  time.Time
	log    *slog.Logger
	size   atomic.Int64

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	slots  chan struct{} // one for each request in flight

	deliveries sync.Pool

	mu       sync.Mutex
	core     *Core
	runners  map[uint32]*runner
	sessions uint64
	seen     int64 // newest revision of the record that the core was told
	ready    chan struct{}
	isReady  bool

	proposals chan Proposal
	last      chan []Effect // the effects of the end, once
	done      chan struct{}
}

// Attach takes the volume's next epoch and begins to serve. It returns once
// the epoch is taken; requests wait until replicas are found. ctx bounds only
// the taking.
func Attach(ctx context.Context, opts Options) (*Attachment, error) {
	var clean bool
	v, err := opts.Catalog.UpdateVolume(ctx, opts.VolumeID, func(v *argonv1.Volume) (err error) {
		if v.GetEpoch() != opts.Epoch {
			return fmt.Errorf("volume %s is in epoch %d, not %d any more: %w", v.GetMeta().GetName(), v.GetEpoch(), opts.Epoch, ErrDeposed)
		}
		clean, err = Take(v, opts.Holder, time.Now())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("attach volume: %w", err)
	}
	opts.Config.Epoch, opts.Config.Size, opts.Config.Clean = v.GetEpoch(), int64(v.GetSizeBytes()), clean
	opts.Config.Generation, opts.Config.EqualBefore = v.GetGeneration(), v.GetEqualBefore()
	for _, r := range v.GetReplicas() {
		if r.GetServerId() == opts.Holder.ServerID {
			opts.Config.Near = r.GetId()
		}
	}
	a := &Attachment{
		opts:      opts,
		volume:    v,
		start:     time.Now(),
		log:       opts.Log.With("volume", v.GetMeta().GetName(), "epoch", v.GetEpoch()),
		slots:     make(chan struct{}, maxInFlight),
		core:      NewCore(opts.Config, v),
		runners:   map[uint32]*runner{},
		seen:      v.GetMeta().GetRevision(),
		ready:     make(chan struct{}),
		proposals: make(chan Proposal, 1),
		last:      make(chan []Effect, 1),
		done:      make(chan struct{}),
	}
	a.size.Store(opts.Config.Size)
	a.deliveries.New = newDelivery
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.wg.Add(3)
	go a.proposeLoop()
	go a.watchLoop()
	go a.finish()
	a.run(a.core.Start)
	return a, nil
}

// Size is the volume's size in bytes. It may grow.
func (a *Attachment) Size() int64 { return a.size.Load() }

// Epoch is the attachment's number.
func (a *Attachment) Epoch() uint64 { return a.opts.Config.Epoch }

// Submit starts a request; see volume.Device. It blocks while maxInFlight
// requests are under way.
func (a *Attachment) Submit(r *volume.Request) {
	a.slots <- struct{}{}
	a.do(len(a.slots) <= few, func(now time.Duration) []Effect { return a.core.Submit(now, r) })
}

// Ready is closed when the attachment serves for the first time.
func (a *Attachment) Ready() <-chan struct{} { return a.ready }

// Done is closed when the attachment is over and nothing of it runs any more.
func (a *Attachment) Done() <-chan struct{} { return a.done }

// Err is why it is over: nil after Detach.
func (a *Attachment) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.core.Err()
}

// Detach ends the attachment clean: requests under way are finished, all
// replicas flushed, the record released. When ctx ends first the attachment
// is abandoned, and ctx's error returned.
func (a *Attachment) Detach(ctx context.Context) error {
	a.run(a.core.Detach)
	select {
	case <-a.done:
		return a.Err()
	case <-ctx.Done():
		a.Abandon()
		return fmt.Errorf("detach volume %s: %w", a.volume.GetMeta().GetName(), ctx.Err())
	}
}

// Abandon ends the attachment at once, as a crash would; the next one finds
// out what is equal.
func (a *Attachment) Abandon() {
	a.run(func(now time.Duration) []Effect { return a.core.Deposed(now, ErrAbandoned) })
	<-a.done
}

// Status is what an operator sees.
func (a *Attachment) Status() *argonv1.VolumeStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := a.core.Status()
	st.VolumeId = a.opts.VolumeID
	return st
}

// run lets the core make a step and carries its effects out.
func (a *Attachment) run(step func(time.Duration) []Effect) { a.do(false, step) }

// do is run; atOnce: messages may be sent and even answered by this goroutine.
func (a *Attachment) do(atOnce bool, step func(time.Duration) []Effect) {
	a.mu.Lock()
	wasEnded := a.core.Ended()
	var usual struct { // so much needs no memory from the heap
		sends [3]sending
		rest  [1]Effect
	}
	sends, rest := usual.sends[:0], usual.rest[:0]
	for _, e := range step(time.Since(a.start)) {
		if !e.Send {
			rest = append(rest, e)
		} else if s, ok := a.message(e); ok {
			sends = append(sends, s)
		}
	}
	if a.core.Serving() && !a.isReady {
		a.isReady = true
		close(a.ready)
	}
	ends := a.core.Ended() && !wasEnded
	a.mu.Unlock()
	// A session that ended meanwhile takes no message any more. What goes to
	// other servers goes first: it is on its way while this disk is busy.
	for _, s := range sends {
		if !s.local() {
			s.link.Send(s.m, atOnce)
		}
	}
	for _, s := range sends {
		if s.local() {
			s.link.Send(s.m, atOnce)
		}
	}
	if ends {
		// Ending waits for connections, whose goroutines may be ours.
		a.last <- slices.Clone(rest)
		return
	}
	for _, e := range rest {
		a.carryOut(e)
	}
}

func (a *Attachment) carryOut(e Effect) {
	switch {
	case e.Complete != nil:
		<-a.slots
		e.Complete.Done(e.Err)
	case e.Propose != nil:
		a.proposals <- *e.Propose
	case e.Dial:
		a.dial(e.Peer)
	case e.Hangup, e.Drop:
		a.hangUp(e)
	case e.Meet != nil:
		a.meet(e.Meet)
	case e.Grown:
		a.size.Store(e.Len)
	case e.Note != nil:
		a.log.Info(e.Note.Message, "reason", e.Note.Reason)
		if a.opts.Note != nil {
			a.opts.Note(*e.Note)
		}
	}
}

// meet waits for the other volumes of a group, beside all else.
func (a *Attachment) meet(r *Rendezvous) {
	a.wg.Go(func() {
		err := errNoGroup
		if a.opts.Group != nil {
			err = a.opts.Group.Meet(a.ctx, r.Name, r.Size)
		}
		a.run(func(now time.Duration) []Effect { return a.core.Met(now, r.Snapshot, err) })
	})
}

var errNoGroup = errors.New("volumes cannot wait for each other here")

// finish carries out the end: first every connection is closed, then what was
// not answered is.
func (a *Attachment) finish() {
	defer close(a.done)
	rest := <-a.last
	var runners []*runner
	for _, e := range rest {
		if e.Drop {
			runners = append(runners, a.hangUp(e))
		}
	}
	for _, r := range runners {
		if r != nil {
			<-r.done
		}
	}
	for _, e := range rest {
		if !e.Drop {
			a.carryOut(e)
		}
	}
	a.cancel()
	a.mu.Lock()
	if !a.isReady {
		a.isReady = true
		close(a.ready)
	}
	a.mu.Unlock()
	a.wg.Done()
	a.wg.Wait()
}

// proposeLoop carries proposals out, one at a time, until each has a definite
// outcome. I/O that depends on one waits meanwhile.
func (a *Attachment) proposeLoop() {
	defer a.wg.Done()
	for {
		select {
		case p := <-a.proposals:
			a.propose(p)
		case <-a.ctx.Done():
			return
		}
	}
}

func (a *Attachment) propose(p Proposal) {
	for pause := tick; ; pause = min(2*pause, 2*time.Second) {
		v, err := a.opts.Catalog.UpdateVolume(a.ctx, a.opts.VolumeID, func(v *argonv1.Volume) error {
			return Apply(v, p, time.Now())
		})
		switch {
		case err == nil:
			a.run(func(now time.Duration) []Effect {
				a.seen = max(a.seen, v.GetMeta().GetRevision())
				return a.core.Committed(now, v)
			})
			return
		case errors.Is(err, ErrDeposed):
			a.run(func(now time.Duration) []Effect { return a.core.Deposed(now, err) })
			return
		}
		a.log.Warn("the catalog does not answer; writes that need a change of the in-sync set wait", "err", err)
		if !a.pause(pause) {
			return
		}
	}
}

func (a *Attachment) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-a.ctx.Done():
		return false
	}
}

// watchLoop tells the core of time and of changes in the catalog.
func (a *Attachment) watchLoop() {
	defer a.wg.Done()
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		changed := a.opts.View.Changed()
		a.observe()
		for waiting := true; waiting; {
			select {
			case <-a.ctx.Done():
				return
			case <-changed:
				waiting = false
			case <-t.C:
				a.run(a.core.Tick)
			}
		}
	}
}

func (a *Attachment) observe() {
	v := a.opts.View.Volume(a.opts.VolumeID)
	if v != nil {
		a.run(func(now time.Duration) []Effect {
			if v.GetMeta().GetRevision() <= a.seen {
				return nil
			}
			a.seen = v.GetMeta().GetRevision()
			return a.core.RecordChanged(now, v)
		})
	}
	for _, r := range a.record().GetReplicas() {
		gone := !a.opts.View.ServerAlive(r.GetServerId())
		a.run(func(now time.Duration) []Effect { return a.core.ServerGone(now, r.GetServerId(), gone) })
	}
}

// record is the newest record known here.
func (a *Attachment) record() *argonv1.Volume {
	if v := a.opts.View.Volume(a.opts.VolumeID); v != nil {
		return v
	}
	return a.volume
}
