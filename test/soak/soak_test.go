package soak

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var (
	minutes = flag.Float64("minutes", 1, "how long servers fail")
	seed    = flag.Uint64("seed", 0, "of the schedule and of what is written; 0: of the clock")
)

const (
	servers    = 5
	diskSize   = 2 << 30
	volumeSize = 64 << 20
	// The first half of a volume is the ledger's, the second is fio's.
	ledgerSize = 24 << 20
	fioOffset  = volumeSize / 2
)

// world is the cluster and all that works on it.
type world struct {
	*harness.Cluster
	seed  uint64
	began time.Time
	jobs  []*job

	// cuts counts the power cuts after which only flushed data is sure.
	cuts atomic.Uint64

	mu     sync.Mutex
	struck map[string]int // servers that something is wrong with
}

// TestSoak lets five servers fail in every way while volumes are written,
// trimmed and flushed, and looks for anything that was lost.
func TestSoak(t *testing.T) {
	harness.NeedRoot(t)
	for program, pkg := range map[string]string{"fio": "fio", "mkfs.ext4": "e2fsprogs", "ip": "iproute2"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s, of the package %s", program, pkg)
		}
	}
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	during := time.Duration(*minutes * float64(time.Minute))
	t.Logf("to see it again: make soak MINUTES=%v SEED=%d", *minutes, *seed)
	w := &world{
		Cluster: harness.Up(t, devcluster.Options{Servers: servers, Netns: true, Disk: diskSize}),
		seed:    *seed, began: time.Now(), struck: make(map[string]int),
	}
	for i, replicas := range []int{2, 3, 2} {
		name := fmt.Sprint("v", i+1)
		w.Argon(w.S(1), "volume", "create", name, "--size", fmt.Sprintf("%dB", volumeSize), "--replicas", fmt.Sprint(replicas))
		w.jobs = append(w.jobs, newJob(w, i, name))
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var working sync.WaitGroup
	for _, j := range w.jobs {
		working.Go(func() { j.run(ctx) })
	}
	o := newOperator(w)
	working.Go(func() { o.run(ctx) })
	if err := w.carryOut(ctx, Schedule(*seed, servers, during), during); err != nil {
		t.Error(err)
	}
	w.say("nothing is wrong any more")
	w.settled()
	stop()
	working.Wait()
	for _, j := range w.jobs {
		w.check(j)
		w.say("%s: %v", j.name, j)
		if err := o.check(t.Context(), j); err != nil {
			t.Errorf("%s: %v", j.name, err)
		}
	}
	for _, j := range w.jobs {
		w.compared(j)
		w.accounted(j)
	}
	w.say("the operator: %v", o.done)
}

// say prints what happens, with the time since the beginning.
func (w *world) say(format string, args ...any) {
	w.T.Logf("%8.3fs %s", time.Since(w.began).Seconds(), fmt.Sprintf(format, args...))
}

// settled waits until the cluster is whole and each volume was used since.
func (w *world) settled() {
	ctx, cancel := context.WithTimeout(w.T.Context(), harness.Patience)
	defer cancel()
	if err := w.WaitReady(ctx); err != nil {
		w.T.Error(err)
	}
	for _, j := range w.jobs {
		before := j.sessions.Load()
		w.Eventually(j.name+" is used by a job that began after the last fault", func() bool { return j.sessions.Load() > before })
	}
}

// check reads a volume that nobody uses, on each server with a replica: reads
// come from that one. All must hold what the ledger says, and the same.
func (w *world) check(j *job) {
	w.Healthy(w.S(1), j.name)
	v, err := w.Volume(w.S(1), j.name)
	if err != nil {
		w.T.Error(err)
		return
	}
	sums := make(map[string]string)
	for _, r := range v.GetVolume().GetReplicas() {
		s := w.ByID(w.S(1), r.GetServerId())
		sum, err := w.sum(s, j)
		if err != nil {
			w.T.Errorf("%s, replica %d on %s: %v", j.name, r.GetId(), s.Name, err)
		}
		sums[s.Name] = sum
	}
	if n := len(v.GetVolume().GetReplicas()); n != int(v.GetVolume().GetReplicasWanted()) {
		w.T.Errorf("%s has %d replicas", j.name, n)
	}
	w.say("%s: %v", j.name, sums)
	for _, sum := range sums {
		for other, s := range sums {
			if s != sum {
				w.T.Errorf("%s: the replica on %s differs from another one: %v", j.name, other, sums)
				return
			}
		}
	}
}

// compared lets the volume's own scrub look at it: it must find nothing.
func (w *world) compared(j *job) {
	w.Argon(w.S(1), "volume", "scrub", j.name, "--wait")
	v, err := w.Volume(w.S(1), j.name)
	if err != nil {
		w.T.Error(err)
		return
	}
	if s := v.GetVolume().GetScrub(); s.GetRepaired() > 0 || s.GetUnclear() > 0 {
		w.T.Errorf("%s: a scrub found differences: %v", j.name, s)
	}
}

// accounted waits until what the cluster says of each replica's space is within
// 1 % of what its files take.
func (w *world) accounted(j *job) {
	w.Eventually(j.name+"'s space is told right", func() bool {
		v, err := w.Volume(w.S(1), j.name)
		if err != nil || len(v.GetUsage()) < len(v.GetVolume().GetReplicas()) {
			return false
		}
		for _, u := range v.GetUsage() {
			for _, r := range v.GetVolume().GetReplicas() {
				if r.GetId() != u.GetReplicaId() {
					continue
				}
				s := w.ByID(w.S(1), r.GetServerId())
				dir := filepath.Join(s.Dir, "volumes", v.GetVolume().GetMeta().GetId(), fmt.Sprint(r.GetId()))
				is, told := onDisk(dir), int64(u.GetUsedBytes())
				if max(is-told, told-is)*100 > is {
					return false
				}
			}
		}
		return true
	})
}

// onDisk is what the files of a folder take, as du counts it.
func onDisk(dir string) int64 {
	var sum int64
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(dir, e.Name()), &st) == nil {
			sum += st.Blocks * 512
		}
	}
	return sum
}

// sum reads the whole volume on a server and checks the ledger's part.
func (w *world) sum(s *devcluster.Server, j *job) (string, error) {
	ctx, cancel := context.WithTimeout(w.T.Context(), harness.Patience)
	defer cancel()
	var c *connection
	var err error
	w.Eventually(j.name+" can be connected on "+s.Name, func() bool {
		c, err = connect(ctx, s, j.name)
		return err == nil
	})
	defer c.end()
	client, err := c.dial(ctx)
	if err != nil {
		return "", err
	}
	defer client.Abort()
	if err := j.ledger.Verify(client, func() {}); err != nil {
		return "", err
	}
	hash := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < client.Size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), client.Size-off)]
		if _, err := client.ReadAt(p, off); err != nil {
			return "", fmt.Errorf("reading at %d: %w", off, err)
		}
		_, _ = hash.Write(p)
	}
	return fmt.Sprintf("%x", hash.Sum(nil)[:8]), nil
}

// allInSync tells whether a volume has all the replicas that it should have.
func (w *world) allInSync(name string) bool {
	for _, s := range w.Servers() {
		if w.isStruck(s.Name) {
			continue
		}
		v, err := w.Volume(s, name)
		if err != nil {
			continue
		}
		n := 0
		for _, r := range v.GetVolume().GetReplicas() {
			if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
				n++
			}
		}
		return n >= 2 && n == int(v.GetVolume().GetReplicasWanted())
	}
	return false
}

func (w *world) isStruck(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.struck[name] > 0
}

// firstLines cuts a text.
func firstLines(text string, n int) string {
	lines := strings.SplitAfterN(text, "\n", n+1)
	return strings.TrimSpace(strings.Join(lines[:min(n, len(lines))], ""))
}
