// Package standby is a device that is served before the volume is here.
//
// What lives here: keeping requests until there is a device that carries them
// out. What must not: when that is (agent/), where it comes from (mirror/), the
// protocol in front of it (nbd/).
package standby

import (
	"sync"

	"github.com/argon-cluster/argon/internal/volume"
)

// Device keeps its requests until Give. Safe for concurrent use.
type Device struct {
	size int64
	wg   sync.WaitGroup

	mu      sync.Mutex
	to      volume.Device
	waiting []*volume.Request
	closed  bool
}

// New makes a device of the size that the volume has, in bytes.
func New(size int64) *Device { return &Device{size: size} }

// Size implements volume.Device.
func (d *Device) Size() int64 {
	if to := d.given(); to != nil {
		return to.Size()
	}
	return d.size
}

func (d *Device) given() volume.Device {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to
}

// Submit implements volume.Device.
func (d *Device) Submit(r *volume.Request) {
	d.mu.Lock()
	to, closed := d.to, d.closed
	if to == nil && !closed {
		d.waiting = append(d.waiting, r)
	}
	d.mu.Unlock()
	switch {
	case to != nil:
		to.Submit(r)
	case closed:
		// Not on the caller's stack: that is its own.
		d.wg.Go(func() { r.Done(volume.ErrClosed) })
	}
}

// Extents tells what the volume's device knows, once there is one.
func (d *Device) Extents(off, n int64, found func(n int64, hole, zero bool) (more bool)) error {
	if to, ok := d.given().(extents); ok {
		return to.Extents(off, n, found)
	}
	return nil
}

// extents is nbd.Extents.
type extents interface {
	Extents(off, n int64, found func(n int64, hole, zero bool) (more bool)) error
}

// Give hands all requests to a device, those that wait first. It may be called
// once, and does nothing after Close.
func (d *Device) Give(to volume.Device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.to != nil {
		return
	}
	d.to = to
	waiting := d.waiting
	d.waiting = nil
	// It may have no room for so many before it serves.
	d.wg.Go(func() {
		for _, r := range waiting {
			to.Submit(r)
		}
	})
}

// Close fails what still waits, and waits for what was handed over to be taken.
func (d *Device) Close() {
	d.mu.Lock()
	waiting := d.waiting
	d.waiting, d.closed = nil, true
	d.mu.Unlock()
	for _, r := range waiting {
		r.Done(volume.ErrClosed)
	}
	d.wg.Wait()
}
