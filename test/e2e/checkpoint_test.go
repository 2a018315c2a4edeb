package e2e_test

import (
	"net"
	"net/http"
	"os"
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

// A checkpoint is taken while the guest counts; it counts on. Later the machine
// goes on from there on another server: it is the same boot, with the count of
// then, also on its disk.
func TestResumeFromCheckpoint(t *testing.T) {
	liveSaving(t)
	c := harness.Up(t, devcluster.Options{Servers: 3})
	home := counting(t, c, "2")
	other := c.Other(home.Name)
	before := report(c, other)
	c.Argon(other, "machine", "checkpoint", machine, "--name", "then")
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

	// Its disk is that of then: a boot finds what it has counted since, and not
	// what came after the checkpoint.
	seen := report(c, other)
	c.Argon(other, "machine", "stop", machine, "--force")
	c.Argon(other, "machine", "start", machine)
	boot := report(c, other)
	if boot.Boot == now.Boot || boot.Found < seen.Count || boot.Found >= last {
		t.Errorf("a boot found %d; it had counted to %d since the checkpoint, and to %d before it was resumed", boot.Found, seen.Count, last)
	}
	c.Argon(other, "checkpoint", "rm", "then")
	c.Eventually("nothing of the checkpoint is left", func() bool {
		return !strings.Contains(c.Argon(other, "checkpoint", "ls")+c.Argon(other, "volume", "ls", "--all"), "then") &&
			!strings.Contains(c.Argon(other, "snapshot", "ls"), "checkpoint-")
	})
}
