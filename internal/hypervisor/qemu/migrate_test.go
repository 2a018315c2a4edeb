package qemu

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/volume/nbd"
	"github.com/argon-cluster/argon/internal/volume/standby"
)

// destination starts a guest that waits for the state of w's, on a disk that
// answers nothing yet.
func (w *world) destination() (hypervisor.Guest, *standby.Device) {
	w.t.Helper()
	spec := w.spec
	spec.ID, spec.Dir, spec.Incoming = "h", w.guestDir("h"), true
	spec.Disks = []hypervisor.Disk{{Socket: filepath.Join(w.dir, "standby.nbd"), Export: "s", Serial: "s1"}}
	disk := standby.New(w.disk.Size())
	server, err := nbd.Serve(context.Background(), nbd.Options{
		SocketPath: spec.Disks[0].Socket, Device: disk, Export: "s", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		disk.Close()
		_ = server.Close()
	})
	if err := os.Mkdir(spec.Dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	g, err := w.monitor.Start(w.t.Context(), spec)
	if err != nil {
		w.t.Fatal(err)
	}
	return g, disk
}

// toward connects to the guest that waits.
func (w *world) toward() net.Conn {
	w.t.Helper()
	conn, err := net.Dial("unix", hypervisor.IncomingSocket(w.guestDir("h")))
	if err != nil {
		w.t.Fatal(err)
	}
	return conn
}

func status(t *testing.T, g hypervisor.Guest) hypervisor.RunState {
	t.Helper()
	s, err := g.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.State
}

// A guest goes on in another QEMU, which touched its disk only when it was told
// to go on.
func TestMigrate(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	h, disk := w.destination()
	if got := status(t, h); got != hypervisor.Receiving {
		t.Errorf("the one that waits is %s", got)
	}
	told := 0
	if err := g.Send(t.Context(), w.toward(), func(hypervisor.Transfer) { told++ }); err != nil {
		t.Fatal(err)
	}
	if got := status(t, g); got != hypervisor.Leaving || told == 0 {
		t.Errorf("before the last of it the guest is %s; it told %d times", got, told)
	}
	sent, err := g.Finish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", sent)
	if a, b := status(t, g), status(t, h); a != hypervisor.Left || b != hypervisor.Paused {
		t.Errorf("afterwards the one is %s, the other %s", a, b)
	}
	if err := g.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	disk.Give(w.disk)
	if err := h.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	c = listen(t, h)
	c.say("w")
	c.hear("W")
}

// Given up before the last of it is sent, the guest goes on, and can be sent
// again.
func TestMigrationIsGivenUp(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	h, _ := w.destination()
	if err := g.Send(t.Context(), w.toward(), func(hypervisor.Transfer) {}); err != nil {
		t.Fatal(err)
	}
	if err := g.StopSending(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
	c.say("x")
	c.hear("x")
	<-h.Done() // a QEMU that did not get all ends
	if err := os.RemoveAll(w.guestDir("h")); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	h, _ = w.destination()
	err := g.Send(ctx, w.toward(), func(hypervisor.Transfer) { cancel() })
	if err == nil {
		t.Error("a transfer that was cancelled was carried out")
	}
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
	<-h.Done()
}

// The other QEMU dies in the middle: the guest goes on here.
func TestMigrationBreaks(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	h, _ := w.destination()
	if err := g.Send(t.Context(), w.toward(), func(hypervisor.Transfer) {}); err != nil {
		t.Fatal(err)
	}
	if err := h.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Finish(t.Context()); err == nil {
		t.Error("it was finished into nothing")
	}
	if err := g.StopSending(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
	c.say("x")
	c.hear("x")
}

// All is on the other side, and it is not to be: the guest goes on here when it
// is told to, and only then.
func TestMigrationIsTakenBack(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	h, _ := w.destination()
	if err := g.Send(t.Context(), w.toward(), func(hypervisor.Transfer) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.StopSending(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := status(t, g); got != hypervisor.Left {
		t.Errorf("it is %s", got)
	}
	if err := g.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.say("w")
	c.hear("W")
	if _, err := os.Stat(filepath.Join(w.guestDir("g"), "qemu.log")); err != nil {
		t.Error(err)
	}
}
