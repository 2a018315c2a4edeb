package e2e_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// What the first boot of the guest is given beside user and key. Its name of an
// interface counts only if cloud-init has read it.
const (
	userData = `#cloud-config
write_files:
- path: /srv/given
  content: by the user
runcmd:
- [touch, /etc/cloud/cloud-init.disabled]
`
	networkConfig = `version: 2
ethernets:
  eth0:
    addresses: [10.0.2.15/24, 10.0.2.99/24]
    gateway4: 10.0.2.2
`
)

// The life of a real Debian, built from its packages and unmodified but for what
// is left out: it is told at its first boot who it is; its file systems rest while
// a snapshot is taken; its PostgreSQL, fsync on, goes to another server under load
// without one failed transaction; then its server is killed, and every
// transaction whose COMMIT was confirmed is there afterwards.
func TestDebian(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("builds and boots a whole Debian")
	}
	d := newDebian(t)
	d.firstBoot(t)
	d.restsForSnapshot(t)
	d.keepsTime(t)
	d.migratesUnderLoad(t)
	d.losesServer(t)
}

// debian is the machine of that test.
type debian struct {
	c    *harness.Cluster
	home *devcluster.Server // where it runs
	user *login
	db   *database
}

func newDebian(t *testing.T) *debian {
	t.Helper()
	c := harness.Up(t, devcluster.Options{Servers: 3})
	s := c.S(1)
	c.Argon(s, "image", "import", "debian", harness.DebianImage(t))
	dir := t.TempDir()
	given, network := filepath.Join(dir, "user-data"), filepath.Join(dir, "network-config")
	must(t, os.WriteFile(given, []byte(userData), 0o600))
	must(t, os.WriteFile(network, []byte(networkConfig), 0o600))
	alice := newLogin(c, "alice")
	c.Argon(s, "machine", "create", "db", "--image", "debian", "--no-wait", "--cpus", "2", "--memory", "512MiB",
		"--publish", "5432:5432", "--publish", "2222:22",
		"--user", alice.user, "--ssh-key", alice.public(), "--user-data", given, "--network-config", network)
	c.Healthy(s, "db") // its disk was made on two servers, which takes a slow one its time
	d := &debian{c: c, home: c.ByName(c.Running(s, "db")), user: alice, db: &database{t: t}}
	d.through()
	return d
}

// through uses the machine's ports at a server that it does not run on.
func (d *debian) through() *devcluster.Server {
	other := d.c.Other(d.home.Name)
	d.user.through(other, "2222")
	d.db.url = fmt.Sprintf("postgres://argon@%s/argon?sslmode=disable", net.JoinHostPort(other.Address, "5432"))
	return other
}

// firstBoot: the user is there, with the key, and what was given; the cluster
// shows what the guest says of itself.
func (d *debian) firstBoot(t *testing.T) {
	d.user.eventually(t, "cat /srv/given", "by the user")
	for command, want := range map[string]string{
		"hostname":                               "db",
		"id -un":                                 "alice",
		"cut -d' ' -f1,2 ~/.ssh/authorized_keys": d.user.public(),
	} {
		if out := d.user.prints(t, command); out != want {
			t.Errorf("%s: %q, want %q", command, out, want)
		}
	}
	// Its last stage has run, so nothing of it is to run again.
	d.user.eventually(t, "ls /etc/cloud/cloud-init.disabled", "/etc/cloud/cloud-init.disabled")
	other := d.through()
	d.c.Eventually("the machine's addresses are shown", func() bool {
		return strings.Contains(d.c.Argon(other, "machine", "ls"), "10.0.2.15,10.0.2.99")
	})
	show := d.c.Argon(other, "machine", "show", "db")
	for _, want := range []string{"Debian GNU/Linux", "user alice, 1 SSH keys"} {
		if !strings.Contains(show, want) {
			t.Errorf("nothing of %q:\n%s", want, show)
		}
	}
}

// restsForSnapshot: the file system is at rest in a snapshot of the machine, and
// needs no repair; in one of the volume it is as after a power cut.
func (d *debian) restsForSnapshot(t *testing.T) {
	other := d.through()
	d.c.Argon(other, "machine", "snapshot", "db", "quiet")
	d.user.prints(t, "echo goes on >~/after && sync")      // its file systems do not rest any more
	d.c.Argon(other, "snapshot", "create", "db", "abrupt") // of a volume, whatever uses it
	if needsRecovery(t, d.c, other, "quiet") || !needsRecovery(t, d.c, other, "abrupt") {
		t.Error("the file system was not at rest in the machine's snapshot, or was in its volume's")
	}
}

// keepsTime: its clock is right again after it was suspended, though nothing in it
// asks for the time.
func (d *debian) keepsTime(t *testing.T) {
	other := d.through()
	behind := func() time.Duration {
		// What is read is not older than the question: the guest is slow, not ahead.
		asked := time.Now()
		seconds, err := strconv.ParseFloat(d.user.prints(t, "date +%s.%N"), 64)
		must(t, err)
		return asked.Sub(time.Unix(0, int64(seconds*1e9)))
	}
	before := behind()
	began := time.Now()
	d.c.Argon(other, "machine", "suspend", "db")
	d.c.Argon(other, "machine", "resume", "db")
	d.home = d.c.ByName(d.c.Running(other, "db"))
	stood := time.Since(began)
	d.through()
	d.user.eventually(t, "echo goes on", "goes on")
	d.c.Eventually("its clock is set", func() bool { return strings.Contains(d.c.Argon(other, "events"), "machine-clock-set") })
	if after := behind(); after-before > stood/2 {
		t.Errorf("its clock is behind by %v after it stood still for about %v; before, by %v", after, stood, before)
	}
}

// needsRecovery tells whether the journal of the file system of a snapshot has to
// be replayed, as its superblock says.
func needsRecovery(t *testing.T, c *harness.Cluster, s *devcluster.Server, snapshot string) bool {
	t.Helper()
	const (
		partition, superblock     = 1 << 20, 1 << 10
		magicAt, magic            = 0x38, 0xef53
		incompatible, recoverFlag = 0x60, 0x4
	)
	c.Argon(s, "volume", "create", "of-"+snapshot, "--snapshot", "db/"+snapshot, "--replicas", "1")
	u := use(c, s, "of-"+snapshot)
	defer u.end()
	block := make([]byte, 1024)
	_, err := u.ReadAt(block, partition+superblock)
	must(t, err)
	if binary.LittleEndian.Uint16(block[magicAt:]) != magic {
		t.Fatal("there is no file system in the snapshot")
	}
	return binary.LittleEndian.Uint32(block[incompatible:])&recoverFlag != 0
}

// migratesUnderLoad: four clients inside the guest, as connections from outside
// end with the server that they came through (docs/decisions/0011).
func (d *debian) migratesUnderLoad(t *testing.T) {
	const pgbench = "pgbench -h 10.0.2.15 -U argon "
	d.user.prints(t, pgbench+"-i -I dtGp argon") // its data is made by the guest's PostgreSQL itself
	boot := d.user.prints(t, "cat /proc/sys/kernel/random/boot_id")
	d.user.prints(t, "nohup "+pgbench+"-n -c 4 -P 1 -T 36000 argon >load 2>&1 </dev/null & echo $! >pid")
	d.progress(t, 3)

	to := d.c.Other(d.home.Name)
	move := d.c.Migrate(d.home, "db", to)
	d.home = to
	d.through()
	oneCopy(d.c)
	before := d.progress(t, 1)
	d.progress(t, before+3)
	d.user.prints(t, "kill $(cat pid)")
	if now := d.user.prints(t, "cat /proc/sys/kernel/random/boot_id"); now != boot {
		t.Error("the guest was restarted")
	}
	for line := range strings.Lines(d.user.prints(t, "cat load")) {
		if strings.Contains(line, "progress:") && !strings.Contains(line, " 0 failed") || strings.Contains(line, "aborted") || strings.Contains(line, "ERROR") {
			t.Errorf("a transaction failed: %s", line)
		}
	}
	t.Logf("%d transactions; the guest stood still for %v", d.consistent(t), move.Still)
}

// progress waits until the load has told of so many seconds with transactions, and
// returns how many there are.
func (d *debian) progress(t *testing.T, atLeast int) int {
	t.Helper()
	n := 0
	d.c.Eventually(fmt.Sprintf("the load has made progress in %d seconds", atLeast), func() bool {
		out, err := d.user.runs("cat load")
		if err != nil {
			return false
		}
		n = strings.Count(out, "progress:") - strings.Count(out, " 0.0 tps")
		return n >= atLeast
	})
	return n
}

// consistent checks what each transaction of pgbench leaves as it is: the sums of
// accounts, tellers and branches are that of the history. It returns how many
// transactions there were.
func (d *debian) consistent(t *testing.T) int64 {
	t.Helper()
	var accounts, tellers, branches, history, count int64
	d.db.until("the sums can be read", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
			(SELECT sum(bbalance) FROM pgbench_branches), coalesce(sum(delta), 0), count(*) FROM pgbench_history`).
			Scan(&accounts, &tellers, &branches, &history, &count)
	})
	if accounts != history || tellers != history || branches != history || count == 0 {
		t.Errorf("%d transactions: accounts %d, tellers %d, branches %d, history %d", count, accounts, tellers, branches, history)
	}
	return count
}

// losesServer: numbered transactions come from outside, and the server is killed
// in the middle.
func (d *debian) losesServer(t *testing.T) {
	other, db := d.through(), d.db
	db.until("PostgreSQL answers", func(ctx context.Context, conn *pgx.Conn) error {
		var fsync string
		if err := conn.QueryRow(ctx, "SHOW fsync").Scan(&fsync); err != nil {
			return err
		}
		if fsync != "on" {
			return errors.New("fsync is " + fsync)
		}
		_, err := conn.Exec(ctx, "CREATE TABLE IF NOT EXISTS t (n bigint PRIMARY KEY)")
		return err
	})
	stop := db.write()
	d.c.Eventually("fifty transactions are confirmed", func() bool { return db.confirmed.Load() >= 50 })
	must(t, d.home.Kill(t.Context()))
	d.c.Running(other, "db", d.home.Name)
	db.until("PostgreSQL answers again", func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "SELECT 1")
		return err
	})
	atKill := db.confirmed.Load()
	d.c.Eventually("it goes on to commit", func() bool { return db.confirmed.Load() >= atKill+20 })
	stop()
	db.until("all that was confirmed is there", func(ctx context.Context, conn *pgx.Conn) error {
		var count, highest int64
		if err := conn.QueryRow(ctx, "SELECT count(*), coalesce(max(n), 0) FROM t").Scan(&count, &highest); err != nil {
			return err
		}
		last := db.confirmed.Load()
		// One more may be there: committed, and its confirmation lost.
		if count != highest || highest < last || highest > last+1 {
			t.Fatalf("%d transactions were confirmed; %d are there, the highest is %d", last, count, highest)
		}
		t.Logf("%d transactions were confirmed, %d by the time PostgreSQL was back; %d are there", last, atKill, count)
		return nil
	})
	d.consistent(t)
}
