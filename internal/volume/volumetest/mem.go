// Package volumetest has a volume.Device for the tests of whatever stands in
// front of one.
//
// What lives here: a device in memory that does what a test tells it. What
// must not: anything that runs outside of tests.
package volumetest

import (
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/argon-cluster/argon/internal/volume"
)

// MemDevice is a volume.Device in memory. It completes requests on a goroutine
// of its own, in any order, and forgets at a power cut what was not flushed.
// Safe for concurrent use.
type MemDevice struct {
	wg sync.WaitGroup

	mu      sync.Mutex
	wake    sync.Cond
	rng     *rand.Rand
	data    []byte
	durable []byte // what is left after a power cut
	dirty   []span // where data and durable may differ
	waiting []*volume.Request
	stalled bool
	closed  bool
	judge   func(*volume.Request) error
}

type span struct{ off, len int64 }

// extentSize is the unit in which Extents looks for zeros, in bytes.
const extentSize = 4096

// New makes a device full of zeros. Size is in bytes, a multiple of
// volume.SectorSize. The seed decides the order of completions. The device
// must be closed.
func New(size int64, seed uint64) *MemDevice {
	d := &MemDevice{
		rng:     rand.New(rand.NewPCG(seed, 0)),
		data:    make([]byte, size),
		durable: make([]byte, size),
	}
	d.wake.L = &d.mu
	d.wg.Go(d.run)
	return d
}

// Size implements volume.Device.
func (d *MemDevice) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.data))
}

// Submit implements volume.Device.
func (d *MemDevice) Submit(r *volume.Request) {
	d.mu.Lock()
	closed := d.closed
	if !closed {
		d.waiting = append(d.waiting, r)
		d.wake.Broadcast()
	}
	d.mu.Unlock()
	if closed {
		r.Done(volume.ErrClosed)
	}
}

// Extents implements nbd.Extents: blocks of zeros are holes.
func (d *MemDevice) Extents(off, length int64, found func(n int64, hole, zero bool) bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	end := min(off+length, int64(len(d.data)))
	for off < end {
		hole, n := d.extent(off, end)
		if !found(n, hole, hole) {
			return nil
		}
		off += n
	}
	return nil
}

func (d *MemDevice) extent(off, end int64) (hole bool, n int64) {
	at := off
	for at < end {
		next := min(at-at%extentSize+extentSize, end)
		zero := isZero(d.data[at:next])
		if at > off && zero != hole {
			break
		}
		hole, at = zero, next
	}
	return hole, at - off
}

func isZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// Stall lets requests wait until Resume.
func (d *MemDevice) Stall() { d.setStalled(true) }

// Resume ends Stall.
func (d *MemDevice) Resume() { d.setStalled(false) }

func (d *MemDevice) setStalled(stalled bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stalled = stalled
	d.wake.Broadcast()
}

// AwaitWaiting returns once at least n requests were submitted and not begun:
// with Stall, to know that they have arrived.
func (d *MemDevice) AwaitWaiting(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.waiting) < n {
		d.wake.Wait()
	}
}

// Judge lets the function see each request when it is carried out; a request
// for which it returns an error fails with that and does nothing. It must not
// call the device. Nil ends that.
func (d *MemDevice) Judge(judge func(*volume.Request) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.judge = judge
}

// Grow makes the device larger.
func (d *MemDevice) Grow(size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.data = append(d.data, make([]byte, size-int64(len(d.data)))...)
	d.durable = append(d.durable, make([]byte, size-int64(len(d.durable)))...)
}

// Bytes copies what the device holds.
func (d *MemDevice) Bytes() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]byte(nil), d.data...)
}

// PowerCut loses everything that nobody asked to be durable.
func (d *MemDevice) PowerCut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.dirty {
		copy(d.data[s.off:s.off+s.len], d.durable[s.off:])
	}
	d.dirty = nil
}

// Close fails the requests that wait with volume.ErrClosed, and those that
// follow. It returns when the last Done that is under way has.
func (d *MemDevice) Close() error {
	d.mu.Lock()
	d.closed = true
	d.wake.Broadcast()
	d.mu.Unlock()
	d.wg.Wait()
	return nil
}

func (d *MemDevice) run() {
	for {
		r, err := d.next()
		if r == nil {
			return
		}
		r.Done(err)
	}
}

// next carries out any one of the waiting requests. After Close it fails all,
// then returns nil.
func (d *MemDevice) next() (*volume.Request, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.closed && (d.stalled || len(d.waiting) == 0) {
		d.wake.Wait()
	}
	n := len(d.waiting)
	if n == 0 {
		return nil, nil
	}
	i := d.rng.IntN(n)
	r := d.waiting[i]
	d.waiting[i] = d.waiting[n-1]
	d.waiting = d.waiting[:n-1]
	if d.closed {
		return r, volume.ErrClosed
	}
	return r, d.do(r)
}

func (d *MemDevice) do(r *volume.Request) error {
	if r.Off < 0 || r.Len < 0 || r.Off%volume.SectorSize != 0 || r.Len%volume.SectorSize != 0 || r.Off > int64(len(d.data))-r.Len {
		return fmt.Errorf("%s of %d bytes at %d of %d: %w", r.Op, r.Len, r.Off, len(d.data), volume.ErrRange)
	}
	if d.judge != nil {
		if err := d.judge(r); err != nil {
			return err
		}
	}
	place := d.data[r.Off : r.Off+r.Len]
	switch r.Op {
	case volume.OpRead:
		copy(r.Data, place)
	case volume.OpWrite:
		copy(place, r.Data)
	case volume.OpZero, volume.OpTrim:
		clear(place)
	case volume.OpFlush:
		for _, s := range d.dirty {
			copy(d.durable[s.off:s.off+s.len], d.data[s.off:])
		}
		d.dirty = nil
	}
	if r.Op.Changes() && r.FUA {
		copy(d.durable[r.Off:], place)
	} else if r.Op.Changes() {
		d.dirty = append(d.dirty, span{r.Off, r.Len})
	}
	return nil
}
