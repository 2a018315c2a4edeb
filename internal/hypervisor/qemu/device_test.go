package qemu

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/volume/nbd"
	"github.com/argon-cluster/argon/internal/volume/volumetest"
)

// A guest is given a disk and a card. One that knows nothing of hot-plugging lets go
// of neither, and goes on with both; it can be asked again. test/e2e has one that
// does let go.
func TestDevices(t *testing.T) {
	w := newWorld(t)
	more := volumetest.New(2<<20, 1)
	defer more.Close()
	d := hypervisor.Disk{Slot: 4, Socket: filepath.Join(w.dir, "more.nbd"), Export: "more", Serial: "s2"}
	s, err := nbd.Serve(t.Context(), nbd.Options{SocketPath: d.Socket, Device: more, Export: d.Export, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	g := w.start().(*guest)
	c := listen(t, g)
	c.hear("booted")
	has := func(disks, networks []int) {
		t.Helper()
		got, err := g.Devices(t.Context())
		if err != nil || !slices.Equal(got.Disks, disks) || !slices.Equal(got.Networks, networks) {
			t.Errorf("it has %v, %v; want disks %v and cards %v", got, err, disks, networks)
		}
	}
	has([]int{0}, []int{0})
	card := hypervisor.Network{Slot: 2, MAC: "52:54:00:00:00:07"}
	if err := errors.Join(g.AddDisk(t.Context(), d), g.AddNetwork(t.Context(), card)); err != nil {
		t.Fatal(err)
	}
	has([]int{0, 4}, []int{0, 2})
	if err := g.AddDisk(t.Context(), d); err == nil {
		t.Error("two disks in one place")
	}
	if err := g.AddNetwork(t.Context(), card); err == nil {
		t.Error("two cards in one place")
	}
	more.Grow(3 << 20)
	if err := g.GrowDisk(t.Context(), d, 3<<20); err != nil {
		t.Error(err)
	}
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		disk, network := g.RemoveDisk(ctx, d.Slot), g.RemoveNetwork(ctx, card.Slot)
		cancel()
		if !errors.Is(disk, hypervisor.ErrHeld) || !errors.Is(network, hypervisor.ErrHeld) && !errors.Is(network, context.DeadlineExceeded) {
			t.Fatalf("got %v and %v", disk, network)
		}
	}
	has([]int{0, 4}, []int{0, 2})
	c.say("w")
	c.hear("W")
	// What is not there needs no letting go of, and a volume that is not there is no
	// disk.
	if err := errors.Join(g.RemoveDisk(t.Context(), 7), g.RemoveNetwork(t.Context(), 7)); err != nil {
		t.Error(err)
	}
	_ = s.Close()
	d.Slot, d.Export = 6, "nope"
	again, err := nbd.Serve(t.Context(), nbd.Options{SocketPath: d.Socket, Device: more, Export: "more", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := g.AddDisk(t.Context(), d); err == nil {
		t.Error("it was given a volume that is not there")
	}
	has([]int{0, 4}, []int{0, 2})
}
