package e2e_test

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/devcluster/counter"
	"github.com/argon-cluster/argon/test/harness"
)

// report asks the guest for its count, through server s, until it answers.
func report(c *harness.Cluster, s *devcluster.Server) counter.Report {
	c.T.Helper()
	h := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: c.DialContext, DisableKeepAlives: true}}
	var r counter.Report
	c.Eventually("the guest answers", func() bool {
		var err error
		r, err = counter.Ask(c.T.Context(), h, "http://"+net.JoinHostPort(s.Address, "8080")+"/")
		return err == nil
	})
	return r
}

// mark writes a word to a place of the guest's disk that it does not use.
func mark(con *talk, word string) {
	con.say("echo " + word + " | dd of=/dev/vda2 bs=512 seek=40 conv=sync,fsync,notrunc 2>/dev/null && echo wrote $((6 * 7)) " + word + "\n")
	con.hear("wrote 42 " + word)
}

// checkpointed is the checkpoint of that name, as server s says.
func checkpointed(c *harness.Cluster, s *devcluster.Server, name string) *argonv1.CheckpointView {
	c.T.Helper()
	res, err := client.Call(c.T.Context(), c.API(s).Checkpoints.GetCheckpoint, &argonv1.GetCheckpointRequest{Name: name})
	must(c.T, err)
	return res.GetCheckpoint()
}

// liveSaving lets guests that are confined have their memory saved while they
// run on, as docs/operations.md says.
func liveSaving(t *testing.T) {
	t.Helper()
	const path = "/proc/sys/vm/unprivileged_userfaultfd"
	old, err := os.ReadFile(path)
	if err != nil || os.WriteFile(path, []byte("1\n"), 0) != nil {
		t.Log("guests may have to stand still while their memory is saved here")
		return
	}
	t.Cleanup(func() { _ = os.WriteFile(path, old, 0) })
}

// What checkpoints and suspension are for.
func TestCheckpoints(t *testing.T) {
	liveSaving(t)
	tell(t, devcluster.Options{Servers: 3}, "2",
		story{"it goes on from a checkpoint", resumesFromCheckpoint},
		story{"it is suspended and resumed", suspendedAndResumed},
		story{"its server is lost and it is resumed", lostAndResumed}, // whose policy stays
	)
}

// A checkpoint is taken while the guest counts; it counts on. Later the machine
// goes on from there on another server: it is the same boot, with the count of
// then, also on its disk.
func resumesFromCheckpoint(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	other := c.Other(home.Name)
	before := report(c, other)
	mark(console(t, c, other, machine), "THEN")
	c.Argon(other, "machine", "checkpoint", machine, "--name", "then")
	mark(console(t, c, other, machine), "LATER")
	v := checkpointed(c, other, "then")
	t.Logf("the guest stood still for %.1f ms; %d MiB of memory became %d MiB; %s",
		float64(v.GetCheckpoint().GetPauseMicroseconds())/1000, v.GetCheckpoint().GetMemoryBytes()>>20, v.GetCheckpoint().GetStoredBytes()>>20, v.GetCheckpoint().GetPausedBecause())
	after := report(c, other)
	if after.Boot != before.Boot || after.Count < before.Count {
		t.Errorf("the guest did not go on: %+v, then %+v", before, after)
	}
	if out := c.Argon(other, "volume", "ls"); strings.Contains(out, "memory-") {
		t.Errorf("volumes of checkpoints are listed:\n%s", out)
	}
	w := c.Watch(port, other)
	counts(c, w, 20)
	last := w.Highest()
	w.Stop()
	c.Argon(other, "machine", "stop", machine, "--force")

	target := c.Other(c.ByID(other, v.GetCheckpoint().GetServerId()).Name)
	begun := time.Now()
	c.Argon(other, "machine", "resume", machine, "--from", "then", "--on", target.Name)
	t.Logf("it runs on another server %v after it was asked for", time.Since(begun))
	now := report(c, other)
	if now.Boot != before.Boot || now.Count < before.Count || now.Count >= last+20 || now.Found != before.Found {
		t.Errorf("at the checkpoint %+v, now %+v; it had come to %d", before, now, last)
	}
	if on := c.Running(other, machine); on != target.Name {
		t.Errorf("it runs on %s, not on %s", on, target.Name)
	}
	oneCopy(c)

	// Its disk is that of then, as a boot finds it.
	c.Argon(other, "machine", "stop", machine, "--force")
	c.Argon(other, "machine", "start", machine)
	if boot := report(c, other); boot.Boot == now.Boot {
		t.Error("it did not boot")
	}
	con := console(t, c, other, machine)
	con.say("echo it is $(dd if=/dev/vda2 bs=512 skip=40 count=1 2>/dev/null | tr -d '\\0')\n")
	con.hear("it is THEN")
	c.Argon(other, "checkpoint", "rm", "then")
	c.Eventually("nothing of the checkpoint is left", func() bool {
		return !strings.Contains(c.Argon(other, "checkpoint", "ls")+c.Argon(other, "volume", "ls", "--all"), "then") &&
			!strings.Contains(c.Argon(other, "snapshot", "ls"), "checkpoint-")
	})
}

// A machine is suspended: nothing of it runs, its server's memory is free. It
// goes on where it was, also when the server that it ran on is lost meanwhile;
// and then its memory is used up.
func suspendedAndResumed(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	other := c.Other(home.Name)
	before := report(c, other)
	c.Argon(other, "machine", "suspend", machine)
	if n := copies(c); n != 0 {
		t.Errorf("%d guests run of a suspended machine", n)
	}
	for args, says := range map[string]string{
		"machine start " + machine:                      "is suspended",
		"machine stop " + machine:                       "memory would be lost",
		"machine suspend " + machine:                    "is suspended",
		"machine checkpoint " + machine:                 "is suspended",
		"machine resume " + machine + " --from nothing": "does not exist",
		"machine resume " + machine + " --on nowhere":   "does not exist",
	} {
		if got := c.ArgonFails(other, strings.Fields(args)...); !strings.Contains(got, says) {
			t.Errorf("argon %s: %s", args, got)
		}
	}
	must(t, home.Kill(t.Context()))
	begun := time.Now()
	c.Argon(other, "machine", "resume", machine)
	t.Logf("it runs on another server %v after it was asked for", time.Since(begun))
	now := report(c, other)
	if now.Boot != before.Boot || now.Count < before.Count {
		t.Errorf("it was at %+v, and is at %+v", before, now)
	}
	must(t, home.Start(t.Context()))
	oneCopy(c)
	c.Eventually("its memory is used up", func() bool {
		return !strings.Contains(c.Argon(other, "volume", "ls", "--all"), "memory-")
	})
	if got := c.ArgonFails(other, "machine", "resume", machine); !strings.Contains(got, "is not suspended") {
		t.Error(got)
	}
}

// The server of a machine with the policy to be resumed is lost: it goes on from
// its last checkpoint, the same boot with the count and the disk of then.
func lostAndResumed(t *testing.T, c *harness.Cluster, home *devcluster.Server) {
	other := c.Other(home.Name)
	report(c, other) // it has booted
	told := func(what string) int { return strings.Count(c.Argon(other, "events", "--limit", "1000"), what) }
	taken, resumed := told("checkpoint-taken"), told("machine-resumed-from")
	c.Argon(other, "machine", "set", machine, "--on-loss", "resume", "--checkpoint-every", "10s", "--keep", "2")
	var last *argonv1.CheckpointView
	c.Eventually("three checkpoints were taken, and two are kept", func() bool {
		res, err := client.Call(t.Context(), c.API(other).Checkpoints.ListCheckpoints, &argonv1.ListCheckpointsRequest{Machine: machine})
		must(t, err)
		ready := 0
		for _, v := range res.GetCheckpoints() {
			if v.GetUnusable() == "" {
				last = v
				ready++
			}
		}
		return ready == 2 && told("checkpoint-taken") >= taken+3
	})
	t.Logf("the last one: it stood still for %.1f ms", float64(last.GetCheckpoint().GetPauseMicroseconds())/1000)
	c.Argon(other, "machine", "set", machine, "--checkpoint-every", "0s")
	before := report(c, other)
	w := c.Watch(port, other)
	counts(c, w, 30)
	lost := w.Highest()
	w.Stop()
	must(t, home.Kill(t.Context()))
	c.Running(other, machine, home.Name)
	now := report(c, other)
	if now.Boot != before.Boot || now.Count >= lost+30 {
		t.Errorf("it was at %+v and came to %d, and is at %+v", before, lost, now)
	}
	must(t, home.Start(t.Context()))
	oneCopy(c)
	if told("machine-resumed-from") == resumed {
		t.Error("nobody says that it was resumed")
	}
}

// Another machine goes on from a checkpoint, beside the first.
func TestCloneFromCheckpoint(t *testing.T) {
	liveSaving(t)
	c := harness.Up(t, devcluster.Options{Servers: 2})
	home := counting(t, c, "2")
	report(c, home) // it has booted
	c.Argon(home, "machine", "checkpoint", machine, "--name", "then")
	for args, says := range map[string]string{
		"machine checkpoint " + machine + " --name then":            "exists already",
		"machine checkpoint " + machine + " --name Then":            "use 1 to 63",
		"machine clone " + machine + " " + machine + " --from then": "exists already",
		"machine resume " + machine + " --from then":                "stop it first",
		"volume rm " + volumeOf(c, home, "then"):                    "goes with it",
		"volume connect " + volumeOf(c, home, "then"):               "goes with it",
	} {
		if got := c.ArgonFails(home, strings.Fields(args)...); !strings.Contains(got, says) {
			t.Errorf("argon %s: %s", args, got)
		}
	}
	c.Argon(home, "machine", "clone", machine, "twin", "--from", "then")
	con := console(t, c, home, "twin")
	con.say("cat /proc/sys/kernel/random/boot_id\n")
	con.hear(report(c, home).Boot)
	if n := copies(c); n != 2 {
		t.Errorf("%d guests run", n)
	}
}

// volumeOf is the name of the volume with a checkpoint's memory.
func volumeOf(c *harness.Cluster, s *devcluster.Server, checkpoint string) string {
	return "memory-" + strings.ToLower(checkpointed(c, s, checkpoint).GetCheckpoint().GetMeta().GetId())
}

// One byte of a checkpoint's memory has changed on the disk: that is told with
// the frame, nothing is started, and the machine's disk is as it was.
func TestDamagedCheckpoint(t *testing.T) {
	c := harness.Up(t, devcluster.Options{Servers: 1})
	home := counting(t, c, "1")
	c.Argon(home, "machine", "checkpoint", machine, "--name", "then")
	id := checkpointed(c, home, "then").GetCheckpoint().GetMemoryVolumeId()
	w := c.Watch(port, home)
	counts(c, w, 20)
	last := w.Highest()
	w.Stop()
	c.Argon(home, "machine", "stop", machine)
	flip(t, home.Dir, id, 2000) // a frame is smaller the better it can be compressed
	got := c.ArgonFails(home, "machine", "resume", machine, "--from", "then")
	const says = "frame 0 of the memory is damaged"
	if out := c.Argon(home, "events", "--limit", "50"); !strings.Contains(got, says) || !strings.Contains(out, says) {
		t.Errorf("not everybody names the frame: %s\n%s", got, out)
	}
	if n := copies(c); n != 0 {
		t.Errorf("%d guests run", n)
	}
	c.Argon(home, "machine", "start", machine)
	if now := report(c, home); now.Found < last {
		t.Errorf("its disk has %d, and had %d", now.Found, last)
	}
}

// flip changes a byte of what a replica of a volume holds, behind its back.
func flip(t *testing.T, dir, volumeID string, at int64) {
	t.Helper()
	found := 0
	must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(path, volumeID) || !strings.Contains(filepath.Base(path), "data") {
			return nil
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, at); err != nil {
			return nil // another file of it
		}
		found++
		b[0] ^= 1
		_, err = f.WriteAt(b, at)
		return err
	}))
	if found != 1 {
		t.Fatalf("%d files hold the memory", found)
	}
}
