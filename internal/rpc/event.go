package rpc

import (
	"context"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// defaultEvents is how many are listed when no number was given.
const defaultEvents = 100

type eventService struct{ *API }

func (s eventService) ListEvents(ctx context.Context, req *connect.Request[argonv1.ListEventsRequest]) (*connect.Response[argonv1.ListEventsResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	if _, err := p.fresh(ctx); err != nil {
		return nil, err
	}
	m := req.Msg
	limit := int(m.GetLimit())
	if limit == 0 {
		limit = defaultEvents
	}
	of, err := p.eventsOf(m.GetKind(), m.GetName(), m.GetServer())
	if err != nil {
		return nil, err
	}
	if m.GetSince() != nil {
		of.Since = m.GetSince().AsTime()
	}
	if m.GetUntil() != nil {
		of.Until = m.GetUntil().AsTime()
	}
	events, err := p.Store.Events.List(ctx, min(limit, catalog.MaxEvents), of)
	return answer(&argonv1.ListEventsResponse{Events: events}, err)
}

func (s eventService) WatchEvents(ctx context.Context, req *connect.Request[argonv1.WatchEventsRequest], stream *connect.ServerStream[argonv1.WatchEventsResponse]) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	if _, err := p.fresh(ctx); err != nil {
		return err
	}
	m := req.Msg
	of, err := p.eventsOf(m.GetKind(), m.GetName(), m.GetServer())
	if err != nil {
		return err
	}
	backlog := int(min(m.GetBacklog(), catalog.MaxEvents))
	// So that the caller knows that what happens from now on is new.
	begun := func() error { return stream.Send(nil) }
	return p.Store.Events.Watch(ctx, backlog, of, begun, func(e *argonv1.Event) error {
		return stream.Send(&argonv1.WatchEventsResponse{Event: e})
	})
}

func (p *Parts) eventsOf(kind, name, server string) (catalog.EventFilter, error) {
	of := catalog.EventFilter{Kind: kind, Name: name}
	if server != "" {
		s, ok := byName(p.View.State().Servers, server)
		if !ok {
			return of, notFound("server", server)
		}
		of.ServerID = s.GetMeta().GetId()
	}
	return of, nil
}

// tell appends an event; that it can't be told does not undo what happened.
func (p *Parts) tell(ctx context.Context, severity argonv1.Severity, kind, id, name, reason, message string) {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), catalogTimeout)
	defer cancel()
	err := p.Store.Events.Append(bounded, &argonv1.Event{
		Severity: severity, Kind: kind, SubjectId: id, SubjectName: name,
		ServerId: p.ServerID, Reason: reason, Message: message,
	})
	if err != nil {
		p.Log.Warn("an event was not recorded", "event", reason, "err", err)
	}
}
