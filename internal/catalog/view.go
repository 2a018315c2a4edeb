package catalog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

const (
	// silence is how long nothing may come from the watch until it is asked
	// how far it is, and then until it is given up: an etcd may be frozen, or
	// its host have lost its power, and nothing tells so. A lease that has
	// ended must show in a view well within the next lease.
	silence = time.Second
	// askEvery is how often a watch is asked again how far it is: the answer
	// is left out while it is behind.
	askEvery   = 20 * time.Millisecond
	firstPause = 50 * time.Millisecond
	maxPause   = time.Second
	// pageSize is how many records are read at once.
	pageSize = 2000
)

// View keeps a copy of the catalog up to date, for loops that compare what
// should be with what is. Safe for concurrent use.
//
// What it shows is true of some instant, and may be of an old one: while etcd
// is away, the view stays as it is. It never goes back, and no change is shown
// by half.
type View struct {
	store   *Store
	log     *slog.Logger
	silence time.Duration
	// ask makes Run ask the watch how far it is.
	ask chan struct{}
	// trouble is what Run has complained of last; empty while all is well.
	trouble string

	mu    sync.Mutex
	state *State
	// advanced is closed when state is replaced, changed when a record is.
	advanced, changed chan struct{}
}

// NewView makes a view; it is empty until Run has read the catalog.
func NewView(s *Store, log *slog.Logger) *View {
	return &View{
		store: s, log: log, silence: silence, ask: make(chan struct{}, 1),
		advanced: make(chan struct{}), changed: make(chan struct{}),
	}
}

// State is the newest known; nil before the first was read.
func (v *View) State() *State {
	st, _ := v.now()
	return st
}

// Changed is closed when a record in State changes next. Take it before State:
// then no change is missed.
func (v *View) Changed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}

// now is the state, and what is closed when there is a newer one.
func (v *View) now() (*State, <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state, v.advanced
}

// WaitFor waits until the view has everything up to the revision. Run must be
// running. Only ctx bounds it.
func (v *View) WaitFor(ctx context.Context, revision int64) error {
	again := time.NewTimer(askEvery)
	defer again.Stop()
	for {
		st, advanced := v.now()
		if st != nil && st.Revision >= revision {
			return nil
		}
		// What was written last may be no record: then nothing comes unasked.
		select {
		case v.ask <- struct{}{}:
		default:
		}
		again.Reset(askEvery)
		select {
		case <-advanced:
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("catalog: wait for revision %d: %w", revision, ctx.Err())
		}
	}
}

// Sync waits until the view has everything that was written before the call.
// It needs a majority of the voters; see Unavailable.
func (v *View) Sync(ctx context.Context) error {
	// A linearizable read of one key gives the revision of the whole.
	res, err := v.store.etcd.Get(ctx, schemaKey, clientv3.WithCountOnly())
	if err != nil {
		return fmt.Errorf("catalog: ask for the newest revision: %w", err)
	}
	return v.WaitFor(ctx, res.Header.Revision)
}

// Run reads the catalog and follows it until ctx ends. Whatever happens to
// etcd or the connection, it begins again; when the history that it missed was
// compacted, it reads the whole.
func (v *View) Run(ctx context.Context) error {
	for failures := 1; ; failures++ {
		followed, err := v.follow(ctx, patience(failures))
		if ctx.Err() != nil {
			return nil
		}
		if followed {
			failures = 1
		}
		if err.Error() != v.trouble {
			v.trouble = err.Error()
			v.log.Warn("the catalog cannot be followed; it is tried again until it can", "err", err)
		}
		if err := sleep(ctx, pauseAfter(failures)); err != nil {
			return nil
		}
	}
}

// patience is how long the reading of everything may take: short at first, as
// another try may find another etcd.
func patience(failures int) time.Duration {
	return min(silence<<min(failures-1, 10), answerTimeout)
}

// pauseAfter so many failures in a row.
func pauseAfter(failures int) time.Duration {
	return min(firstPause<<min(failures-1, 10), maxPause)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// follow reads everything once and then applies changes until something
// breaks. It returns whether the watch told anything.
func (v *View) follow(ctx context.Context, patience time.Duration) (followed bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := v.load(ctx, patience)
	if err != nil {
		return false, err
	}
	if err := v.publish(st, true); err != nil {
		return false, err
	}
	if v.trouble != "" {
		v.log.Info("the catalog is followed again", "revision", st.Revision)
		v.trouble = ""
	}
	// A stream of its own: etcd answers how far it is only when every watch on
	// the stream is up to date.
	ctx = metadata.AppendToOutgoingContext(clientv3.WithRequireLeader(ctx), "argon-watch", "view")
	// Watch returns when etcd has answered, however long that takes.
	late := time.AfterFunc(v.silence, cancel)
	watch := v.store.etcd.Watch(ctx, statePrefix, clientv3.WithPrefix(), clientv3.WithRev(st.Revision+1))
	if !late.Stop() {
		return false, fmt.Errorf("catalog: the watch did not begin within %s", v.silence)
	}
	quiet := time.NewTimer(v.silence)
	defer quiet.Stop()
	v.askProgress(ctx)
	asked := true
	for {
		select {
		case res, ok := <-watch:
			if !ok {
				return followed, errors.New("catalog: the watch ended")
			}
			if st, err = v.advance(st, res); err != nil {
				return followed, err
			}
			asked, followed = false, true
		case <-v.ask:
			v.askProgress(ctx)
			continue
		case <-quiet.C:
			if asked {
				return followed, fmt.Errorf("catalog: the watch has been silent for %s", v.silence)
			}
			v.askProgress(ctx)
			asked = true
		}
		quiet.Reset(v.silence)
	}
}

// askProgress asks the watch how far it is. That it can't be asked shows in
// its silence.
func (v *View) askProgress(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askEvery)
	defer cancel()
	if err := v.store.etcd.RequestProgress(ctx); err != nil && ctx.Err() == nil {
		v.log.Debug("the catalog's watch cannot be asked how far it is", "err", err)
	}
}

// advance applies what the watch tells.
func (v *View) advance(st *State, res clientv3.WatchResponse) (*State, error) {
	if err := res.Err(); err != nil {
		return st, fmt.Errorf("catalog: watch: %w", err)
	}
	next := st.edit(v.store)
	switch {
	case len(res.Events) > 0:
		// The header's revision is etcd's newest, which a watch that is behind
		// has not reached.
		next.Revision = res.Events[len(res.Events)-1].Kv.ModRevision
	case res.IsProgressNotify():
		next.Revision = max(st.Revision, res.Header.Revision)
	}
	for _, e := range res.Events {
		if err := next.apply(e.Type == clientv3.EventTypePut, e.Kv); err != nil {
			return st, err
		}
	}
	if next.Revision == st.Revision {
		return st, nil
	}
	return next.State, v.publish(next.State, len(res.Events) > 0)
}

// load reads everything as it is at one revision.
func (v *View) load(ctx context.Context, patience time.Duration) (*State, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	from, end := statePrefix, clientv3.GetPrefixRangeEnd(statePrefix)
	var e *edition
	for {
		opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(pageSize)}
		if e != nil {
			opts = append(opts, clientv3.WithRev(e.Revision))
		}
		res, err := v.store.etcd.Get(ctx, from, opts...)
		if err != nil {
			return nil, fmt.Errorf("catalog: read everything: %w", err)
		}
		if e == nil {
			e = newState(res.Header.Revision).edit(v.store)
		}
		for _, kv := range res.Kvs {
			if err := e.apply(true, kv); err != nil {
				return nil, err
			}
		}
		if !res.More {
			break
		}
		from = string(res.Kvs[len(res.Kvs)-1].Key) + "\x00"
	}
	if e.Cluster == nil {
		return nil, errNoCluster()
	}
	return e.State, nil
}

// publish shows a newer state. It refuses an older one: that is of another
// etcd, or of a copy of it that was restored.
func (v *View) publish(st *State, changed bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.state != nil && st.Revision < v.state.Revision {
		return fmt.Errorf("catalog: etcd is at revision %d, was at %d before: if it was restored from a copy, restart argon on this server", st.Revision, v.state.Revision)
	}
	v.state = st
	close(v.advanced)
	v.advanced = make(chan struct{})
	if changed {
		close(v.changed)
		v.changed = make(chan struct{})
	}
	return nil
}
