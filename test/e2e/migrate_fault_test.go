package e2e_test

import (
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

var everyStep = flag.Bool("every-step", false, "TestMigrationFaults makes each fault at each step of a migration, not at one")

// journey is a machine that is on its way.
type journey struct {
	c    *harness.Cluster
	from *devcluster.Server
	to   *devcluster.Server
	// third is the server that takes no part.
	third *devcluster.Server
	api   *client.Client // of third
	id    string
}

// steps of a migration, by what the records show; each is also seen when it is
// past.
var steps = []struct {
	name string
	at   func(m *argonv1.Machine, v *argonv1.Volume) bool
}{
	{"the other server prepares", func(*argonv1.Machine, *argonv1.Volume) bool { return true }},
	{"the state is sent", func(m *argonv1.Machine, _ *argonv1.Volume) bool {
		return m.GetMigration().GetPhase() == argonv1.MigrationPhase_MIGRATION_PHASE_COPYING
	}},
	{"the disk is let go of", func(_ *argonv1.Machine, v *argonv1.Volume) bool { return v.GetAttachment() == nil }},
	{"it has moved", func(m *argonv1.Machine, _ *argonv1.Volume) bool { return m.GetMigration() == nil }},
}

// migrationFaults are what can happen to those that take part.
var migrationFaults = []struct {
	name string
	// step is where it is made if not at each.
	step int
	do   func(t *testing.T, j *journey)
	// mend undoes it, if it does not mend itself.
	mend func(t *testing.T, j *journey)
	// root: it needs network namespaces.
	root bool
	// there: only what is on the other server is hit.
	there bool
}{
	{name: "the source's daemon is killed", step: 1, do: func(t *testing.T, j *journey) { must(t, j.from.Kill(t.Context(), devcluster.Daemon)) }},
	{name: "the target's daemon is killed", step: 3, do: func(t *testing.T, j *journey) { must(t, j.to.Kill(t.Context(), devcluster.Daemon)) }},
	{name: "the target's QEMU is killed", step: 2, there: true, do: func(t *testing.T, j *journey) { must(t, j.to.Kill(t.Context(), devcluster.Guests)) }},
	{
		name: "the link is cut", step: 2, root: true, there: true,
		do: func(t *testing.T, j *journey) {
			must(t, j.from.Mute(t.Context(), j.to))
			must(t, j.to.Mute(t.Context(), j.from))
		},
		mend: func(t *testing.T, j *journey) {
			must(t, j.from.Unmute(t.Context(), j.to))
			must(t, j.to.Unmute(t.Context(), j.from))
		},
	},
	{name: "the source's QEMU is killed", step: 2, do: func(t *testing.T, j *journey) { must(t, j.from.Kill(t.Context(), devcluster.Guests)) }},
	{
		name: "the leader dies", step: 0,
		do: func(t *testing.T, j *journey) { must(t, j.leader().Kill(t.Context())) },
		mend: func(t *testing.T, j *journey) {
			for _, s := range j.c.Servers() {
				if now, err := s.Condition(); err != nil || now == "stopped" {
					must(t, s.Start(t.Context()))
				}
			}
		},
	},
}

// leader is the server that leads, as far as any that lives knows.
func (j *journey) leader() *devcluster.Server { return leaderOf(j.c, j.third) }

// One of those that take part in a migration fails, at a step of it: whatever
// becomes of the migration, there is one copy of the machine in the end, and what it
// had told is on its disk. One whose other server failed was never restarted.
func TestMigrationFaults(t *testing.T) {
	root := os.Geteuid() == 0
	// A daemon that was killed has a lease's time to return, on a slow machine too.
	c := harness.Up(t, devcluster.Options{Servers: 3, Netns: root, Settings: &argonv1.Settings{LeaseSeconds: 6}})
	counting(t, c, "3")
	w := c.Watch(port, c.Servers()...)
	counts(c, w, 3)
	t.Run("refused", func(t *testing.T) { refuseMigrations(t, c) })
	for _, fault := range migrationFaults {
		for at, step := range steps {
			if !*everyStep && at != fault.step {
				continue
			}
			ok := t.Run(fault.name+", when "+step.name, func(t *testing.T) {
				if fault.root && !root {
					t.Skip("needs root, to cut links")
				}
				j := depart(t, c)
				j.await(step.at)
				boot := lastBoot(t, w)
				fault.do(t, j)
				if fault.mend != nil {
					j.over(w)
					fault.mend(t, j)
				}
				r := j.over(w)
				t.Logf("from %s to %s: %q, boot %s", j.from.Name, j.to.Name, r.GetFailure(), lastBoot(t, w))
				if now := lastBoot(t, w); fault.there && r.GetFailure() != "" && now != boot {
					t.Errorf("it stayed on %s, and was restarted: boot %s, then %s", j.from.Name, boot, now)
				}
				clocksInOrder(t, w)
			})
			if !ok {
				return
			}
		}
	}
}

// depart gives the order to migrate: to the server that leads, if it can, so that
// the link that is cut is the one to the leader, too.
func depart(t *testing.T, c *harness.Cluster) *journey {
	t.Helper()
	for _, s := range c.Servers() {
		c.Healthy(s, machine)
	}
	from := c.ByName(c.Running(c.S(1), machine))
	i := slices.Index(c.Servers(), from)
	j := &journey{c: c, from: from, to: c.Servers()[(i+1)%3], third: c.Servers()[(i+2)%3]}
	if leaderOf(c, from) == j.third {
		j.to, j.third = j.third, j.to
	}
	j.api = c.API(j.third)
	res, err := client.Call(t.Context(), j.api.Machines.MigrateMachine, &argonv1.MigrateMachineRequest{
		Name: machine, ToServer: j.to.Name, TimeoutSeconds: 8,
	})
	must(t, err)
	j.id = res.GetMachine().GetMachine().GetMigration().GetId()
	return j
}

// await looks all the time until the migration has come to a step, or is over.
func (j *journey) await(at func(*argonv1.Machine, *argonv1.Volume) bool) {
	j.c.T.Helper()
	deadline := time.Now().Add(harness.Patience)
	for time.Now().Before(deadline) {
		m, err := client.Call(j.c.T.Context(), j.api.Machines.GetMachine, &argonv1.GetMachineRequest{Name: machine})
		must(j.c.T, err)
		v, err := client.Call(j.c.T.Context(), j.api.Volumes.GetVolume, &argonv1.GetVolumeRequest{Name: machine})
		must(j.c.T, err)
		record := m.GetMachine().GetMachine()
		if record.GetMigration().GetId() != j.id || at(record, v.GetVolume().GetVolume()) {
			return
		}
	}
	j.c.T.Fatal("the migration does not get anywhere")
}

// over waits until the migration is over and one copy of the machine counts, and
// returns how it ended.
func (j *journey) over(w *harness.Watcher) (r *argonv1.MigrationReport) {
	j.c.T.Helper()
	var alive *devcluster.Server
	for _, s := range j.c.Servers() {
		if now, err := s.Condition(); err == nil && now == "running" {
			alive = s
		}
	}
	j.c.Eventually("the migration is over", func() bool {
		v, err := j.c.Machine(alive, machine)
		r = v.GetMachine().GetLastMigration()
		return err == nil && v.GetMachine().GetMigration() == nil && r.GetId() == j.id
	})
	j.c.Running(alive, machine)
	oneCopy(j.c)
	counts(j.c, w, 3)
	return r
}

// refuseMigrations asks for migrations that can't be, and gives one up.
func refuseMigrations(t *testing.T, c *harness.Cluster) {
	from := c.ByName(c.Running(c.S(1), machine))
	other := c.Other(from.Name)
	third := c.Other(from.Name, other.Name)
	for _, r := range []struct{ says, to string }{
		{"it runs there already", from.Name},
		{`server "nowhere" does not exist`, "nowhere"},
	} {
		if line := c.ArgonFails(other, "machine", "migrate", machine, "--to", r.to); !strings.Contains(line, r.says) {
			t.Errorf("to %s: %s", r.to, line)
		}
	}
	if line := c.ArgonFails(other, "machine", "migrate", machine, "--cancel"); !strings.Contains(line, "is not being migrated") {
		t.Errorf("the end of none: %s", line)
	}
	c.Argon(other, "server", "drain", third.Name, "--yes")
	if line := c.ArgonFails(other, "machine", "migrate", machine, "--to", third.Name); !strings.Contains(line, "drained") {
		t.Errorf("to a drained server: %s", line)
	}
	c.Argon(other, "server", "activate", third.Name)
	c.Argon(other, "machine", "create", "stopped", "--image", "tiny", "--memory", "64MiB", "--stopped")
	if line := c.ArgonFails(other, "machine", "migrate", "stopped"); !strings.Contains(line, "does not run") {
		t.Errorf("a stopped machine: %s", line)
	}
	c.Argon(other, "machine", "rm", "stopped")

	// Two orders, one after the other: the second is told of the first, which is
	// given up, or was faster.
	c.Argon(other, "machine", "migrate", machine, "--to", other.Name, "--no-wait")
	if out, err := other.Exec(t.Context(), "machine", "migrate", machine, "--to", third.Name); err == nil {
		t.Logf("the first order was carried out before the second was given:\n%s", out)
	} else if !strings.Contains(err.Error(), "is being migrated to server "+other.Name) {
		t.Errorf("a second order: %v", err)
	}
	if out, err := other.Exec(t.Context(), "machine", "migrate", machine, "--cancel"); err != nil && !strings.Contains(err.Error(), "too late") &&
		!strings.Contains(err.Error(), "is not being migrated") {
		t.Errorf("cancelled: %v\n%s", err, out)
	}
	c.Eventually("no migration is under way", func() bool {
		m, err := c.Machine(other, machine)
		return err == nil && m.GetMachine().GetMigration() == nil
	})
	oneCopy(c)
}
