package daemon

import (
	"context"
	"log/slog"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

const (
	newsQueue   = 256
	newsTimeout = 10 * time.Second
)

// news writes events for those who must not wait for the catalog.
type news struct {
	serverID string
	events   *catalog.Events
	log      *slog.Logger
	queue    chan *argonv1.Event
}

func newNews(serverID string, events *catalog.Events, log *slog.Logger) *news {
	return &news{serverID: serverID, events: events, log: log, queue: make(chan *argonv1.Event, newsQueue)}
}

// tell never blocks. When too much happens at once, the rest is only logged.
func (n *news) tell(e *argonv1.Event) {
	e.ServerId = n.serverID
	select {
	case n.queue <- e:
	default:
		n.log.Warn("too many events at once; one was not recorded", "event", e.GetReason(), "subject", e.GetSubjectName(), "message", e.GetMessage())
	}
}

// run writes until ctx ends, and then what is still queued, as far as the
// catalog takes it.
func (n *news) run(ctx context.Context) error {
	for {
		select {
		case e := <-n.queue:
			n.write(ctx, e)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			for {
				select {
				case e := <-n.queue:
					n.write(last, e)
				default:
					return nil
				}
			}
		}
	}
}

func (n *news) write(ctx context.Context, e *argonv1.Event) {
	ctx, cancel := context.WithTimeout(ctx, newsTimeout)
	defer cancel()
	if err := n.events.Append(ctx, e); err != nil {
		n.log.Warn("an event was not recorded", "event", e.GetReason(), "subject", e.GetSubjectName(), "err", err)
	}
}
