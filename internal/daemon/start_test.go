package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/cluster"
)

// managerGuard keeps what the service manager would be told.
type managerGuard struct {
	Guard
	told chan string
}

func (g managerGuard) Status(_ context.Context, serving bool, text string) error {
	g.told <- fmt.Sprint(serving, " ", text)
	return nil
}

// A server waits while its clock is wrong, either way, and goes on when it is set.
func TestWaitsForItsClock(t *testing.T) {
	o := cluster.Options{
		Dir: t.TempDir(), Address: fmt.Sprintf("127.%d.%d.1", 64+rand.IntN(128), rand.IntN(256)),
		Ports: cluster.Ports{API: 7440, Data: 7441, Peer: 7442, Etcd: 7443}, Log: slog.New(slog.DiscardHandler),
	}
	made, err := cluster.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := made.CheckClock(); err != nil {
		t.Errorf("of no cluster yet: %v", err)
	}
	if _, err := made.Init(t.Context(), &argonv1.InitRequest{ClusterName: "test", ServerName: "s1"}); err != nil {
		t.Fatal(err)
	}
	if err := made.Stop(); err != nil {
		t.Fatal(err)
	}
	var wrong atomic.Int64
	o.Now = func() time.Time { return time.Now().Add(time.Duration(wrong.Load())) }
	m, err := cluster.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	for name, by := range map[string]time.Duration{"as after a reset": -20 * 365 * 24 * time.Hour, "far ahead": 50 * 365 * 24 * time.Hour} {
		wrong.Store(int64(by))
		guard := managerGuard{told: make(chan string, 1)}
		server := &Options{Guard: guard, Log: slog.New(slog.DiscardHandler)}
		done := make(chan error, 1)
		go func() { done <- server.await(t.Context(), m.CheckClock) }()
		select {
		case told := <-guard.told:
			if !strings.HasPrefix(told, "false waits: ") || !strings.Contains(told, "set the clock") {
				t.Errorf("%s: told %q", name, told)
			}
		case err := <-done:
			t.Fatalf("%s: it did not wait: %v", name, err)
		}
		wrong.Store(0)
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMayPass(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{unix.ENOSPC, true},
		{unix.EROFS, true},
		{cluster.ErrClock, true},
		{errInUse, true},
		{unix.EACCES, false},
		{cluster.ErrRemoved, false},
		{cluster.ErrLayout, false},
	} {
		if got := mayPass(fmt.Errorf("making it: %w", errors.Join(tt.err, errors.New("and more")))); got != tt.want {
			t.Errorf("%v: %v", tt.err, got)
		}
	}
}
