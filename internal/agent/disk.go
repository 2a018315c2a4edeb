package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file keeps it in this server's record whether its disk can be used, and
// deletes what had to be left on one that could not.

func (p *plan) planDisk() {
	a := p.agent
	server, is := p.st.Servers[a.ServerID], a.Space.Disk()
	if server == nil {
		return
	}
	p.bad = is.GetProblem() != ""
	if len(server.GetDisks()) != 1 || server.GetDisks()[0].GetPath() != is.GetPath() || server.GetDisks()[0].GetProblem() != is.GetProblem() {
		p.add("disk", job{step: "record disk", run: func(ctx context.Context) error { return a.recordDisk(ctx, server, is) }})
	}
	if p.bad {
		return
	}
	for id, replicas := range a.leftovers {
		for _, r := range replicas {
			p.add(fmt.Sprintf("leftover/%s/%d", id, r), job{step: "delete", run: func(context.Context) error { return a.removeLeftover(id, r) }})
		}
	}
}

func (a *Agent) recordDisk(ctx context.Context, known *argonv1.Server, is *argonv1.Disk) error {
	var was string
	bounded, cancel := recording(ctx)
	defer cancel()
	_, err := a.Store.Servers.Update(bounded, a.ServerID, func(s *argonv1.Server) error {
		was = placement.BadDisk(s)
		if len(s.GetDisks()) == 1 && s.GetDisks()[0].GetPath() == is.GetPath() && was == is.GetProblem() {
			return ErrOvertaken
		}
		is.Since = timestamppb.New(a.Now())
		s.Disks = []*argonv1.Disk{is}
		return nil
	})
	switch {
	case errors.Is(err, ErrOvertaken):
		return err
	case err != nil:
		return fmt.Errorf("record the state of the disk: %w", err)
	}
	a.tell(ctx, diskEvent(known, was, is))
	return nil
}

// diskEvent tells of a disk that fails, or is well again; nil: neither.
func diskEvent(s *argonv1.Server, was string, is *argonv1.Disk) *argonv1.Event {
	e := &argonv1.Event{Kind: "server", SubjectId: s.GetMeta().GetId(), SubjectName: s.GetMeta().GetName()}
	switch {
	case was == "" && is.GetProblem() != "":
		e.Severity, e.Reason = argonv1.Severity_SEVERITY_ERROR, "disk-failed"
		e.Message = fmt.Sprintf("the disk at %s is not used any more: %s; its replicas are made elsewhere", is.GetPath(), is.GetProblem())
	case was != "" && is.GetProblem() == "":
		e.Severity, e.Reason = argonv1.Severity_SEVERITY_INFO, "disk-mended"
		e.Message = fmt.Sprintf("the disk at %s works again", is.GetPath())
	default:
		return nil
	}
	return e
}

// leaveReplica takes a replica off the record that is to be deleted, though its
// disk can't be used: its files are deleted when it can.
func (a *Agent) leaveReplica(ctx context.Context, v *argonv1.Volume, replicaID uint32) error {
	volumeID := v.GetMeta().GetId()
	if err := a.Replicas.Leave(volumeID, replicaID); err != nil {
		return fmt.Errorf("leave replica %d on a disk that failed: %w", replicaID, err)
	}
	a.mu.Lock()
	a.replicas[volumeID] = slices.DeleteFunc(a.replicas[volumeID], func(id uint32) bool { return id == replicaID })
	if !slices.Contains(a.leftovers[volumeID], replicaID) {
		a.leftovers[volumeID] = append(a.leftovers[volumeID], replicaID)
	}
	a.mu.Unlock()
	return a.strikeReplica(ctx, v, replicaID)
}

func (a *Agent) removeLeftover(volumeID string, replicaID uint32) error {
	if err := a.Replicas.RemoveLeftover(volumeID, replicaID); err != nil {
		return fmt.Errorf("delete replica %d, which was left on the disk: %w", replicaID, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leftovers[volumeID] = slices.DeleteFunc(a.leftovers[volumeID], func(id uint32) bool { return id == replicaID })
	if len(a.leftovers[volumeID]) == 0 {
		delete(a.leftovers, volumeID)
	}
	return nil
}
