package mirror

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// aCore serves a volume whose replica 1 is in sync and in reach.
func aCore(t *testing.T, v *argonv1.Volume) *Core {
	t.Helper()
	v.Attachment = &argonv1.Attachment{ServerId: "a"}
	cfg := DefaultConfig()
	cfg.Epoch, cfg.Size, cfg.Clean = v.GetEpoch(), int64(v.GetSizeBytes()), true
	c := NewCore(cfg, v)
	c.Start(0)
	c.PeerUp(0, 1, 1, Info{Incarnation: 1, Health: Good})
	if !c.Serving() {
		t.Fatal("it does not serve")
	}
	return c
}

// sent is the first message with a verb among effects.
func sent(effects []Effect, verb Verb) (Effect, bool) {
	for _, e := range effects {
		if e.Send && e.Verb == verb {
			return e, true
		}
	}
	return Effect{}, false
}

// A replica that grew before it is asked for the checksum of what was the last
// region would have to refuse, and count as failed.
func TestGrowthWaitsForChecksums(t *testing.T) {
	v := aVolume(inSyncState)
	v.SizeBytes = 512
	c := aCore(t, v)
	v = proto.CloneOf(v)
	v.Scrub = &argonv1.Scrub{Wanted: 1}
	listed, _ := sent(c.RecordChanged(0, v), VerbChanged)
	asked, ok := sent(c.Reply(0, 1, 1, listed.ID, Done, Info{}, nil), VerbSums)
	if !ok {
		t.Fatal("no scrub began")
	}
	v = proto.CloneOf(v)
	v.WantedBytes = 1 << 20
	if _, early := sent(c.RecordChanged(0, v), VerbResize); early {
		t.Error("the replica was told to grow while it was asked for checksums")
	}
	if _, ok := sent(c.Reply(0, 1, 1, asked.ID, Done, Info{}, nil), VerbResize); !ok {
		t.Error("the replica was not told to grow after that")
	}
}

// Nobody waits for a growth: the volume serves on, and grows when there is room.
func TestGrowthWithoutRoom(t *testing.T) {
	v := aVolume(inSyncState)
	c := aCore(t, v)
	v = proto.CloneOf(v)
	v.WantedBytes = 2 << 20
	asked, _ := sent(c.RecordChanged(0, v), VerbResize)
	told := ""
	for _, e := range c.Reply(0, 1, 1, asked.ID, Full, Info{}, nil) {
		if e.Note != nil {
			told = e.Note.Reason
		}
	}
	if got := c.Status().GetCondition(); got != "serving" || told != "growth-delayed" {
		t.Errorf("the volume is %s, and the operator told of %q", got, told)
	}
	if _, ok := sent(c.Tick(c.cfg.RetryAfter), VerbResize); !ok {
		t.Error("it is not tried again")
	}
}

// The next holder knows that a replica was emptied by a base that is no later than
// the one that it was emptied with.
func TestCopyWaitsForTheRecordOfTheLastOne(t *testing.T) {
	v := aVolume(inSyncState, behindState)
	v.Replicas[1].EqualBefore = 2
	c := aCore(t, v)
	c.facts = []fact{{copied: 2, to: 8 << 20, base: 3}}
	effects := c.PeerUp(0, 2, 1, Info{Incarnation: 1, Health: Failed})
	if _, early := sent(effects, VerbBeginSync); early {
		t.Error("a copy began with what the record says no longer")
	}
	var p *Proposal
	for _, e := range effects {
		if e.Propose != nil {
			p = e.Propose
		}
	}
	if p == nil {
		t.Fatal("nothing was proposed")
	}
	v = proto.CloneOf(v)
	if err := Apply(v, *p, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if e, ok := sent(c.Committed(0, v), VerbBeginSync); !ok || e.Base != 3 {
		t.Errorf("a copy began: %v, with base %d, want 3", ok, e.Base)
	}
}

// A copy that cannot go on is tried again every second; the operator reads of it
// once, and of what comes after it.
func TestACopyThatFailsIsToldOnce(t *testing.T) {
	c := aCore(t, aVolume(inSyncState, behindState))
	effects := c.PeerUp(0, 2, 1, Info{Incarnation: 1, Health: Failed})
	told := 0
	for now := time.Duration(0); now < 10*c.cfg.RetryAfter; now += c.cfg.RetryAfter {
		begin, ok := sent(effects, VerbBeginSync)
		if !ok {
			t.Fatalf("no copy began after %s", now)
		}
		for _, e := range c.Reply(now, 2, 1, begin.ID, Broken, Info{}, errors.New("no")) {
			if e.Note != nil && e.Note.Reason == "resync-failed" {
				told++
			}
		}
		effects = c.Tick(now + c.cfg.RetryAfter)
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
}
