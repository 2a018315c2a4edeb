package cli

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// What a command that waits for a machine sees, second by second, and how that ends.
func TestWaitForMachine(t *testing.T) {
	begun := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	is := func(state argonv1.MachineState, reason string, change ...func(*argonv1.MachineView)) *argonv1.MachineView {
		v := &argonv1.MachineView{Machine: &argonv1.Machine{
			Meta: &argonv1.Meta{Name: "web"}, Wanted: argonv1.Wanted_WANTED_RUNNING,
			Status: &argonv1.MachineStatus{State: state, Reason: reason, Since: timestamppb.New(begun)},
		}}
		for _, c := range change {
			c(v)
		}
		return v
	}
	const (
		pending  = argonv1.MachineState_MACHINE_STATE_PENDING
		starting = argonv1.MachineState_MACHINE_STATE_STARTING
		running  = argonv1.MachineState_MACHINE_STATE_RUNNING
		failed   = argonv1.MachineState_MACHINE_STATE_FAILED
		stopping = argonv1.MachineState_MACHINE_STATE_STOPPING
	)
	copied := func(line string) func(*argonv1.MachineView) {
		return func(v *argonv1.MachineView) { v.Activity = []string{line} }
	}
	since := func(s int) func(*argonv1.MachineView) {
		return func(v *argonv1.MachineView) {
			v.Machine.Status.Since = timestamppb.New(begun.Add(time.Duration(s) * time.Second))
		}
	}
	wanted := func(w argonv1.Wanted, timeout uint32) func(*argonv1.MachineView) {
		return func(v *argonv1.MachineView) { v.Machine.Wanted, v.Machine.StopTimeoutSeconds = w, timeout }
	}
	type look struct {
		at   int // seconds after the beginning
		view *argonv1.MachineView
	}
	for _, tt := range []struct {
		name  string
		flags waitFlags
		aim   aim
		looks []look
		says  string // empty: it is reached with the last look
	}{
		{"runs", waitFlags{}, toRun(), []look{{0, is(pending, "")}, {1, is(running, "")}}, ""},
		{"a large image comes slowly", waitFlags{}, toRun(), []look{
			{0, is(pending, "its volume web is still being made", copied("1 %"))},
			{110, is(pending, "its volume web is still being made", copied("2 %"))},
			{220, is(pending, "its volume web is still being made", copied("3 %"))},
			{330, is(running, "")},
		}, ""},
		{"an image does not come", waitFlags{}, toRun(), []look{
			{0, is(pending, "its volume web is still being made", copied("1 %"))},
			{119, is(pending, "its volume web is still being made", copied("1 %"))},
			{120, is(pending, "its volume web is still being made", copied("1 %"))},
		}, "still pending, and nothing has changed for 2m0s: its volume web is still being made"},
		{"no longer than that", waitFlags{timeout: time.Minute}, toRun(), []look{
			{0, is(pending, "", copied("1 %"))},
			{60, is(pending, "", copied("99 %"))},
		}, "still pending after 1m0s"},
		{"QEMU dies, and the next one runs", waitFlags{}, toRun(), []look{
			{0, is(starting, "")},
			{1, is(failed, "QEMU has ended", since(1))},
			{2, is(failed, "QEMU has ended", since(1))},
			{3, is(starting, "", since(2))},
			{4, is(failed, "QEMU has ended", since(4))},
			{5, is(running, "")},
		}, ""},
		{"it fails again and again", waitFlags{}, toRun(), []look{
			{1, is(failed, "no firmware", since(1))},
			{2, is(failed, "no firmware", since(2))},
			{4, is(failed, "no firmware", since(4))},
		}, "failed: no firmware"},
		{"it stays failed", waitFlags{}, toRun(), []look{
			{1, is(failed, "no QEMU", since(1))},
			{11, is(failed, "no QEMU", since(1))},
		}, "failed: no QEMU"},
		{"its checkpoint is damaged", waitFlags{}, toRun(), []look{
			{0, is(starting, "")},
			{1, is(stopping, "frame 0 is damaged", wanted(argonv1.Wanted_WANTED_STOPPED, 0))},
		}, "it is to be stopped now: frame 0 is damaged"},
		{"a stop may take its time", waitFlags{}, toStand(), []look{
			{0, is(stopping, "", wanted(argonv1.Wanted_WANTED_STOPPED, 600))},
			{599, is(stopping, "", wanted(argonv1.Wanted_WANTED_STOPPED, 600))},
			{601, is(argonv1.MachineState_MACHINE_STATE_STOPPED, "", wanted(argonv1.Wanted_WANTED_STOPPED, 600))},
		}, ""},
		{"at once", waitFlags{noWait: true}, toRun(), []look{{0, is(failed, "")}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newMachineWait("web", tt.flags, tt.aim, begun)
			for i, l := range tt.looks {
				done, err := w.judge(proto.CloneOf(l.view), begun.Add(time.Duration(l.at)*time.Second))
				last := i == len(tt.looks)-1
				switch {
				case !last && (done || err != nil):
					t.Fatalf("after %d s: %v, %v", l.at, done, err)
				case last && tt.says == "" && (!done || err != nil):
					t.Errorf("in the end: %v, %v", done, err)
				case last && tt.says != "" && (err == nil || !strings.Contains(err.Error(), "machine web: "+tt.says)):
					t.Errorf("in the end: %v, which does not say %q", err, tt.says)
				}
			}
		})
	}
}
