package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/devcluster/counter"
)

var (
	tinyOnce sync.Once
	errTiny  error
)

// TinyImage builds the guest that counts, once, and returns its path.
func TinyImage(t testing.TB) string {
	t.Helper()
	root := Root(t)
	image := filepath.Join(root, "build", "tiny.img")
	tinyOnce.Do(func() { errTiny = buildGuest(t, root, "tiny.sh", image) })
	if errTiny != nil {
		t.Fatal(errTiny)
	}
	return image
}

// UEFIImage builds the guest that counts as UEFI boots it, and returns its path.
func UEFIImage(t testing.TB) string {
	t.Helper()
	return build(t, "uefi.sh", "uefi.img", TinyImage(t))
}

// DebianImage builds a Debian system with cloud-init, the guest agent, an SSH
// server and PostgreSQL, and returns its path.
func DebianImage(t testing.TB) string {
	t.Helper()
	return build(t, "debian.sh", "debian.img")
}

func build(t testing.TB, script, name string, args ...string) string {
	t.Helper()
	root := Root(t)
	image := filepath.Join(root, "build", name)
	if err := buildGuest(t, root, script, image, args...); err != nil {
		t.Fatal(err)
	}
	return image
}

func buildGuest(t testing.TB, root, script, image string, args ...string) error {
	if err := os.MkdirAll(filepath.Dir(image), 0o755); err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(root, "test", "guest", script), append([]string{image}, args...)...)
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", script, err, out)
	}
	t.Logf("%s is ready", image)
	return nil
}

// Watcher asks a counting guest for its count all the time, through the
// published port on several servers, and keeps what was acknowledged: a count
// that the guest told was on its disk, fsynced, before.
type Watcher struct {
	cluster *devcluster.Cluster
	urls    []string
	http    *http.Client
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu      sync.Mutex
	seen    []counter.Report
	highest uint64
	wrong   error
}

// Watch begins to ask; it ends with the test.
func (c *Cluster) Watch(port int, servers ...*devcluster.Server) *Watcher {
	ctx, cancel := context.WithCancel(context.Background())
	w := &Watcher{cluster: c.Cluster, cancel: cancel}
	for _, s := range servers {
		w.urls = append(w.urls, guestURL(s, port))
	}
	w.http = c.guestClient()
	w.wg.Go(func() { w.loop(ctx) })
	c.T.Cleanup(w.Stop)
	return w
}

// guestURL is where a guest answers whose port is published on a server.
func guestURL(s *devcluster.Server, port int) string {
	return "http://" + net.JoinHostPort(s.Address, fmt.Sprint(port)) + "/"
}

// guestClient connects anew for each question: the guest may be elsewhere.
func (c *Cluster) guestClient() *http.Client {
	return &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{DialContext: c.DialContext, DisableKeepAlives: true},
	}
}

// Stop ends the asking.
func (w *Watcher) Stop() {
	w.cancel()
	w.wg.Wait()
}

func (w *Watcher) loop(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		r, err := counter.Ask(ctx, w.http, w.urls[n%len(w.urls)])
		if err == nil {
			w.note(r)
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// note checks that the count never goes back, and that a boot finds on its disk
// what was told before it.
func (w *Watcher) note(r counter.Report) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.Count < w.highest && w.wrong == nil {
		w.wrong = fmt.Errorf("the guest says %d in boot %s, after it had acknowledged %d", r.Count, r.Boot, w.highest)
	}
	if n := len(w.seen); n > 0 && w.seen[n-1].Boot != r.Boot && r.Found < w.highest && w.wrong == nil {
		w.wrong = fmt.Errorf("the guest found %d in boot %s, after it had acknowledged %d", r.Found, r.Boot, w.highest)
	}
	w.highest = max(w.highest, r.Count)
	w.seen = append(w.seen, r)
}

// Highest is the highest count acknowledged so far.
func (w *Watcher) Highest() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.highest
}

// Last is the newest answer; ok is false when there is none.
func (w *Watcher) Last() (r counter.Report, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.seen) == 0 {
		return r, false
	}
	return w.seen[len(w.seen)-1], true
}

// Reports are all answers.
func (w *Watcher) Reports() []counter.Report {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]counter.Report(nil), w.seen...)
}

// Err is set when an acknowledged count was lost.
func (w *Watcher) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wrong
}

// Boots are the boots that answered, in order; an error if one answered after
// a later one had: two copies ran.
func (w *Watcher) Boots() ([]string, error) {
	var boots []string
	for _, s := range w.Reports() {
		for i, b := range boots {
			if b == s.Boot && i != len(boots)-1 {
				return boots, errors.New("boot " + b + " answered after a later one: two copies of the machine ran")
			}
		}
		if len(boots) == 0 || boots[len(boots)-1] != s.Boot {
			boots = append(boots, s.Boot)
		}
	}
	return boots, nil
}
