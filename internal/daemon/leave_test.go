package daemon

import (
	"context"
	"log/slog"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

// A server that stops waits for machines on their way, however long nothing else
// happens, and not for those that have nowhere to go.
func TestAwaitMoves(t *testing.T) {
	for _, tt := range []struct {
		name    string
		machine *argonv1.Machine
		waits   bool
	}{
		{"on its way", &argonv1.Machine{ServerId: "a", Placement: 1, Migration: &argonv1.Migration{ToServerId: "b", Placement: 2}}, true},
		{"shut down to start elsewhere", &argonv1.Machine{ServerId: "a", Placement: 1, Move: &argonv1.Move{FromServerId: "a", Placement: 1}}, true},
		{"nowhere to go", &argonv1.Machine{ServerId: "a", Placement: 1}, false},
		{"elsewhere", &argonv1.Machine{ServerId: "b", Placement: 1, Migration: &argonv1.Migration{ToServerId: "c", Placement: 2}}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			store, err := catalog.Create(ctx, catalogtest.Start(t), &argonv1.Cluster{Id: "c", Name: "test"})
			if err != nil {
				t.Fatal(err)
			}
			tt.machine.Meta = &argonv1.Meta{Id: "m", Name: "m"}
			if err := store.Machines.Create(ctx, tt.machine); err != nil {
				t.Fatal(err)
			}
			view := catalog.NewView(store, slog.New(slog.DiscardHandler))
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_ = view.Run(ctx)
			}()
			defer func() {
				cancel()
				<-ended
			}()
			for {
				changed := view.Changed()
				if st := view.State(); st != nil && st.Machines["m"] != nil {
					break
				}
				<-changed
			}
			// Where it waits, only the end of its time ends it.
			waiting, stop := context.WithCancel(ctx)
			defer stop()
			if tt.waits {
				waiting, stop = context.WithTimeout(ctx, 300*time.Millisecond)
				defer stop()
			}
			awaitMoves(waiting, view, "a", 10*time.Millisecond)
			if waited := waiting.Err() != nil; waited != tt.waits {
				t.Errorf("waited to the end of its time: %v, want %v", waited, tt.waits)
			}
		})
	}
}
