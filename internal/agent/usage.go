package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file keeps it in the catalog what lies on this server's disk, and tells
// of a disk that becomes full.

const (
	// measureEvery is how often the disk is looked at, tellAtLeast how long a
	// small change may stay untold.
	measureEvery = 5 * time.Second
	tellAtLeast  = time.Minute
)

func (p *plan) planUsage() {
	a := p.agent
	if p.now.Sub(a.measured) < measureEvery {
		return
	}
	known, server := p.st.Usage[a.ServerID], p.st.Servers[a.ServerID]
	p.add("usage", job{step: "measure", run: func(ctx context.Context) error {
		a.mu.Lock()
		a.measured = a.Now()
		a.mu.Unlock()
		return a.measure(ctx, known, server)
	}})
}

func (a *Agent) measure(ctx context.Context, known *argonv1.Usage, server *argonv1.Server) error {
	u, err := a.Space.Measure()
	if err != nil {
		return fmt.Errorf("measure what is on the disk: %w", err)
	}
	now := a.Now()
	u.ServerId, u.Measured = a.ServerID, timestamppb.New(now)
	a.tell(ctx, a.judge(server, u))
	if !worthTelling(known, u) {
		return nil
	}
	if err := a.Store.PutUsage(ctx, u); err != nil {
		return fmt.Errorf("record what is on the disk: %w", err)
	}
	return nil
}

// judge is the event that goes with what was measured; nil if none does.
func (a *Agent) judge(server *argonv1.Server, u *argonv1.Usage) *argonv1.Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.fill
	a.fill = fillOf(u, placement.Reserve(u.GetTotalBytes()), before)
	return fillEvent(server, before, a.fill, humanize.IBytes(u.GetFreeBytes()))
}

// worthTelling: a change of half a hundredth at once, any within a minute.
func worthTelling(known, now *argonv1.Usage) bool {
	if known == nil || len(known.GetReplicas()) != len(now.GetReplicas()) {
		return true
	}
	// The clock may have been set back in between.
	if now.GetMeasured().AsTime().Sub(known.GetMeasured().AsTime()).Abs() >= tellAtLeast {
		same := proto.CloneOf(now)
		same.Measured = known.GetMeasured()
		return !proto.Equal(known, same)
	}
	for i, r := range now.GetReplicas() {
		k := known.GetReplicas()[i]
		if k.GetVolumeId() != r.GetVolumeId() || k.GetReplicaId() != r.GetReplicaId() ||
			far(k.GetUsedBytes(), r.GetUsedBytes()) || far(k.GetSnapshotBytes(), r.GetSnapshotBytes()) ||
			far(k.GetDetachedBytes(), r.GetDetachedBytes()) {
			return true
		}
	}
	return far(known.GetImagesBytes(), now.GetImagesBytes()) || far(known.GetFreeBytes(), now.GetFreeBytes()) ||
		known.GetTotalBytes() != now.GetTotalBytes()
}

func far(a, b uint64) bool { return max(a, b)-min(a, b) > max(a, b)/200 }

// fill is how full this server's disk is, in the words of its events.
type fill uint8

const (
	fillUnknown fill = iota
	roomy
	low
	full
)

// fillOf judges what was measured. keep is what placement keeps free.
func fillOf(u *argonv1.Usage, keep uint64, before fill) fill {
	free := u.GetFreeBytes()
	// It takes a little more room to call it roomy again, so that a disk at the
	// border makes no stream of events.
	if before == low || before == full {
		keep += keep / 10
	}
	switch {
	case u.GetTotalBytes() == 0:
		return before
	case free <= 2*u.GetReserveBytes():
		return full
	case free < keep:
		return low
	}
	return roomy
}

// fillEvent tells of a change; nil if there is nothing to tell.
func fillEvent(s *argonv1.Server, before, now fill, free string) *argonv1.Event {
	e := &argonv1.Event{Kind: "server", SubjectId: s.GetMeta().GetId(), SubjectName: s.GetMeta().GetName()}
	switch {
	case now == before || now == roomy && before == fillUnknown:
		return nil
	case now == full:
		e.Severity, e.Reason = argonv1.Severity_SEVERITY_ERROR, "disk-full"
		e.Message = fmt.Sprintf("its disk is full but for %s: writers are about to wait; remove snapshots or volumes, or add disk", free)
	case now == low && before != full:
		e.Severity, e.Reason = argonv1.Severity_SEVERITY_WARNING, "disk-low"
		e.Message = fmt.Sprintf("its disk has %s free, less than its reserve: it gets no new replicas; remove snapshots or volumes, or add disk", free)
	case now == roomy:
		e.Severity, e.Reason = argonv1.Severity_SEVERITY_INFO, "disk-roomy"
		e.Message = fmt.Sprintf("its disk has %s free again", free)
	default:
		return nil
	}
	return e
}
