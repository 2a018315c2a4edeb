package nbd

import "github.com/argon-cluster/argon/internal/volume"

// provisionPiece is how many zeros are written at once, in bytes.
const provisionPiece = 1 << 20

// provision makes the request's range read as zeros and keeps its space (a
// write of zeros with NBD_CMD_FLAG_NO_HOLE): it writes them, as the store makes
// a hole of what it is only told to zero. What was begun when the server stops
// is not ended.
func (c *conn) provision(r *request) error {
	zeros := *r.buf
	clear(zeros)
	done := make(chan error, 1)
	w := volume.Request{Op: volume.OpWrite, FUA: r.dev.FUA, Done: func(err error) { done <- err }}
	for off, end := r.dev.Off, r.dev.Off+r.dev.Len; off < end; off += w.Len {
		if c.server.isStopping() {
			return volume.ErrClosed
		}
		w.Off, w.Len = off, min(end-off, int64(len(zeros)))
		w.Data = zeros[:w.Len]
		c.device.Submit(&w)
		if err := <-done; err != nil {
			return err
		}
	}
	return nil
}
