package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/cluster"
)

// A join that fails after this server was admitted leaves a member, which serves
// as one; a join that fails before leaves nothing, and can be tried again.
func TestHalfJoined(t *testing.T) {
	member, err := cluster.Open(cluster.Options{
		Dir: t.TempDir(), Address: fmt.Sprintf("127.%d.%d.1", 64+rand.IntN(128), rand.IntN(256)),
		Ports: cluster.Ports{API: 7440, Data: 7441, Peer: 7442, Etcd: 7443}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	s := &server{member: member, listening: make(chan struct{}), configured: make(chan struct{}), ready: make(chan struct{}), stopped: make(chan struct{})}
	close(s.listening)
	failed := errors.New("the catalog can't be reached yet")
	join := func(do func() error) error {
		_, err := configure(t.Context(), s, "", "", func(string) (*argonv1.JoinResponse, error) { return nil, errors.Join(do(), failed) })
		return err
	}
	if err := join(func() error { return nil }); !errors.Is(err, failed) || isClosed(s.configured) {
		t.Errorf("not admitted: %v, configured %v", err, isClosed(s.configured))
	}
	for what, do := range []func() error{
		func() error {
			_, err := member.Init(t.Context(), &argonv1.InitRequest{ClusterName: "test", ServerName: "s1"})
			t.Cleanup(func() { _ = member.Stop() })
			return err
		},
		func() error { return cluster.ErrConfigured },
	} {
		if err := join(do); !errors.Is(err, failed) || !isClosed(s.configured) {
			t.Errorf("step %d: %v, configured %v", what, err, isClosed(s.configured))
		}
	}
}
