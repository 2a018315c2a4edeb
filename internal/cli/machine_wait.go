package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// This file waits for machines to be as they were asked to be.

// waitFlags say whether a command returns before what it asked for is true. A
// timeout of 0 is for as long as there is progress.
type waitFlags struct {
	noWait  bool
	timeout time.Duration
}

const (
	// stallTime is how long a command waits for a machine of which nothing changes.
	stallTime = 2 * time.Minute
	// mostFailures is how many failures in a row are enough, and failingTime how
	// long one may last: what has failed is tried again by the cluster, first after
	// a second, and the next attempt may be the one that works.
	mostFailures = 3
	failingTime  = 10 * time.Second
	// pollEvery is how often a waiting command looks.
	pollEvery = 200 * time.Millisecond
)

// add is for commands that wait for as long as there is progress.
func (w *waitFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&w.noWait, "no-wait", false, "return at once")
	cmd.Flags().DurationVar(&w.timeout, "timeout", 0, "wait no longer than this (default: while there is progress)")
}

// addBounded is for those that don't.
func (w *waitFlags) addBounded(cmd *cobra.Command, timeout time.Duration) {
	cmd.Flags().BoolVar(&w.noWait, "no-wait", false, "return at once")
	cmd.Flags().DurationVar(&w.timeout, "timeout", timeout, "wait no longer than this")
}

// aim is what a command waits for. Once something else is wanted of the machine
// nobody works at it any more.
type aim struct {
	reached func(*argonv1.Machine) bool
	wanted  argonv1.Wanted
}

func toRun() aim { return aim{isRunning, argonv1.Wanted_WANTED_RUNNING} }

// toRunAfter is toRun for one that is to be started again.
func toRunAfter(placement uint64) aim {
	return aim{func(m *argonv1.Machine) bool { return m.GetPlacement() > placement && isRunning(m) }, argonv1.Wanted_WANTED_RUNNING}
}

func toStand() aim { return aim{isStopped, argonv1.Wanted_WANTED_STOPPED} }

func isRunning(m *argonv1.Machine) bool {
	return m.GetStatus().GetState() == argonv1.MachineState_MACHINE_STATE_RUNNING &&
		m.GetStatus().GetPlacement() == m.GetPlacement()
}

func isStopped(m *argonv1.Machine) bool {
	return m.GetStatus().GetState() == argonv1.MachineState_MACHINE_STATE_STOPPED
}

// waitAndPrint shows the machine once it is as wanted.
func (a *app) waitAndPrint(ctx context.Context, c *client.Client, name string, wait waitFlags, want aim, f format) error {
	p := a.startProgress("machine " + name)
	v, err := pollMachine(ctx, c, name, wait, want, p.Set)
	p.Stop()
	if err != nil {
		return err
	}
	return a.printMachine(f, v)
}

// pollMachine looks until the machine is as wanted, or there is no use in waiting.
func pollMachine(ctx context.Context, c *client.Client, name string, wait waitFlags, want aim, say func(string)) (*argonv1.MachineView, error) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	w := newMachineWait(name, wait, want, time.Now())
	for {
		res, err := client.Call(ctx, c.Machines.GetMachine, &argonv1.GetMachineRequest{Name: name})
		if err != nil {
			return nil, err
		}
		v := res.GetMachine()
		done, err := w.judge(v, time.Now())
		if done || err != nil {
			return v, err
		}
		say(howItDoes(v))
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}

// howItDoes is a line about a machine.
func howItDoes(v *argonv1.MachineView) string {
	m := v.GetMachine()
	details := v.GetActivity()
	if reason := m.GetStatus().GetReason(); reason != "" {
		details = append([]string{reason}, details...)
	}
	line := fmt.Sprintf("machine %s: %s", m.GetMeta().GetName(), machineState(m).text)
	if len(details) > 0 {
		line += " (" + strings.Join(details, "; ") + ")"
	}
	return line
}

// machineWait is a command's wait for a machine: what it has seen, and since when.
type machineWait struct {
	name  string
	flags waitFlags
	aim   aim
	begun time.Time
	// looks is what was seen last, and changed when that was new.
	looks   string
	changed time.Time
	// failures counts those in a row. failing is when the last one was seen first,
	// and failedAt what its record says of that.
	failures          int
	failing, failedAt time.Time
}

func newMachineWait(name string, flags waitFlags, want aim, now time.Time) *machineWait {
	return &machineWait{name: name, flags: flags, aim: want, begun: now, changed: now}
}

// judge tells whether the wait is over, and why in vain.
func (w *machineWait) judge(v *argonv1.MachineView, now time.Time) (done bool, err error) {
	m := v.GetMachine()
	if w.flags.noWait || w.aim.reached(m) {
		return true, nil
	}
	reason := firstOf(m.GetStatus().GetReason(), "see `argon events --kind machine --name "+w.name+"`")
	if m.GetWanted() != w.aim.wanted {
		return false, fmt.Errorf("machine %s: it is to be %s now: %s", w.name, enumWord(m.GetWanted(), "WANTED_"), reason)
	}
	if w.fails(m.GetStatus(), now) {
		return false, fmt.Errorf("machine %s: failed: %s", w.name, reason)
	}
	if looks := fmt.Sprint(howItDoes(v), m.GetPlacement(), m.GetWake().GetChecked()); looks != w.looks {
		w.looks, w.changed = looks, now
	}
	stall := stallTime
	if w.aim.wanted == argonv1.Wanted_WANTED_STOPPED {
		stall += time.Duration(m.GetStopTimeoutSeconds()) * time.Second
	}
	state := machineState(m).text
	switch {
	case w.flags.timeout > 0 && now.Sub(w.begun) >= w.flags.timeout:
		return false, fmt.Errorf("machine %s: still %s after %v: %s", w.name, state, w.flags.timeout, reason)
	case w.flags.timeout == 0 && now.Sub(w.changed) >= stall:
		return false, fmt.Errorf("machine %s: still %s, and nothing has changed for %v: %s", w.name, state, stall, reason)
	}
	return false, nil
}

// fails tells whether it has failed often enough, or for long enough.
func (w *machineWait) fails(s *argonv1.MachineStatus, now time.Time) bool {
	if s.GetState() != argonv1.MachineState_MACHINE_STATE_FAILED {
		return false
	}
	if at := s.GetSince().AsTime(); w.failures == 0 || !at.Equal(w.failedAt) {
		w.failures++
		w.failing, w.failedAt = now, at
	}
	return w.failures >= mostFailures || now.Sub(w.failing) >= failingTime
}
