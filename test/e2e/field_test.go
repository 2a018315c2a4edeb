package e2e_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
	"github.com/argon-cluster/argon/test/harness"
	"github.com/argon-cluster/argon/test/soak"
)

// Here are cases in which replicated block stores have lost their users' data.
// Each names the report it is from.

// user is an NBD client of a volume on a server.
type user struct {
	*nbdtest.Client
	end func() // of the connection
}

// use connects a volume as soon as that is possible on the server.
func use(c *harness.Cluster, s *devcluster.Server, volume string) *user {
	c.T.Helper()
	var uri string
	var end func()
	c.Eventually(volume+" can be connected on "+s.Name, func() bool {
		var err error
		uri, end, err = c.Connect(s, volume)
		return err == nil
	})
	u, err := url.Parse(uri)
	if err != nil {
		c.T.Fatal(err)
	}
	client, err := nbdtest.Dial(c.T.Context(), u.Query().Get("socket"), nbdtest.Options{})
	if err != nil {
		c.T.Fatal(err)
	}
	return &user{client, sync.OnceFunc(func() {
		client.Abort()
		end()
	})}
}

// writers are several that write at random places of a ledger's part of the
// volume: single sectors and runs of them, aligned to nothing else.
type writers struct {
	t      *testing.T
	enough chan struct{}
	wg     sync.WaitGroup
	count  atomic.Uint64
}

func write(t *testing.T, l *soak.Ledger, client *nbdtest.Client) *writers {
	w := &writers{t: t, enough: make(chan struct{})}
	for range 4 {
		w.wg.Go(func() {
			if err := l.Work(client, w.enough, func() { w.count.Add(1) }); err != nil {
				t.Error(err)
			}
		})
	}
	return w
}

func (w *writers) stop() {
	close(w.enough)
	w.wg.Wait()
}

// more waits until so many requests more are done.
func (w *writers) more(c *harness.Cluster, n uint64) {
	c.T.Helper()
	before := w.count.Load()
	c.Eventually("the volume is written", func() bool { return c.T.Failed() || w.count.Load() >= before+n })
}

// sameEverywhere reads the volume on each server that has a replica of it: from
// that replica. What it reads must be right, and everywhere the same.
func sameEverywhere(c *harness.Cluster, s *devcluster.Server, volume string, l *soak.Ledger) {
	c.T.Helper()
	c.Healthy(s, volume)
	v, err := c.Volume(s, volume)
	if err != nil {
		c.T.Fatal(err)
	}
	var first [sha256.Size]byte
	for i, r := range v.GetVolume().GetReplicas() {
		on := c.ByID(s, r.GetServerId())
		u := use(c, on, volume)
		if err := l.Verify(u.Client, func() {}); err != nil {
			c.T.Errorf("the replica on %s: %v", on.Name, err)
		}
		sum := sumOf(c.T, u.Client)
		if i == 0 {
			first = sum
		}
		if sum != first {
			c.T.Errorf("the replica on %s holds something else than the first one", on.Name)
		}
		u.end()
	}
}

func sumOf(t testing.TB, client *nbdtest.Client) [sha256.Size]byte {
	t.Helper()
	data := make([]byte, client.Size)
	const chunk = 4 << 20
	for off := int64(0); off < client.Size; off += chunk {
		if _, err := client.ReadAt(data[off:min(off+chunk, client.Size)], off); err != nil {
			t.Fatal(err)
		}
	}
	return sha256.Sum256(data)
}

// fillWith writes random data and flushes it.
func fillWith(t *testing.T, client *nbdtest.Client, off, n int64) {
	t.Helper()
	data := make([]byte, 4<<20)
	_, _ = rand.Read(data)
	for end := off + n; off < end; off += int64(len(data)) {
		if _, err := client.WriteAt(data[:min(int64(len(data)), end-off)], off); err != nil {
			t.Fatal(err)
		}
	}
	must(t, client.Flush())
}

// withReplica is a server with a replica of the volume, other than those.
func withReplica(c *harness.Cluster, s *devcluster.Server, volume string, not ...*devcluster.Server) *devcluster.Server {
	c.T.Helper()
	v, err := c.Volume(s, volume)
	if err != nil {
		c.T.Fatal(err)
	}
	for _, r := range v.GetVolume().GetReplicas() {
		on := c.ByID(s, r.GetServerId())
		other := true
		for _, n := range not {
			other = other && n != on
		}
		if other {
			return on
		}
	}
	c.T.Fatalf("no other server keeps a replica of %s", volume)
	return nil
}

// Single sectors are written at unaligned places while a replica is rebuilt,
// first one that was away, then a new one. Elsewhere that left blocks of 4 KiB
// half old, half new, and file systems that use sectors of 512 bytes were
// damaged: longhorn/longhorn#4354, harvester/harvester#2906.
func TestSectorsDuringRebuild(t *testing.T) {
	const size, ledger = 128 << 20, 32 << 20
	c := harness.Up(t, devcluster.Options{Servers: 3, Settings: &argonv1.Settings{ReplicaGraceSeconds: 15}})
	c.Argon(c.S(1), "volume", "create", "data", "--size", "128MiB")
	home := replicaOf(t, c, "data")
	l := soak.NewLedger(1, 0, ledger/soak.CellSize, 1)
	u := use(c, home, "data")
	fillWith(t, u.Client, ledger, size-ledger)
	w := write(t, l, u.Client)
	w.more(c, 500)

	away := withReplica(c, home, "data", home)
	for range 2 {
		must(t, away.Kill(t.Context()))
		c.Eventually("the replica that is away leaves the set", func() bool { return inSync(c, home, "data") == 1 })
		w.more(c, 500)
		must(t, away.Start(t.Context()))
		w.more(c, 100)
		c.Healthy(home, "data")
		w.more(c, 100)
	}
	// It stays away: another server gets a new replica, from the first byte on.
	must(t, away.Kill(t.Context()))
	c.Eventually("a new replica is in sync", func() bool { return inSync(c, home, "data") == 2 })
	w.more(c, 500)
	w.stop()
	u.end()
	must(t, away.Start(t.Context()))
	sameEverywhere(c, home, "data", l)
}

// A server is booted again, with a power cut at that. What its replica gets
// afterwards is what was written meanwhile, not the whole volume:
// longhorn/longhorn#1940.
func TestRebootIsNoFullRebuild(t *testing.T) {
	harness.NeedRoot(t)
	const size, ledger, filled = 256 << 20, 8 << 20, 192 << 20
	c := harness.Up(t, devcluster.Options{Servers: 3, Netns: true, Disk: 1 << 30})
	c.Argon(c.S(1), "volume", "create", "data", "--size", "256MiB")
	home := replicaOf(t, c, "data")
	l := soak.NewLedger(1, 0, ledger/soak.CellSize, 1)
	u := use(c, home, "data")
	fillWith(t, u.Client, ledger, filled)
	u.end() // a clean end: all replicas are known to be equal

	for _, cut := range []bool{true, false} {
		u = use(c, home, "data")
		w := write(t, l, u.Client)
		w.more(c, 200)
		away := withReplica(c, home, "data", home)
		if cut {
			must(t, c.PowerCut(t.Context(), away))
		} else {
			must(t, away.Kill(t.Context()))
		}
		c.Eventually("the replica that is away leaves the set", func() bool { return inSync(c, home, "data") == 1 })
		w.more(c, 200)
		w.stop()
		before, err := away.Received(t.Context())
		must(t, err)
		must(t, away.Start(t.Context()))
		c.Healthy(home, "data")
		after, err := away.Received(t.Context())
		must(t, err)
		// The ledger's part is 8 MiB, and the catalog has something to tell, too.
		if got := after - before; got > filled/4 {
			t.Errorf("power cut %v: the server got %d MiB when it came back, for %d MiB that were written meanwhile", cut, got>>20, ledger>>20)
		}
		u.end()
	}
	sameEverywhere(c, home, "data", l)
}

// Power fails at all servers at once; what was not synced is lost, also of
// their file systems' journals. They come back in any order, and everything
// that was flushed is there, without an operator: longhorn/longhorn#1035, #8403.
func TestPowerFailsEverywhere(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	c := harness.Up(t, devcluster.Options{Servers: 3, Netns: true, Disk: 1 << 30})
	books := map[string]*soak.Ledger{}
	for i, replicas := range []string{"1", "2", "3"} {
		name := "r" + replicas
		c.Argon(c.S(1), "volume", "create", name, "--size", "64MiB", "--replicas", replicas)
		books[name] = soak.NewLedger(uint64(i), 0, 16<<20/soak.CellSize, 1)
	}
	for _, order := range [][]int{{1, 2, 3}, {3, 2, 1}, {2, 3, 1}} {
		homes := map[string]*user{}
		var all []*writers
		n := 0
		for name, l := range books {
			n++
			homes[name] = use(c, c.S(1+n%3), name)
			must(t, l.Verify(homes[name].Client, func() {}))
			all = append(all, writeUntilCut(t, l, homes[name].Client))
		}
		for _, w := range all {
			w.more(c, 300)
		}
		must(t, c.PowerCut(t.Context(), c.Servers()...))
		for _, w := range all {
			w.wg.Wait() // their connections have ended
		}
		for name, l := range books {
			homes[name].end()
			l.Loosen()
		}
		startInOrder(t, c, order)
		for name, l := range books {
			sameEverywhere(c, c.S(1), name, l)
		}
	}
}

// writeUntilCut is write where the connection may end.
func writeUntilCut(t *testing.T, l *soak.Ledger, client *nbdtest.Client) *writers {
	w := &writers{t: t, enough: make(chan struct{})}
	for range 4 {
		w.wg.Go(func() {
			err := l.Work(client, w.enough, func() { w.count.Add(1) })
			if n := nbdtest.Errno(err); n != 0 && n != proto.ESHUTDOWN || err == nil {
				t.Errorf("before the power cut: %v", err)
			}
		})
	}
	return w
}

// startInOrder starts each server when the one before answers; the first of
// them can't do anything before there is a majority.
func startInOrder(t *testing.T, c *harness.Cluster, order []int) {
	t.Helper()
	for _, n := range order {
		must(t, c.S(n).Start(t.Context()))
	}
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	must(t, c.WaitReady(ctx))
}

// A snapshot of a volume that is being written holds what the volume held at
// one instant of the time that it took, on every server, also when the volume
// has been written, trimmed and grown since.
func TestSnapshotHoldsAnInstant(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3})
	c.Argon(c.S(1), "volume", "create", "data", "--size", "64MiB")
	home := replicaOf(t, c, "data")
	l := soak.NewLedger(1, 0, 16<<20/soak.CellSize, 1)
	u := use(c, home, "data")
	w := write(t, l, u.Client)
	pictures := make(map[string]*soak.Picture)
	for _, name := range []string{"a", "b", "c"} {
		w.more(c, 500)
		p := l.Expose()
		c.Argon(home, "snapshot", "create", "data", name)
		p.Close()
		pictures[name] = p
		w.more(c, 500)
	}
	for name, p := range pictures {
		clone := "of-" + name
		c.Argon(home, "volume", "create", clone, "--snapshot", "data/"+name)
		looksLike(c, home, clone, p)
	}
	w.stop()
	u.end()
	sameEverywhere(c, home, "data", l)
}

// looksLike reads a clone on each server that has a replica of it.
func looksLike(c *harness.Cluster, s *devcluster.Server, clone string, p *soak.Picture) {
	c.T.Helper()
	c.Healthy(s, clone)
	v, err := c.Volume(s, clone)
	if err != nil {
		c.T.Fatal(err)
	}
	for _, r := range v.GetVolume().GetReplicas() {
		on := c.ByID(s, r.GetServerId())
		u := use(c, on, clone)
		data := make([]byte, p.Size())
		const chunk = 1 << 20
		for off := 0; off < len(data); off += chunk {
			if _, err := u.ReadAt(data[off:min(off+chunk, len(data))], int64(off)); err != nil {
				c.T.Fatal(err)
			}
		}
		if err := p.Check(data); err != nil {
			c.T.Errorf("%s, read on %s: %v", clone, on.Name, err)
		}
		u.end()
	}
}

// A file of one replica is damaged where nobody looks: what a layer holds, or
// the table that says what it holds. A scrub finds the first and mends it from
// the copy that is as it was recorded; a replica without its table is not
// trusted, and copied to. Elsewhere such a replica was served, and its damage
// became the volume's: longhorn/longhorn#1298.
func TestDamagedLayer(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		file   string // of the replica
		off, n int64
		found  string // the event that must tell of it
	}{
		"data": {"layer-00000000.data", 24 << 20, 64 << 10, "replica-mended"},
		// What the layers above do not hold, the lowest does: no data hangs on it.
		"table of the lowest layer":  {"layer-00000000.table", 0, 8192, ""},
		"table of the highest layer": {"layer-00000001.table", 0, 8192, "resync-started"},
	} {
		t.Run(name, func(t *testing.T) {
			c := harness.Up(t, devcluster.Options{Servers: 3})
			c.Argon(c.S(1), "volume", "create", "data", "--size", "64MiB")
			home := replicaOf(t, c, "data")
			far := withReplica(c, home, "data", home)
			l := soak.NewLedger(1, 0, 16<<20/soak.CellSize, 1)
			u := use(c, home, "data")
			fillWith(t, u.Client, 16<<20, 32<<20)
			w := write(t, l, u.Client)
			w.more(c, 300)
			c.Argon(home, "snapshot", "create", "data", "a")
			w.more(c, 300)
			w.stop()
			sum := sumOf(t, u.Client)
			u.end()
			c.Argon(home, "volume", "scrub", "data", "--wait") // records what is right

			must(t, far.Kill(t.Context()))
			damage(t, far, tc.file, tc.off, tc.n)
			must(t, far.Start(t.Context()))
			c.Argon(home, "volume", "scrub", "data", "--wait")
			c.Eventually("an event says "+tc.found, func() bool { return strings.Contains(c.Argon(home, "events"), tc.found) })
			sameEverywhere(c, home, "data", l)
			u = use(c, far, "data")
			defer u.end()
			if sumOf(t, u.Client) != sum {
				t.Error("the volume holds something else than before the damage")
			}
		})
	}
}

// What only a snapshot holds is damaged in one of two replicas, and then the good
// one goes away. The damaged one is not exported, and a new replica is given
// nothing of it; when the good one is back, it is copied from there, and a scrub
// mends what is damaged: longhorn/longhorn#1298, for history.
func TestDamagedSnapshot(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 3, Settings: &argonv1.Settings{ReplicaGraceSeconds: 5}})
	c.Argon(c.S(1), "volume", "create", "data", "--size", "32MiB")
	home := replicaOf(t, c, "data")
	far := withReplica(c, home, "data", home)
	u := use(c, home, "data")
	fillWith(t, u.Client, 0, 32<<20)
	c.Argon(home, "snapshot", "create", "data", "a")
	want := sumOf(t, u.Client)
	fillWith(t, u.Client, 8<<20, 16<<20)
	u.end()
	c.Argon(home, "volume", "scrub", "data", "--wait") // records what is right
	file := filepath.Join(t.TempDir(), "a.raw")
	says := func(reason string) func() bool {
		return func() bool { return strings.Contains(c.Argon(far, "events"), reason) }
	}

	must(t, far.Kill(t.Context()))
	damage(t, far, "layer-00000000.data", 20<<20, 64<<10)
	must(t, far.Start(t.Context()))
	c.Healthy(far, "data")
	if out := c.ArgonFails(far, "volume", "export", "data/a", file); !strings.Contains(out, "does not match its checksum") {
		t.Errorf("an export of what is damaged: %s", out)
	}
	must(t, home.Kill(t.Context()))
	c.Eventually("an event says that the new replica can't be copied to", says("replica-damaged"))
	if n := inSync(c, far, "data"); n != 1 {
		t.Errorf("%d replicas are in sync", n)
	}
	must(t, home.Start(t.Context()))
	c.Healthy(far, "data")
	c.Argon(far, "volume", "scrub", "data", "--wait")
	c.Eventually("an event says that it was mended", says("replica-mended"))

	v, err := c.Volume(far, "data")
	must(t, err)
	for _, r := range v.GetVolume().GetReplicas() {
		on := c.ByID(far, r.GetServerId())
		c.Argon(on, "volume", "export", "data/a", file, "--force")
		got, err := os.ReadFile(file)
		must(t, err)
		if sha256.Sum256(got) != want {
			t.Errorf("%s exports something else than the snapshot was", on.Name)
		}
	}
	t.Run("nothing tells", func(t *testing.T) { scrubDoesNotGuess(t, c) })
}

// scrubDoesNotGuess damages a replica of which nothing was recorded yet: that is
// told, and each replica stays as it is.
func scrubDoesNotGuess(t *testing.T, c *harness.Cluster) {
	s := c.S(1)
	c.Argon(s, "volume", "create", "fresh", "--size", "8MiB")
	c.Healthy(s, "fresh")
	u := use(c, s, "fresh")
	fillWith(t, u.Client, 0, 8<<20)
	u.end()
	v, err := c.Volume(s, "fresh")
	must(t, err)
	var files []string
	for _, r := range v.GetVolume().GetReplicas() {
		files = append(files, filepath.Join(c.ByID(s, r.GetServerId()).Dir, "volumes", v.GetVolume().GetMeta().GetId(), fmt.Sprint(r.GetId()), "layer-00000000.data"))
	}
	spoil(t, files[1], 3<<20, 4096)
	sums := func() (list [2][sha256.Size]byte) {
		for i, name := range files[:2] {
			b, err := os.ReadFile(name)
			must(t, err)
			list[i] = sha256.Sum256(b)
		}
		return list
	}
	before := sums()
	if out := c.ArgonFails(s, "volume", "scrub", "fresh", "--wait"); !strings.Contains(out, "1 region differs, and nothing tells which copy is right") {
		t.Errorf("the scrub: %s", out)
	}
	if sums() != before {
		t.Error("the scrub has changed a replica")
	}
	c.Eventually("an event tells of it", func() bool { return strings.Contains(c.Argon(s, "events"), "scrub-unclear") })
}

// damage writes nonsense into a file of a server's only replica.
func damage(t *testing.T, s *devcluster.Server, file string, off, n int64) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(s.Dir, "volumes", "*", "*", file))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s of the replica on %s: %q, %v", file, s.Name, found, err)
	}
	spoil(t, found[0], off, n)
}

// spoil writes nonsense into a file.
func spoil(t *testing.T, file string, off, n int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	nonsense := make([]byte, n)
	_, _ = rand.Read(nonsense)
	_, err = f.WriteAt(nonsense, off)
	must(t, err)
}
