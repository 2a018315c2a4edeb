package rpc

import (
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// What a stopped machine printed last is read where it ran last.
func TestReadConsoleLog(t *testing.T) {
	w := newWorld(t)
	for id, m := range map[string]*argonv1.Machine{
		"N": {RanOn: "A"}, "O": {RanOn: "A"}, "P": {}, "Q": {RanOn: "gone"}, "R": {RanOn: "A", ServerId: "B"},
	} {
		m.Meta = &argonv1.Meta{Id: id, Name: "m" + id}
		w.must(w.store.Machines.Create(t.Context(), m))
	}
	for _, tt := range []struct {
		name string
		code connect.Code
		want string
	}{
		{"mN", 0, "bye"},
		{"mO", connect.CodeFailedPrecondition, "nothing is kept"},
		{"mP", connect.CodeFailedPrecondition, "argon machine start mP"},
		{"mQ", connect.CodeFailedPrecondition, "nothing is kept"},
		{"mR", connect.CodeFailedPrecondition, "argon machine console mR"},
		{"nope", connect.CodeNotFound, "nope"},
	} {
		res, err := call(t, w.machines.ReadConsoleLog, &argonv1.ReadConsoleLogRequest{Name: tt.name})
		if tt.code != 0 {
			wantError(t, err, tt.code, tt.want)
		} else if err != nil || string(res.GetData()) != tt.want {
			t.Errorf("%s: %q, %v", tt.name, res.GetData(), err)
		}
	}
}
