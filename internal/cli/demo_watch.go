package cli

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
)

// guestPort is where the guest of the demo tells its count (test/guest).
const guestPort = 80

// countReport is one answer of the guest.
type countReport struct {
	// count is the highest number whose fsync has returned; found is the one
	// that was on its disk when it booted.
	count, found uint64
	// boot names the guest's boot.
	boot string
}

// parseReport reads lines of "word value"; it must find all three.
func parseReport(body string) (countReport, error) {
	values := make(map[string]string)
	for line := range strings.Lines(body) {
		if word, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			values[word] = value
		}
	}
	count, errCount := strconv.ParseUint(values["count"], 10, 64)
	found, errFound := strconv.ParseUint(values["found"], 10, 64)
	if errCount != nil || errFound != nil || values["boot"] == "" {
		return countReport{}, fmt.Errorf("the guest's answer is not understood: %q", body)
	}
	return countReport{count: count, found: found, boot: values["boot"]}, nil
}

// countWatch asks the guest for its count all the time. Safe for concurrent
// use.
type countWatch struct {
	url    string
	http   *http.Client
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu       sync.Mutex
	newest   countReport
	answers  int
	err      error             // of the last question
	highests map[string]uint64 // by boot
	changed  chan struct{}     // closed with each answer
}

const (
	askCountEvery  = 50 * time.Millisecond
	askCountWithin = 2 * time.Second
	maxReport      = 4096
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
		r, err := w.ask(ctx)
		w.note(r, err)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (w *countWatch) ask(ctx context.Context) (countReport, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url, http.NoBody)
	if err != nil {
		return countReport{}, err
	}
	res, err := w.http.Do(req)
	if err != nil {
		return countReport{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxReport))
	if err != nil {
		return countReport{}, err
	}
	return parseReport(string(body))
}

func (w *countWatch) note(r countReport, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err = err; err != nil {
		return
	}
	w.newest = r
	w.answers++
	w.highests[r.boot] = max(w.highests[r.boot], r.count)
	close(w.changed)
	w.changed = make(chan struct{})
}

// until waits for an answer that is as wanted; the newest one may be.
func (w *countWatch) until(ctx context.Context, want func(countReport) bool) (countReport, error) {
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
			return countReport{}, fmt.Errorf("asking the guest at %s: %w: %w", w.url, ctx.Err(), err)
		}
	}
}

// highest is the highest count that was told in a boot.
func (w *countWatch) highest(boot string) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.highests[boot]
}
