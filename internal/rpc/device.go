package rpc

import (
	"errors"
	"sync"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/stream"
)

// atOnce is how many requests of an import are under way at once.
const atOnce = 8

// deviceWriter writes the records of a stream to a volume, several at once:
// they do not overlap. Not safe for concurrent use.
type deviceWriter struct {
	device volume.Device
	slots  chan []byte // buffers that are free

	wg  sync.WaitGroup
	mu  sync.Mutex
	err error
}

func newDeviceWriter(d volume.Device) *deviceWriter {
	w := &deviceWriter{device: d, slots: make(chan []byte, atOnce)}
	for range atOnce {
		w.slots <- nil
	}
	return w
}

// put starts to write a record, and returns what went wrong with earlier ones.
func (w *deviceWriter) put(r stream.Record) error {
	buf := <-w.slots
	if err := w.failure(); err != nil {
		w.slots <- buf
		return err
	}
	req := &volume.Request{Op: volume.OpZero, Off: r.Off, Len: r.Len}
	if r.Data != nil {
		buf = append(buf[:0], r.Data...)
		req.Op, req.Data = volume.OpWrite, buf
	}
	w.submit(req, func() { w.slots <- buf })
	return nil
}

func (w *deviceWriter) submit(req *volume.Request, after func()) {
	w.wg.Add(1)
	req.Done = func(err error) {
		if err != nil {
			w.mu.Lock()
			w.err = errors.Join(w.err, err)
			w.mu.Unlock()
		}
		after()
		w.wg.Done()
	}
	w.device.Submit(req)
}

func (w *deviceWriter) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// wait waits for what is under way.
func (w *deviceWriter) wait() error {
	w.wg.Wait()
	return w.failure()
}

// finish also makes it survive a power cut.
func (w *deviceWriter) finish() error {
	if err := w.wait(); err != nil {
		return err
	}
	w.submit(&volume.Request{Op: volume.OpFlush}, func() {})
	return w.wait()
}
