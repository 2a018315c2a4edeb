package controller

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

// TestRunTellsOfLostServers: one that is lost is told of once, and so is its
// return, though its lease is of a clock that is hours ahead.
func TestRunTellsOfLostServers(t *testing.T) {
	cli := catalogtest.Start(t)
	ctx := t.Context()
	store, err := catalog.Create(ctx, cli, &argonv1.Cluster{Id: "c"})
	if err != nil {
		t.Fatal(err)
	}
	lease := func(id string) clientv3.LeaseID {
		t.Helper()
		l, err := cli.Grant(ctx, 3600)
		if err != nil {
			t.Fatal(err)
		}
		ahead := timestamppb.New(time.Now().Add(2 * time.Hour))
		if err := store.PutLease(ctx, l.ID, &argonv1.Lease{ServerId: id, Since: ahead}); err != nil {
			t.Fatal(err)
		}
		return l.ID
	}
	leases := map[string]clientv3.LeaseID{}
	for _, id := range []string{"a", "b"} {
		s := &argonv1.Server{Meta: &argonv1.Meta{Id: id, Name: id, Created: timestamppb.New(time.Now().Add(2 * time.Hour))}}
		if err := store.Servers.Create(ctx, s); err != nil {
			t.Fatal(err)
		}
		leases[id] = lease(id)
	}
	view := catalog.NewView(store, slog.New(slog.DiscardHandler))
	var passed atomic.Int64 // what the test lets pass
	observer := NewObserver(view, func() time.Time { return time.Now().Add(time.Duration(passed.Load())) })
	running, stop := context.WithCancel(context.Background())
	var loops sync.WaitGroup
	defer loops.Wait()
	defer stop()
	loops.Go(func() { _ = view.Run(running) })
	if err := view.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	observer.look()
	passed.Store(int64(time.Minute))
	loops.Go(func() {
		_ = Run(running, Options{ServerID: "a", Store: store, Observer: observer, Tick: 10 * time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	})
	revoke := func() {
		t.Helper()
		if _, err := cli.Revoke(ctx, leases["b"]); err != nil {
			t.Fatal(err)
		}
	}
	steps := []struct {
		reason string
		then   func()
	}{
		{"server-lost", func() { leases["b"] = lease("b") }},
		{"server-returned", revoke},
		{"server-lost", nil},
	}
	done := errors.New("all was told")
	revoke()
	err = store.Events.Watch(ctx, 10, catalog.EventFilter{Kind: "server", Name: "b"}, nil, func(e *argonv1.Event) error {
		if e.GetReason() != steps[0].reason {
			t.Errorf("event %s, want %s", e.GetReason(), steps[0].reason)
		}
		then := steps[0].then
		if steps = steps[1:]; len(steps) == 0 {
			return done
		}
		then()
		return nil
	})
	if !errors.Is(err, done) {
		t.Fatal(err)
	}
}
