package harness

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
)

// hashing is what a Hasher has the counting guest do, besides: it writes blocks
// behind the partitions of its disk, one after the other, round and round, and
// reads each from the disk again before the next round writes it anew. It tells
// what it found, and how long each block took by its own clock.
const hashing = `mkdir -p /run/sums /www
cat >/run/hash <<'END'
n=0 bad=0 last=
while :; do
 i=$((n % 16)); n=$((n + 1))
 echo 1 >/proc/sys/vm/drop_caches
 if [ -s /run/sums/$i ]; then
  dd if=/dev/vda bs=16k skip=$((2048 + i)) count=1 2>/dev/null | sha1sum >/run/got
  cmp -s /run/got /run/sums/$i || bad=$((bad + 1))
 fi
 dd if=/dev/urandom of=/run/new bs=16k count=1 2>/dev/null
 dd if=/run/new of=/dev/vda bs=16k seek=$((2048 + i)) conv=fsync,notrunc 2>/dev/null || bad=$((bad + 1))
 sha1sum </run/new >/run/sums/$i
 read -r up _ </proc/uptime
 up=$((${up%.*} * 100 + 1${up#*.} - 100))
 echo "$up $((up - ${last:-$up}))" >>/www/blocks.txt
 last=$up
 echo "$n $bad $up" >/run/x && mv /run/x /www/hashed.txt
done
END
sh /run/hash </dev/null >/dev/null 2>&1 &
`

// HasherDisk is how large the disk of a guest has to be that hashes.
const HasherDisk = "64MiB"

// Hasher has a counting guest write, and read again, blocks of its disk.
type Hasher struct {
	c    *Cluster
	http *http.Client
	url  string
}

// Hash begins it, on the guest's console, and asks through a server from then on.
func (c *Cluster) Hash(s *devcluster.Server, machine string, port int) *Hasher {
	c.T.Helper()
	h := &Hasher{c: c, url: guestURL(s, port), http: c.guestClient()}
	c.typeIn(s, machine, hashing, func() bool {
		now, ok := h.now()
		return ok && now.Blocks > 0
	})
	return h
}

// typeIn types at a machine's console until done.
func (c *Cluster) typeIn(s *devcluster.Server, machine, text string, done func() bool) {
	c.T.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := s.Command(ctx, "machine", "console", machine)
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = io.WriteString(in, text)
	}
	if err != nil {
		c.T.Fatal(err)
	}
	c.Eventually("machine "+machine+" does what was typed", done)
	cancel()
	_ = cmd.Wait() // by the end of ctx
}

// Hashed is what the guest tells.
type Hashed struct {
	// Blocks is how many it has written, Wrong how many were not what it had
	// written when it read them, or could not be written.
	Blocks, Wrong int
	// Up is how long it has run, by its own clock.
	Up time.Duration
}

// Now asks it.
func (h *Hasher) Now() Hashed {
	h.c.T.Helper()
	var now Hashed
	h.c.Eventually("the guest tells what it has hashed", func() (ok bool) {
		now, ok = h.now()
		return ok
	})
	return now
}

func (h *Hasher) now() (Hashed, bool) {
	text, err := h.get("hashed.txt")
	if err != nil {
		return Hashed{}, false
	}
	var now Hashed
	var up int
	if _, err := fmt.Sscan(text, &now.Blocks, &now.Wrong, &up); err != nil {
		return Hashed{}, false
	}
	now.Up = hundredths(up)
	return now, true
}

// Block is one that was written: when, and how long after the one before, by the
// guest's clock.
type Block struct{ At, Took time.Duration }

// Blocks are all that were written so far.
func (h *Hasher) Blocks() []Block {
	h.c.T.Helper()
	var text string
	h.c.Eventually("the guest tells of all blocks", func() (ok bool) {
		var err error
		text, err = h.get("blocks.txt")
		return err == nil
	})
	var all []Block
	for line := range strings.Lines(text) {
		at, took, _ := strings.Cut(strings.TrimSpace(line), " ")
		a, err1 := strconv.Atoi(at)
		b, err2 := strconv.Atoi(took)
		if err1 != nil || err2 != nil {
			continue // the last one, while it is being written
		}
		all = append(all, Block{hundredths(a), hundredths(b)})
	}
	return all
}

// Longest is the longest time that a block took whose end was in a time, by the
// guest's clock.
func Longest(blocks []Block, after, until time.Duration) time.Duration {
	var longest time.Duration
	for _, b := range blocks {
		if b.At > after && b.At <= until {
			longest = max(longest, b.Took)
		}
	}
	return longest
}

func hundredths(n int) time.Duration { return time.Duration(n) * 10 * time.Millisecond }

func (h *Hasher) get(name string) (string, error) {
	req, err := http.NewRequestWithContext(h.c.T.Context(), http.MethodGet, h.url+name, http.NoBody)
	if err != nil {
		return "", err
	}
	res, err := h.http.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", name, res.Status)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	return string(body), err
}
