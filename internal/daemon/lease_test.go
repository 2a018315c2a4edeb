package daemon

import (
	"testing"
	"time"
)

func TestGate(t *testing.T) {
	now := time.Duration(100)
	g := newGate(func() time.Duration { return now })
	want := func(revision int64, allowed bool) {
		t.Helper()
		if g.Allowed(revision) != allowed {
			t.Errorf("at %d, revision %d: allowed is %v", now, revision, !allowed)
		}
	}
	want(1, false) // no lease
	g.renewed(110)
	want(1, false) // nothing read in it
	<-g.began
	g.opened(1, 5)
	want(4, false)
	want(5, true)
	now = 105
	g.renewed(115)
	now = 112
	want(5, true) // renewed in time: still the same lease
	if len(g.began) != 0 {
		t.Error("a renewal counted as a beginning")
	}
	now = 115
	want(9, false) // it has ended
	now = 120
	g.renewed(130)
	want(9, false) // a new one: others may have taken over
	<-g.began
	g.opened(1, 10) // a reading of the lease before
	want(10, false)
	g.opened(2, 10)
	want(9, false)
	want(10, true)
}
