package daemon

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

const (
	// usageEvery is how often this server looks at what it has and uses, and
	// usageAtLeast how often it tells even when little has changed.
	usageEvery   = 5 * time.Second
	usageAtLeast = time.Minute
)

// reportUsage keeps this server's record true about what it has.
func (s *server) reportUsage(ctx context.Context, m *memberParts) error {
	tick := time.NewTicker(usageEvery)
	defer tick.Stop()
	var told time.Time
	for {
		if err := s.tellUsage(ctx, m, time.Since(told) >= usageAtLeast); err == nil {
			told = time.Now()
		} else if ctx.Err() == nil && !isUnchanged(err) {
			s.Log.Warn("what this server uses was not recorded", "err", err)
		}
		select {
		case <-tick.C:
		case <-m.closed.changed:
		case <-s.ballast.changed:
		case <-ctx.Done():
			return nil
		}
	}
}

func isUnchanged(err error) bool { return err == catalog.ErrUnchanged }

// tellUsage returns catalog.ErrUnchanged when there is nothing to tell.
func (s *server) tellUsage(ctx context.Context, m *memberParts, anyway bool) error {
	capacity, used, err := s.measure()
	if err != nil {
		return err
	}
	known := m.view.State().Servers[s.member.ID()]
	if known == nil {
		return catalog.ErrUnchanged
	}
	closed, problem := m.closed.list(), s.ballast.problem()
	news := usageNews(known, capacity, used, s.Version()) ||
		known.GetContainment() != s.Containment || known.GetConfinement() != s.Confinement ||
		known.GetClosedNetwork() != s.ClosedNetwork || known.GetDirectoryProblem() != problem ||
		!slices.EqualFunc(known.GetClosedPorts(), closed, func(a, b *argonv1.ClosedPort) bool { return proto.Equal(a, b) })
	if !news && (!anyway || proto.Equal(known.GetUsed(), used)) {
		return catalog.ErrUnchanged
	}
	ctx, cancel := context.WithTimeout(ctx, usageEvery)
	defer cancel()
	was := ""
	_, err = m.store.Servers.Update(ctx, s.member.ID(), func(r *argonv1.Server) error {
		was, r.DirectoryProblem = r.GetDirectoryProblem(), problem
		r.Capacity, r.Used, r.Version = capacity, used, s.Version()
		r.Containment, r.Confinement, r.ClosedNetwork, r.ClosedPorts = s.Containment, s.Confinement, s.ClosedNetwork, closed
		return nil
	})
	if err != nil {
		return fmt.Errorf("writing this server's record: %w", err)
	}
	if e := roomEvent(known, was, problem); e != nil {
		m.news.tell(e)
	}
	return nil
}

// roomEvent tells of a directory that is full, or has room again; nil: neither.
func roomEvent(s *argonv1.Server, was, is string) *argonv1.Event {
	e := &argonv1.Event{Kind: "server", SubjectId: s.GetMeta().GetId(), SubjectName: s.GetMeta().GetName()}
	switch {
	case was == "" && is != "":
		e.Severity, e.Reason = argonv1.Severity_SEVERITY_ERROR, "directory-full"
		e.Message = is + ": the catalog there lives on what was kept for it; free some space"
	case was != "" && is == "":
		e.Severity, e.Reason, e.Message = argonv1.Severity_SEVERITY_INFO, "directory-roomy", "its file system has room again"
	default:
		return nil
	}
	return e
}

// usageNews tells whether the record is wrong by more than a hundredth.
func usageNews(known *argonv1.Server, capacity, used *argonv1.Resources, version string) bool {
	return known.GetCapacity() == nil || known.GetVersion() != version ||
		differs(capacity, known.GetCapacity(), capacity) || differs(capacity, known.GetUsed(), used)
}
