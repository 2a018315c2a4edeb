package cli

import (
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// Nobody waits for a machine that has moved and will never say that it goes on.
func TestSettled(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*argonv1.Machine)
		want   bool
	}{
		"it is about to go on":        {func(*argonv1.Machine) {}, false},
		"it goes on":                  {func(m *argonv1.Machine) { m.LastMigration.Resumed = timestamppb.Now() }, true},
		"it was stopped":              {func(m *argonv1.Machine) { m.Wanted = argonv1.Wanted_WANTED_STOPPED }, true},
		"it is started elsewhere":     {func(m *argonv1.Machine) { m.Placement = 5 }, true},
		"it has no server any more":   {func(m *argonv1.Machine) { m.Status.State = argonv1.MachineState_MACHINE_STATE_PENDING }, true},
		"its disk is full over there": {func(m *argonv1.Machine) { m.Status.State = argonv1.MachineState_MACHINE_STATE_PAUSED }, true},
	} {
		m := &argonv1.Machine{
			Wanted: argonv1.Wanted_WANTED_RUNNING, Placement: 4, LastMigration: &argonv1.MigrationReport{Id: "i"},
			Status: &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_RUNNING, Placement: 4},
		}
		c.change(m)
		if got := settled(m); got != c.want {
			t.Errorf("%s: settled is %v", name, got)
		}
	}
}
