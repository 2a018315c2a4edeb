package daemon

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// What carries a state breaks when its migration is given up, and so ends the wait
// of who sends.
func TestLineEndsWithItsContext(t *testing.T) {
	c, _ := receiver(t)
	there, far := net.Pipe()
	defer far.Close()
	c.dial = func(context.Context, string) (net.Conn, error) { return there, nil }
	go func() {
		var asked [1 + 3]byte
		_, _ = io.ReadFull(far, asked[:])
		_, _ = far.Write([]byte{stateReady})
	}()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	line, err := c.Open(ctx, "x", "m-4")
	if err != nil {
		t.Fatal(err)
	}
	defer line.Close()
	sent := make(chan error, 1)
	go func() {
		for { // nobody takes it
			if _, err := line.Write(make([]byte, 1<<20)); err != nil {
				sent <- err
				return
			}
		}
	}()
	cancel()
	if err := <-sent; err == nil {
		t.Error("all was taken")
	}
}

// receiver is the carrier of server b, which machine m of server a is on its way
// to. Its view of the catalog is empty until follow.
func receiver(t *testing.T) (c *carrier, follow func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	store, err := catalog.Create(ctx, catalogtest.Start(t), &argonv1.Cluster{Id: "c", Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	err = store.Machines.Create(ctx, &argonv1.Machine{
		Meta: &argonv1.Meta{Id: "m", Name: "m"}, ServerId: "a", Placement: 3,
		Migration: &argonv1.Migration{Id: "i", ToServerId: "b", Placement: 4, Phase: argonv1.MigrationPhase_MIGRATION_PHASE_COPYING},
	})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "carrier-") // paths of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	view := catalog.NewView(store, log)
	c = newCarrier("b", view, paths{dir: dir, runDir: filepath.Join(dir, "run")}, nil, log)
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		c.close()
		_ = os.RemoveAll(dir)
	})
	return c, func() { wg.Go(func() { _ = view.Run(ctx) }) }
}

// A guest's state comes before this server has seen that it waits for it; and one
// that nobody waits for.
func TestStateIsAccepted(t *testing.T) {
	c, follow := receiver(t)
	socket := hypervisor.IncomingSocket(c.paths.machine("m-4"))
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, tt := range []struct {
		from, guest string
		want        byte
	}{{"a", "m-4", stateReady}, {"z", "m-4", stateRefused}, {"a", "m-3", stateRefused}, {"a", "x-4", stateRefused}} {
		here, there := net.Pipe()
		answer := make(chan byte, 1)
		go func() {
			_, _ = there.Write(append([]byte{byte(len(tt.guest))}, tt.guest...))
			if follow != nil {
				follow()
				follow = nil
			}
			var got [1]byte
			_, _ = io.ReadFull(there, got[:])
			answer <- got[0]
		}()
		guest, err := c.accept(t.Context(), here, tt.from)
		if got := <-answer; got != tt.want || (err == nil) != (tt.want == stateReady) {
			t.Errorf("state of %s from %s: answer %d, %v", tt.guest, tt.from, got, err)
		}
		if guest != nil {
			_ = guest.Close()
		}
		_, _ = here.Close(), there.Close()
	}
}
