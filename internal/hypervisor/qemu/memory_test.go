package qemu

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// save writes a guest's memory, as a checkpoint does if it may run on, or as a
// suspension does.
func save(t *testing.T, g hypervisor.Guest, live bool) []byte {
	t.Helper()
	mode, err := g.PrepareSave(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if live && !mode.Live {
		t.Skip("a guest can't run on while its memory is written here: ", mode.Reason)
	}
	if err := g.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	saved, err := g.Save(t.Context(), live)
	if err != nil {
		t.Fatal(err)
	}
	defer saved.Memory.Close()
	memory, err := io.ReadAll(saved.Memory)
	if err != nil {
		t.Fatal(err)
	}
	if live != (saved.Pause > 0) {
		t.Errorf("it stood still for %v", saved.Pause)
	}
	t.Logf("%d bytes, stood still for %v", len(memory), saved.Pause)
	return memory
}

// elsewhere makes a guest of the memory, as another server does: with a disk
// that it could not boot from.
func (w *world) elsewhere(memory io.Reader, platform hypervisor.Platform) (hypervisor.Guest, error) {
	w.t.Helper()
	w.write(0, make([]byte, 512))
	w.spec.ID, w.spec.Dir, w.spec.Machine, w.spec.Generation = "other", w.guestDir("other"), platform.Machine, wokenAs
	if err := os.MkdirAll(w.spec.Dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	return w.monitor.Wake(w.t.Context(), w.spec, memory)
}

// What guests of these tests are started as, and woken as.
const (
	startedAs = "4c1b6fd2-0a54-4d0b-8d35-2a6f2b7d9a01"
	wokenAs   = "0d3b8a37-54a7-4c3a-9f0e-51c7d0a2be02"
)

// generation is a UUID as it lies in the guest's memory.
func generation(t *testing.T, uuid string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(uuid, "-", ""))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range [][]byte{b[:4], b[4:6], b[6:8]} {
		slices.Reverse(part)
	}
	return b
}

// A guest goes on from its memory, in another process, without having booted.
// What it was saved from goes on, too, or stands still.
func TestWakes(t *testing.T) {
	for name, live := range map[string]bool{"saved while it runs on": true, "saved while it stands still": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			g := w.start()
			c := listen(t, g)
			c.hear("booted")
			platform, err := g.Platform(t.Context())
			if err != nil || !strings.HasPrefix(platform.Machine, "pc-i440fx-") {
				t.Fatalf("%+v, %v", platform, err)
			}
			memory := save(t, g, live)
			if live {
				c.say("a")
				c.hear("a")
			} else {
				until(t, g, hypervisor.Status{State: hypervisor.Left, Detail: "postmigrate"})
			}
			if err := g.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}

			g, err = w.elsewhere(bytes.NewReader(memory), platform)
			if err != nil {
				t.Fatal(err)
			}
			until(t, g, hypervisor.Status{State: hypervisor.Paused, Detail: "paused"})
			w.launcher.mu.Lock()
			if got := w.launcher.limits; got != limits(w.spec) || got.MemoryBytes == 0 {
				t.Errorf("it is limited to %+v", got)
			}
			w.launcher.mu.Unlock()
			if err := g.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
			c = listen(t, g)
			for { // the console's connection is made in the background
				if _, err := c.rwc.Write([]byte("b")); err == nil {
					break
				}
			}
			c.hear("b")
			c.say("w")
			c.hear("W") // its disk works
			// And again, from there.
			again := save(t, g, live)
			if !bytes.Contains(memory, generation(t, startedAs)) || !bytes.Contains(again, generation(t, wokenAs)) || bytes.Contains(again, generation(t, startedAs)) {
				t.Error("the guest can't see that it goes on once more")
			}
		})
	}
}

var errCut = errors.New("cut off")

// brokenReader ends in an error after n bytes.
func brokenReader(memory []byte, n int) io.Reader {
	return io.MultiReader(bytes.NewReader(memory[:n]), readerFunc(func([]byte) (int, error) { return 0, errCut }))
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// What can't be read to its end, or is no guest's memory, makes no guest.
func TestDoesNotWake(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	listen(t, g).hear("booted")
	platform, err := g.Platform(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	memory := save(t, g, false)
	if err := g.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		memory io.Reader
		says   string
	}{
		"cut off":            {brokenReader(memory, len(memory)/2), "cut off"},
		"cut off at its end": {brokenReader(memory, len(memory)), "cut off"},
		"short":              {bytes.NewReader(memory[:len(memory)/2]), "QEMU"},
		"nothing":            {bytes.NewReader(nil), "QEMU"},
		"something else":     {strings.NewReader(strings.Repeat("no memory ", 1000)), "QEMU"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := w.elsewhere(c.memory, platform); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, which does not say %q", err, c.says)
			}
			if got := must1(w.monitor.List(t.Context())); len(got) != 0 {
				t.Errorf("%v run", got)
			}
		})
	}
}

// A saving that nobody cares for any more leaves the guest as it was, whether the
// daemon gave it up or was killed.
func TestSaveGivenUp(t *testing.T) {
	for name, live := range map[string]bool{"running on": true, "standing still": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			g := w.start()
			c := listen(t, g)
			c.hear("booted")
			for range 3 {
				mode, err := g.PrepareSave(t.Context())
				if err != nil || live && !mode.Live {
					t.Skip(err, mode.Reason)
				}
				if err := g.Pause(t.Context()); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				saved, err := g.Save(ctx, live)
				if err != nil {
					t.Fatal(err)
				}
				cancel()
				if err := saved.Memory.Close(); err != nil {
					t.Fatal(err)
				}
				if err := g.Resume(t.Context()); err != nil {
					t.Fatal(err)
				}
				c.say("x")
				c.hear("x")
			}
			w.monitor.Close()
			c.wg.Wait()
			w.monitor = w.newMonitor()
			g = must1(w.monitor.Adopt(t.Context(), "g"))
			save(t, g, live)
		})
	}
}

// A saving that is cancelled before all is there: the guest goes on.
func TestSaveCancelled(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	if _, err := g.PrepareSave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.Save(ctx, false); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := g.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.say("x")
	c.hear("x")
	save(t, g, false)
}

// What was taken for a saving that does not come about is given back at once, by
// QEMU, too: it is as large as the guest's memory.
func TestSaveDropped(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	c := listen(t, g)
	c.hear("booted")
	files := func() (n int) {
		for _, pid := range []int{os.Getpid(), g.PID()} {
			links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range links {
				if to, err := os.Readlink(link); err == nil && strings.Contains(to, "/memory-") {
					n++
				}
			}
		}
		return n
	}
	if err := g.DropSave(t.Context()); err != nil { // there is nothing
		t.Fatal(err)
	}
	mode, err := g.PrepareSave(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := files(); n == 0 || mode.Live && n != 2 {
		t.Fatalf("%d files for its memory", n)
	}
	if err := g.DropSave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := files(); n != 0 {
		t.Errorf("%d files for its memory are left", n)
	}
	c.say("x")
	c.hear("x")
	save(t, g, false)
}

// Without room for its memory a guest is not even stopped.
func TestNoRoomToSave(t *testing.T) {
	w := newWorld(t)
	w.monitor.Close()
	w.monitor = New(Options{Launcher: w.launcher, Dir: w.guestDir, SpoolDir: "/proc", Log: slog.New(slog.DiscardHandler)})
	g := w.start()
	if _, err := g.PrepareSave(t.Context()); err == nil || !strings.Contains(err.Error(), "memory") {
		t.Errorf("%v", err)
	}
	until(t, g, hypervisor.Status{State: hypervisor.Running, Detail: "running"})
}
