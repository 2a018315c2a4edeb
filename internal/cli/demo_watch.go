package cli

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/devcluster/counter"
)

// guestPort is where the guest of the demo tells its count (test/guest).
const guestPort = 80

// countWatch asks the guest for its count all the time. Safe for concurrent
// use.
type countWatch struct {
	url    string
	http   *http.Client
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu       sync.Mutex
	newest   counter.Report
	answers  int
	err      error             // of the last question
	highests map[string]uint64 // by boot
	changed  chan struct{}     // closed with each answer
}

const (
	askCountEvery  = 50 * time.Millisecond
	askCountWithin = 2 * time.Second
)

func startWatch(c *devcluster.Cluster, address string, port int) *countWatch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &countWatch{
		url:    "http://" + net.JoinHostPort(address, strconv.Itoa(port)) + "/",
		cancel: cancel,
		http: &http.Client{
			Timeout:   askCountWithin,
			Transport: &http.Transport{DialContext: c.DialContext, DisableKeepAlives: true},
		},
		highests: make(map[string]uint64),
		changed:  make(chan struct{}),
	}
	w.done.Go(func() { w.loop(ctx) })
	return w
}

func (w *countWatch) stop() {
	w.cancel()
	w.done.Wait()
}

func (w *countWatch) loop(ctx context.Context) {
	tick := time.NewTicker(askCountEvery)
	defer tick.Stop()
	for {
		r, err := counter.Ask(ctx, w.http, w.url)
		w.note(r, err)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (w *countWatch) note(r counter.Report, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err = err; err != nil {
		return
	}
	w.newest = r
	w.answers++
	w.highests[r.Boot] = max(w.highests[r.Boot], r.Count)
	close(w.changed)
	w.changed = make(chan struct{})
}

// until waits for an answer that is as wanted; the newest one may be.
func (w *countWatch) until(ctx context.Context, want func(counter.Report) bool) (counter.Report, error) {
	for {
		w.mu.Lock()
		newest, any, err, changed := w.newest, w.answers > 0, w.err, w.changed
		w.mu.Unlock()
		if any && want(newest) {
			return newest, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if err == nil {
				err = fmt.Errorf("its last answer was %+v", newest)
			}
			return counter.Report{}, fmt.Errorf("asking the guest at %s: %w: %w", w.url, ctx.Err(), err)
		}
	}
}

// highest is the highest count that was told in a boot.
func (w *countWatch) highest(boot string) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.highests[boot]
}
