package e2e_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/devcluster/counter"
	"github.com/argon-cluster/argon/test/harness"
)

// Each takes ten seconds or so: some are enough for every day.
var allFaults = flag.Bool("all-faults", false, "every fault at every step of checkpoints, not only some")

const (
	cpTaking    = argonv1.CheckpointState_CHECKPOINT_STATE_TAKING
	cpReady     = argonv1.CheckpointState_CHECKPOINT_STATE_READY
	isRunning   = argonv1.MachineState_MACHINE_STATE_RUNNING
	isSuspended = argonv1.MachineState_MACHINE_STATE_SUSPENDED
	isStopped   = argonv1.MachineState_MACHINE_STATE_STOPPED
)

// ordeal is one cluster with one guest, to which everything happens.
type ordeal struct {
	*harness.Cluster
	netns bool
	// watch sees that nothing acknowledged is lost. With it off the guest may
	// go back to a checkpoint.
	watch *harness.Watcher
	// kept is a checkpoint that stays, and what the guest said before it.
	kept counter.Report
}

const keptName = "kept"

// records are what the API says of the machine at one time.
type records struct {
	machine     *argonv1.Machine
	checkpoints []*argonv1.CheckpointView
	disk        *argonv1.Volume
}

// newest is the checkpoint that was asked for last.
func (r records) newest() *argonv1.Checkpoint {
	var c *argonv1.Checkpoint
	for _, v := range r.checkpoints {
		if v.GetCheckpoint().GetMeta().GetName() != keptName && v.GetCheckpoint().GetMeta().GetId() > c.GetMeta().GetId() {
			c = v.GetCheckpoint()
		}
	}
	return c
}

// steps at which something fails, by what the records say.
var (
	memoryBegins = func(r records) bool { return r.newest().GetState() == cpTaking }
	diskIsTaken  = func(r records) bool {
		return r.newest().GetState() == cpTaking && len(r.newest().GetSnapshots()) > 0
	}
	memoryIsWritten = func(r records) bool {
		id := r.newest().GetSnapshots()[r.disk.GetMeta().GetId()]
		for _, s := range r.disk.GetSnapshots() {
			if id != 0 && s.GetId() == id && s.GetState() == argonv1.SnapshotState_SNAPSHOT_STATE_READY {
				return r.newest().GetState() == cpTaking
			}
		}
		return false
	}
	isPlaced = func(r records) bool { return r.machine.GetWake() != nil && r.machine.GetServerId() != "" }
	isRead   = func(r records) bool {
		return isPlaced(r) && r.machine.GetWake().GetChecked() && r.machine.GetStatus().GetState() == argonv1.MachineState_MACHINE_STATE_STARTING
	}
)

// Something fails at a step of a checkpoint, of a suspension or of a resumption
// elsewhere. Whatever that is: at most one copy runs at any time, and one in the
// end, or none of a machine that is suspended; a checkpoint that is not whole is
// not offered, and its space comes back; what was acknowledged is there; and the
// machine can be checkpointed again.
func TestCheckpointFaults(t *testing.T) {
	liveSaving(t)
	o := newOrdeal(t)
	checkpointing := func(o *ordeal, via, _ *devcluster.Server) error {
		return o.try(via, "machine", "checkpoint", machine, "--name", "new")
	}
	suspending := func(o *ordeal, via, _ *devcluster.Server) error { return o.try(via, "machine", "suspend", machine) }
	resuming := func(o *ordeal, via, to *devcluster.Server) error {
		return o.try(via, "machine", "resume", machine, "--on", to.Name, "--timeout", "90s")
	}
	goingBack := func(o *ordeal, via, to *devcluster.Server) error {
		return o.try(via, "machine", "resume", machine, "--from", keptName, "--on", to.Name, "--timeout", "90s")
	}
	for _, tt := range []struct {
		what string
		from argonv1.MachineState // what the machine is before
		do   func(o *ordeal, via, to *devcluster.Server) error
		at   string
		step func(records) bool
		// some of the faults, for every day.
		some []fault
	}{
		{"checkpoint", isRunning, checkpointing, "its disk's snapshot is taken", diskIsTaken, []fault{daemonDies}},
		{"checkpoint", isRunning, checkpointing, "its memory is written", memoryIsWritten, nil},
		{"suspend", isRunning, suspending, "its memory is written", memoryBegins, []fault{daemonDies, serverIsCut}},
		{"resume", isSuspended, resuming, "it has a server", isPlaced, []fault{leaderDies}},
		{"resume", isSuspended, resuming, "its memory is read", isRead, nil},
		{"resume from a checkpoint", isStopped, goingBack, "it has a server", isPlaced, nil},
		{"resume from a checkpoint", isStopped, goingBack, "its memory is read", isRead, []fault{guestDies}},
	} {
		for _, f := range []fault{daemonDies, guestDies, serverDies, leaderDies, serverIsCut} {
			if !slices.Contains(tt.some, f) && !*allFaults || f == serverIsCut && !o.netns {
				continue
			}
			t.Run(fmt.Sprintf("%s/%s/%s", tt.what, tt.at, f), func(t *testing.T) {
				o := o.in(t)
				o.bring(tt.from)
				o.strike(f, tt.step, tt.do)
				o.settle()
				o.verify(tt.from == isStopped)
			})
			if t.Failed() {
				return // one guest and one cluster for all: what follows says nothing
			}
		}
	}
}

func newOrdeal(t *testing.T) *ordeal {
	netns := os.Geteuid() == 0
	o := &ordeal{Cluster: harness.Up(t, devcluster.Options{Servers: 3, Netns: netns}), netns: netns}
	counting(t, o.Cluster, "2")
	o.watch = o.Watch(port, o.Servers()...)
	counts(o.Cluster, o.watch, 3)
	o.neverTwo()
	// With something in it that does not get smaller, writing the memory takes
	// a while.
	con := console(t, o.Cluster, o.S(1), machine)
	con.say("dd if=/dev/urandom of=/run/noise bs=1M count=40 2>/dev/null; echo filled $((6 * 7))\n")
	con.hear("filled 42")
	o.kept = report(o.Cluster, o.S(1))
	o.Argon(o.S(1), "machine", "checkpoint", machine, "--name", keptName)
	return o
}

// in lets the helpers fail another test.
func (o *ordeal) in(t *testing.T) *ordeal {
	other := *o
	other.Cluster = &harness.Cluster{Cluster: o.Cluster.Cluster, T: t}
	return &other
}

// try runs a command that may fail.
func (o *ordeal) try(s *devcluster.Server, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), harness.Patience)
	defer cancel()
	_, err := s.Exec(ctx, args...)
	return err
}

// look asks for the records; not ok if a server does not say.
func (o *ordeal) look(s *devcluster.Server) (r records, ok bool) {
	m, err := o.Machine(s, machine)
	if err != nil {
		return r, false
	}
	v, err := o.Volume(s, machine)
	if err != nil {
		return r, false
	}
	ctx, cancel := context.WithTimeout(o.T.Context(), 10*time.Second)
	defer cancel()
	res, err := client.Call(ctx, o.API(s).Checkpoints.ListCheckpoints, &argonv1.ListCheckpointsRequest{})
	return records{machine: m.GetMachine(), checkpoints: res.GetCheckpoints(), disk: v.GetVolume()}, err == nil
}

// bring makes the machine what it is to be before something fails.
func (o *ordeal) bring(state argonv1.MachineState) {
	o.T.Helper()
	s := o.S(1)
	switch state {
	case isSuspended:
		o.Argon(s, "machine", "suspend", machine)
	case isStopped:
		o.watch.Stop() // it will go back
		o.Argon(s, "machine", "stop", machine)
	}
}

// strike has something done, and makes something fail when that has come to a
// step: to the server that does it, or to the one that leads.
func (o *ordeal) strike(f fault, step func(records) bool, do func(o *ordeal, via, to *devcluster.Server) error) {
	o.T.Helper()
	leader := leaderOf(o.Cluster, o.S(1))
	home := leader
	if r, ok := o.look(leader); ok && r.machine.GetServerId() != "" {
		home = o.ByID(leader, r.machine.GetServerId())
	}
	// The one that is asked lives, wherever the machine is to go.
	via := o.Other(home.Name, leader.Name)
	to := o.Other(via.Name, home.Name)
	answered := make(chan error, 1)
	go func() { answered <- do(o, via, to) }()
	over := false
	for reached := false; !reached && !over; {
		r, ok := o.look(via)
		reached = ok && step(r)
		select {
		case err := <-answered:
			o.T.Logf("it was over before it was seen at that step: %v", err)
			over = true
		case <-time.After(time.Millisecond):
		}
	}
	r, _ := o.look(via)
	at := to
	if id := r.machine.GetServerId(); id != "" {
		at = o.ByID(via, id)
	}
	heal := f.hit(o, at, leader)
	if r, ok := o.look(via); ok {
		o.T.Logf("hit %s (the leader is %s): checkpoint %v, machine %v", at.Name, leader.Name, r.newest().GetState(), r.machine.GetStatus().GetState())
	}
	if !over {
		o.T.Logf("the command says: %v", <-answered)
	}
	heal()
}

// fault is what fails.
type fault string

const (
	daemonDies  fault = "its daemon is killed"
	guestDies   fault = "its QEMU is killed"
	serverDies  fault = "its server is lost"
	leaderDies  fault = "the leader is lost"
	serverIsCut fault = "its server is cut off"
)

// hit makes it fail, and returns what brings back what was lost.
func (f fault) hit(o *ordeal, at, leader *devcluster.Server) (heal func()) {
	ctx := o.T.Context()
	switch f {
	case daemonDies:
		must(o.T, at.Kill(ctx, devcluster.Daemon))
		return func() {
			o.Eventually("the guard starts the daemon again", func() bool {
				res, err := o.Status(at)
				return err == nil && res.GetState() == "ready"
			})
		}
	case guestDies:
		must(o.T, at.Kill(ctx, devcluster.Guests))
		return func() {}
	case serverIsCut:
		must(o.T, at.Cut(ctx))
		return func() { must(o.T, at.Heal(ctx)) }
	case leaderDies:
		at = leader
	}
	must(o.T, at.Kill(ctx))
	return func() { must(o.T, at.Start(ctx)) }
}

// settle waits until nothing is under way any more, and makes the machine run.
func (o *ordeal) settle() {
	o.T.Helper()
	s := o.S(1)
	var state argonv1.MachineState
	o.Eventually("nothing is under way", func() bool {
		r, ok := o.look(s)
		m := r.machine
		for _, v := range r.checkpoints {
			ok = ok && v.GetCheckpoint().GetState() != argonv1.CheckpointState_CHECKPOINT_STATE_WANTED && v.GetCheckpoint().GetState() != cpTaking
		}
		state = m.GetStatus().GetState()
		switch m.GetWanted() {
		case argonv1.Wanted_WANTED_RUNNING:
			return ok && state == isRunning && m.GetStatus().GetPlacement() == m.GetPlacement() && m.GetWake() == nil
		case argonv1.Wanted_WANTED_SUSPENDED:
			return ok && state == isSuspended && m.GetServerId() == "" && m.GetWake() != nil
		}
		return ok && state == isStopped && m.GetServerId() == ""
	})
	if state == isRunning {
		oneCopy(o.Cluster)
		return
	}
	if n := len(guestsNow(o.Cluster)); n != 0 {
		o.T.Errorf("%d guests run of a machine that is %v", n, state)
	}
	o.T.Logf("the machine ended as %v", state)
	if state == isSuspended {
		o.Argon(s, "machine", "resume", machine)
	} else {
		o.Argon(s, "machine", "resume", machine, "--from", keptName)
	}
	o.Running(s, machine)
	oneCopy(o.Cluster)
}

// verify looks at what is left: of the guest, of checkpoints that are not whole
// and of those that are. wentBack: the guest was made what it was at the
// checkpoint that is kept.
func (o *ordeal) verify(wentBack bool) {
	o.T.Helper()
	s := o.S(1)
	now := report(o.Cluster, s)
	if wentBack {
		// It goes on, or it has booted from the disk as it was then.
		if now.Count < o.kept.Count || now.Boot != o.kept.Boot && now.Found < o.kept.Count {
			o.T.Errorf("at the checkpoint the guest had told %+v, and tells %+v", o.kept, now)
		}
	} else {
		counts(o.Cluster, o.watch, 3)
		if now.Boot != o.kept.Boot && now.Found < o.kept.Count {
			o.T.Errorf("the guest has found %+v", now)
		}
	}
	o.spaceComesBack()
	o.Argon(s, "machine", "checkpoint", machine, "--name", "again")
	if v := checkpointed(o.Cluster, s, "again"); v.GetUnusable() != "" {
		o.T.Errorf("the checkpoint after it can't be used: %s", v.GetUnusable())
	}
	o.Argon(s, "checkpoint", "rm", "again")
	o.Healthy(s, machine)
	if v := checkpointed(o.Cluster, s, keptName); v.GetUnusable() != "" {
		o.T.Errorf("a checkpoint of before can't be used any more: %s", v.GetUnusable())
	}
}

// spaceComesBack expects that the checkpoint that was asked for is whole, or is
// not offered and nothing is left of it: no volume, no snapshot, no file.
func (o *ordeal) spaceComesBack() {
	o.T.Helper()
	s := o.S(1)
	r, ok := o.look(s)
	if !ok {
		o.T.Fatal("the records can't be read")
	}
	if c := r.newest(); c.GetMeta().GetName() == "new" {
		if c.GetState() != cpReady {
			if got := o.ArgonFails(s, "machine", "clone", machine, "other", "--from", "new"); !strings.Contains(got, "can't be used") {
				o.T.Errorf("a checkpoint that is not whole: %s", got)
			}
		}
		o.Argon(s, "checkpoint", "rm", "new")
	}
	kept := checkpointed(o.Cluster, s, keptName).GetCheckpoint()
	o.Eventually("nothing is left of checkpoints but of the one that is kept", func() bool {
		return strings.Count(o.Argon(s, "volume", "ls", "--all"), "memory-") == 1 &&
			strings.Count(o.Argon(s, "snapshot", "ls"), "checkpoint-") == 1
	})
	o.Eventually("no server has files of any other", func() bool {
		for _, x := range o.Servers() {
			dirs, err := filepath.Glob(filepath.Join(x.Dir, "volumes", "*"))
			must(o.T, err)
			for _, dir := range dirs {
				if id := filepath.Base(dir); len(id) == len(kept.GetMemoryVolumeId()) && id != kept.GetMemoryVolumeId() && id != r.disk.GetMeta().GetId() {
					return false
				}
			}
		}
		return true
	})
}

// guestsNow are the processes of the machine's guests, whatever their server is.
func guestsNow(c *harness.Cluster) []int {
	var pids []int
	for _, s := range c.Servers() {
		found, _ := s.PIDs(devcluster.Guests)
		for _, pid := range found {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if bytes.Contains(line, []byte("guest="+machine)) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// neverTwo looks all the time, until the test ends, whether two guests of the
// machine are there at once.
func (o *ordeal) neverTwo() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if first := guestsNow(o.Cluster); len(first) > 1 {
				// Those that are still there now were there together then.
				both := slices.DeleteFunc(guestsNow(o.Cluster), func(pid int) bool { return !slices.Contains(first, pid) })
				if len(both) > 1 {
					o.T.Errorf("%d guests of one machine run at once", len(both))
					return
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	o.T.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}
