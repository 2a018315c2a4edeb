package soak

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
	"github.com/argon-cluster/argon/test/harness"
)

const (
	// writers is how many requests of the ledger are under way.
	writers = 4
	// stalled is how long nothing may go on before a job tries elsewhere.
	stalled = 20 * time.Second
	// roundWithin bounds one of fio's rounds, which takes seconds. If it takes
	// so long though requests of the ledger are answered, one has no answer.
	roundWithin = 2 * time.Minute
)

// job uses a volume, now on this server, now on that.
type job struct {
	w      *world
	name   string
	ledger *Ledger
	rng    *rand.Rand
	fio    fio
	size   int64 // that the operator has asked for
	cuts   uint64

	// using is held by whoever uses the volume; wanted asks a session to end.
	using  sync.Mutex
	wanted chan struct{}

	sessions atomic.Uint64 // that read all that they found
	progress atomic.Uint64 // requests answered
	cutShort atomic.Uint64 // of these, the ones that something ended
}

func newJob(w *world, n int, name string) *job {
	return &job{
		w: w, name: name, size: volumeSize,
		ledger: NewLedger(uint64(n+1), 0, ledgerSize/CellSize, w.seed),
		wanted: make(chan struct{}, 1),
		rng:    rand.New(rand.NewPCG(w.seed, uint64(100+n))),
	}
}

func (j *job) String() string {
	return fmt.Sprintf("%+v, %d sessions, %d of them cut short, fio verified %d rounds of %d",
		j.ledger.Stats(), j.sessions.Load(), j.cutShort.Load(), j.fio.verified, j.fio.round)
}

// run works until ctx ends. It gives up if the volume can't be had for long.
func (j *job) run(ctx context.Context) {
	lastUsed := time.Now()
	for ctx.Err() == nil {
		waited := time.Now()
		j.using.Lock()
		lastUsed = lastUsed.Add(time.Since(waited))
		j.followCuts()
		used, err := j.session(ctx, j.server())
		j.followCuts()
		j.using.Unlock()
		if used {
			lastUsed = time.Now()
		}
		switch {
		case errors.Is(err, ErrWrong):
			j.w.T.Errorf("%s: %v", j.name, err)
			return
		case used && err != nil && ctx.Err() == nil:
			j.cutShort.Add(1)
			j.w.say("%s: %v", j.name, err)
		}
		if time.Since(lastUsed) > 2*harness.Patience {
			j.w.T.Errorf("%s could not be used for %v: %v", j.name, time.Since(lastUsed), err)
			return
		}
		sleep(ctx, 300*time.Millisecond)
	}
}

// followCuts notes power cuts, also those while nobody used the volume: the last
// one may not have ended clean.
func (j *job) followCuts() {
	if now := j.w.cuts.Load(); now != j.cuts {
		j.cuts = now
		j.ledger.Loosen()
	}
}

// pause returns when nobody uses the volume, and nobody will before release.
func (j *job) pause() (release func()) {
	select {
	case j.wanted <- struct{}{}:
	default:
	}
	j.using.Lock()
	select {
	case <-j.wanted: // there was no session to end
	default:
	}
	return j.using.Unlock
}

// server is any, rather one that nothing is wrong with.
func (j *job) server() *devcluster.Server {
	all := j.w.Servers()
	s := all[j.rng.IntN(len(all))]
	for range 5 {
		if !j.w.isStruck(s.Name) {
			break
		}
		s = all[j.rng.IntN(len(all))]
	}
	return s
}

// session uses the volume on a server for a while. It tells whether it could.
func (j *job) session(ctx context.Context, s *devcluster.Server) (used bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c, err := connect(ctx, s, j.name)
	if err != nil {
		return false, err
	}
	defer c.end()
	client, err := c.dial(ctx)
	if err != nil {
		return false, err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() { j.watch(ctx, cancel) })
	stop := context.AfterFunc(ctx, client.Abort)
	defer stop()
	fail := func(err error) { cancel(fmt.Errorf("on %s: %w", s.Name, err)) }

	answered := func() { j.progress.Add(1) }
	if err := j.ledger.Verify(client, answered); err != nil {
		fail(err)
		return false, context.Cause(ctx)
	}
	j.sessions.Add(1)
	until := time.After(time.Duration(5+j.rng.IntN(30)) * time.Second)
	enough, done := make(chan struct{}), make(chan struct{})
	var work sync.WaitGroup
	for range writers {
		work.Go(func() {
			if err := j.ledger.Work(client, enough, answered); err != nil {
				fail(err)
			}
		})
	}
	work.Go(func() {
		if err := j.fio.run(ctx, c.uri, enough, j); err != nil {
			fail(err)
		}
	})
	go func() { work.Wait(); close(done) }()
	select {
	case <-until:
	case <-j.wanted:
	case <-ctx.Done():
	}
	close(enough)
	<-done
	if ctx.Err() != nil {
		return true, context.Cause(ctx)
	}
	return true, nil
}

// watch ends a session in which nothing goes on.
func (j *job) watch(ctx context.Context, cancel context.CancelCauseFunc) {
	for ctx.Err() == nil {
		before := j.progress.Load()
		sleep(ctx, stalled)
		if j.progress.Load() == before {
			cancel(fmt.Errorf("nothing went on for %v", stalled))
		}
	}
}

// fio writes rounds of its own pattern and verifies each.
type fio struct {
	round, verified int
	pending         bool // a round was written and flushed, and not yet verified
}

// Sizes of fio's requests, one for each round, in turn.
var fioBlocks = []string{"4k", "512", "64k", "4k"}

func (f *fio) run(ctx context.Context, uri string, enough <-chan struct{}, j *job) error {
	for {
		select {
		case <-enough:
			return nil
		default:
		}
		if !f.pending {
			f.round++
			if err := f.start(ctx, uri, j, "--do_verify=0", "--fsync=64", "--end_fsync=1"); err != nil {
				return fmt.Errorf("fio, writing round %d: %w", f.round, err)
			}
			f.pending = true
			continue
		}
		if err := f.start(ctx, uri, j, "--verify_only=1"); err != nil {
			return fmt.Errorf("fio, verifying round %d: %w", f.round, err)
		}
		f.pending = false
		f.verified++
	}
}

func (f *fio) start(ctx context.Context, uri string, j *job, args ...string) error {
	mode := "randwrite"
	if f.round%3 == 2 {
		mode = "randtrimwrite"
	}
	dir, err := os.MkdirTemp("", "soak-fio-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	round, cancel := context.WithTimeout(ctx, roundWithin)
	defer cancel()
	cmd := exec.CommandContext(round, "fio", append([]string{
		"--name=soak", "--ioengine=nbd", "--uri=" + uri, "--rw=" + mode, "--verify=crc32c", "--verify_fatal=1", "--thread=1",
		"--bs=" + fioBlocks[f.round%len(fioBlocks)], fmt.Sprint("--offset=", fioOffset), "--size=4M",
		"--iodepth=" + map[string]string{"randwrite": "16", "randtrimwrite": "1"}[mode],
		fmt.Sprint("--randseed=", j.w.seed%1e9+uint64(f.round)), "--rate_iops=2000",
	}, args...)...)
	cmd.Dir = dir
	cmd.WaitDelay = 2 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	j.progress.Add(1)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case round.Err() != nil:
		return fmt.Errorf("%w: a request of fio was not answered for %v", ErrWrong, roundWithin)
	case strings.Contains(out.String(), "verify:") || strings.Contains(out.String(), "verify failed"):
		return fmt.Errorf("%w: %s", ErrWrong, firstLines(out.String(), 20))
	case err != nil:
		return fmt.Errorf("%w: %s", err, firstLines(out.String(), 8))
	}
	return nil
}

// connection is a running `argon volume connect`.
type connection struct {
	uri string
	end func()
}

// connectWithin bounds how long a server may take to attach a volume.
const connectWithin = 30 * time.Second

func connect(ctx context.Context, s *devcluster.Server, volume string) (*connection, error) {
	ctx, cancel := context.WithCancel(ctx)
	cmd := s.Command(ctx, "volume", "connect", volume)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGINT) }
	cmd.WaitDelay = 2 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("volume connect on %s: %w", s.Name, err)
	}
	giveUp := time.AfterFunc(connectWithin, cancel)
	lines := bufio.NewScanner(out)
	if lines.Scan() && giveUp.Stop() {
		return &connection{uri: lines.Text(), end: func() {
			cancel()
			_ = cmd.Wait() // by the interrupt, or because its server is gone
		}}, nil
	}
	cancel()
	_ = cmd.Wait()
	return nil, fmt.Errorf("volume connect on %s: no answer: %s", s.Name, firstLines(stderr.String(), 2))
}

func (c *connection) dial(ctx context.Context) (*nbdtest.Client, error) {
	u, err := url.Parse(c.uri)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, connectWithin)
	defer cancel()
	return nbdtest.Dial(ctx, u.Query().Get("socket"), nbdtest.Options{})
}
