package agent

import (
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// A server that stops ends its guests, and what is wanted of the machine stays:
// the next daemon starts it again.
func TestShutDown(t *testing.T) {
	w := newWorld(t, "a")
	w.create(1, "a")
	w.runs(0)
	h := w.hosts["a"]
	h.agent.ShutDown(t.Context())
	if n := w.guests(); n != 0 {
		t.Fatalf("%d guests run", n)
	}
	st := w.until("detached", func(st *catalog.State) bool { return st.Volumes["v"].GetAttachment() == nil })
	if now := st.Machines["m"]; now.GetWanted() != argonv1.Wanted_WANTED_RUNNING || now.GetMove() != nil || now.GetServerId() != "a" {
		t.Errorf("the record is %v", now)
	}
	h.end()
	h.start()
	w.until("running again", func(*catalog.State) bool { return w.guests() == 1 })
}
