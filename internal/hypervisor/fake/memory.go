package fake

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// paused is how a guest is that was told to stand still.
var paused = hypervisor.Status{State: hypervisor.Paused, Detail: "paused"}

// Wake implements hypervisor.Monitor.
func (m *Monitor) Wake(ctx context.Context, spec hypervisor.Spec, memory io.Reader) (hypervisor.Guest, error) {
	mind, err := io.ReadAll(memory)
	if err != nil {
		return nil, err
	}
	started, err := m.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	g := started.(*Guest)
	g.Set(paused)
	g.Think(string(mind))
	return g, nil
}

// Think gives the guest something to remember.
func (g *Guest) Think(mind string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mind = mind
}

// Mind is what it remembers.
func (g *Guest) Mind() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.mind
}

// FailSave makes every Save fail with err from now on; nil ends that.
func (g *Guest) FailSave(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.unsaveable = err
}

// SavePausedOnly makes it stand still until its memory is written.
func (g *Guest) SavePausedOnly() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pausedOnly = true
}

// Pause implements hypervisor.Guest.
func (g *Guest) Pause(context.Context) error {
	g.Set(paused)
	return nil
}

// Platform implements hypervisor.Guest.
func (g *Guest) Platform(context.Context) (hypervisor.Platform, error) {
	return hypervisor.Platform{Machine: g.kind, Version: "1"}, nil
}

// PrepareSave implements hypervisor.Guest.
func (g *Guest) PrepareSave(context.Context) (hypervisor.SaveMode, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.prepared = true
	if g.pausedOnly {
		return hypervisor.SaveMode{Reason: "it is only a fake"}, nil
	}
	return hypervisor.SaveMode{Live: true}, nil
}

// DropSave implements hypervisor.Guest.
func (g *Guest) DropSave(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.prepared = false
	return nil
}

// Prepared tells whether something is taken for a Save.
func (g *Guest) Prepared() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.prepared
}

// Save implements hypervisor.Guest.
func (g *Guest) Save(_ context.Context, live bool) (hypervisor.Saved, error) {
	g.mu.Lock()
	mind, err := g.mind, g.unsaveable
	g.prepared = false
	g.mu.Unlock()
	select {
	case <-g.done:
		err = errors.New("it has ended")
	default:
	}
	if err != nil {
		return hypervisor.Saved{}, err
	}
	saved := hypervisor.Saved{Memory: io.NopCloser(strings.NewReader(mind)), Stopped: time.Now()}
	if live {
		g.Set(hypervisor.Status{State: hypervisor.Running})
		saved.Pause = time.Millisecond
	}
	return saved, nil
}
