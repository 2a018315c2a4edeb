package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/mirror"
)

// The volume is small, so that operations meet: copies take several chunks,
// and requests overlap often.
const (
	sectors    = 48
	volumeSize = sectors * volume.SectorSize
	grain      = 4 * volume.SectorSize
	depth      = 4
)

// rollEvery is short, so that every world has rolls, and rolls meet faults.
const rollEvery = 400 * time.Millisecond

// holder is an attachment and the client that uses it: the counterpart of
// mirror.Attachment, in this world's time.
type holder struct {
	w      *world
	number int
	epoch  uint64 // 0 until taken
	size   int64  // of the volume
	server *server
	run    int // of its server, when it began
	core   *mirror.Core
	conns  map[uint32]*conn
	dials  map[uint32]bool
	paused bool
	parked []func()
	next   uint64 // session
	seen   int64
	served bool
	over   bool // crashed, or the core ended
	bytes  map[*volume.Request]*request
}

// request is one of the client's operations.
type request struct {
	id   opID
	req  *volume.Request
	read bool
}

// attach takes the volume and begins a holder on the server.
func (w *world) attach(s *server) {
	h := &holder{w: w, number: len(w.holders) + 1, server: s, run: s.run, conns: map[uint32]*conn{}, dials: map[uint32]bool{}, bytes: map[*volume.Request]*request{}}
	w.holders = append(w.holders, h)
	w.current = h
	w.stats.Attachments++
	var clean bool
	w.catalog.update(h.alive, func(v *argonv1.Volume) (err error) {
		clean, err = mirror.Take(v, mirror.Holder{ServerID: s.name}, time.Unix(0, int64(w.now)))
		return err
	}, func(v *argonv1.Volume, err error) {
		if err != nil {
			h.over = true
			return
		}
		h.begin(v, clean)
	})
}

func (h *holder) begin(v *argonv1.Volume, clean bool) {
	cfg := mirror.DefaultConfig()
	h.size = int64(v.GetSizeBytes())
	cfg.Epoch, cfg.Size, cfg.Clean, cfg.Break = v.GetEpoch(), h.size, clean, h.w.opts.Break
	cfg.Generation, cfg.EqualBefore = v.GetGeneration(), v.GetEqualBefore()
	cfg.Chunks, cfg.Grain, cfg.RollEvery, cfg.ScrubPace = 2, grain, rollEvery, 8*volumeSize
	cfg.StallAfter = 3 * time.Second
	for _, r := range v.GetReplicas() {
		if r.GetServerId() == h.server.name {
			cfg.Near = r.GetId()
		}
	}
	h.seen, h.epoch = v.GetMeta().GetRevision(), v.GetEpoch()
	h.w.trace("holder %d on %s attaches in epoch %d (clean before: %v)", h.number, h.server.name, v.GetEpoch(), clean)
	h.core = mirror.NewCore(cfg, v)
	h.carryOut(h.core.Start(h.w.now))
	h.tick()
	for range depth {
		h.think()
	}
}

func (h *holder) alive() bool { return !h.over && h.server.run == h.run && h.server.up }

// do lets the core make a step, unless its process stands still.
func (h *holder) do(step func(time.Duration) []mirror.Effect) {
	if !h.alive() || h.core == nil {
		return
	}
	if h.paused {
		h.parked = append(h.parked, func() { h.do(step) })
		return
	}
	h.carryOut(step(h.w.now))
}

func (h *holder) tick() {
	if h.alive() {
		h.do(h.core.Tick)
		h.w.after(100*time.Millisecond, h.tick)
	}
}

func (h *holder) observe(v *argonv1.Volume) {
	if h.core == nil {
		return
	}
	h.do(func(now time.Duration) []mirror.Effect {
		if v.GetMeta().GetRevision() <= h.seen {
			return nil
		}
		h.seen = v.GetMeta().GetRevision()
		return h.core.RecordChanged(now, v)
	})
}

// carryOut does what the core wants. The effects are copied, as the core may
// be entered again on the way.
func (h *holder) carryOut(effects []mirror.Effect) {
	for _, e := range append([]mirror.Effect(nil), effects...) {
		switch {
		case e.Send:
			h.send(e)
		case e.Complete != nil:
			h.answered(h.bytes[e.Complete], e.Err)
		case e.Propose != nil:
			h.propose(*e.Propose)
		case e.Dial:
			h.dials[e.Peer] = true
			h.dial(e.Peer)
		case e.Drop:
			h.dials[e.Peer] = false
			if c := h.conns[e.Peer]; c != nil {
				c.close(e.Clean)
			}
		case e.Hangup:
			if c := h.conns[e.Peer]; c != nil && c.session == e.Session {
				c.close(false)
			}
		case e.Grown:
			h.size = e.Len
		case e.Note != nil:
			h.w.trace("holder %d: %s", h.number, e.Note.Message)
		}
	}
	if h.core.Serving() && !h.served {
		h.served = true
		h.w.serves(h)
	}
	if h.core.Ended() && !h.over {
		h.over = true
		h.w.trace("holder %d ends: %v", h.number, h.core.Err())
		h.w.ended(h, h.core.Err())
	}
}

func (h *holder) propose(p mirror.Proposal) {
	h.w.catalog.update(h.alive, func(v *argonv1.Volume) error {
		return mirror.Apply(v, p, time.Unix(0, int64(h.w.now)))
	}, func(v *argonv1.Volume, err error) {
		h.do(func(now time.Duration) []mirror.Effect {
			if err != nil {
				return h.core.Deposed(now, err)
			}
			h.seen = max(h.seen, v.GetMeta().GetRevision())
			return h.core.Committed(now, v)
		})
	})
}

// think submits the client's next operation.
func (h *holder) think() {
	h.w.after(h.w.between(0, h.w.think), func() {
		if !h.alive() || h.core.Ended() {
			return
		}
		if h.paused {
			h.parked = append(h.parked, h.think)
			return
		}
		h.submit()
	})
}

func (h *holder) submit() {
	w := h.w
	n := 1 + w.rng.IntN(6)
	first := w.rng.IntN(int(h.size/volume.SectorSize) - n + 1)
	r := &volume.Request{Off: int64(first) * volume.SectorSize, Len: int64(n) * volume.SectorSize, FUA: w.chance(0.1)}
	q := &request{req: r}
	switch p := w.rng.Float64(); {
	case p < 0.45:
		w.values++
		r.Op, r.Data = volume.OpWrite, fill(w.values, n)
		q.id = w.checker.Write(h.number, first, n, w.values, r.FUA)
	case p < 0.5:
		r.Op = volume.OpZero
		q.id = w.checker.Write(h.number, first, n, 0, r.FUA)
	case p < 0.55:
		r.Op = volume.OpTrim
		q.id = w.checker.Write(h.number, first, n, 0, r.FUA)
	case p < 0.9:
		r.Op, r.FUA, q.read = volume.OpRead, false, true
		r.Data = make([]byte, r.Len)
		q.id = w.checker.Read(h.number, first, n)
	default:
		r.Op, r.FUA, r.Off, r.Len = volume.OpFlush, false, 0, 0
		q.id = w.checker.Flush(h.number)
	}
	h.bytes[r] = q
	w.trace("holder %d: operation %d: %s sectors %d to %d, write %d", h.number, q.id, r.Op, first, first+n-1, w.values)
	h.do(func(now time.Duration) []mirror.Effect { return h.core.Submit(now, r) })
}

// answered is the client's side of an answer.
func (h *holder) answered(q *request, err error) {
	delete(h.bytes, q.req)
	if err != nil {
		if !errors.Is(err, volume.ErrClosed) {
			h.think()
		}
		return
	}
	h.w.stats.Operations++
	h.w.trace("holder %d: operation %d is answered", h.number, q.id)
	var got []value
	if q.read {
		for off := 0; off < len(q.req.Data); off += volume.SectorSize {
			v, err := valueOf(q.req.Data[off : off+volume.SectorSize])
			if err != nil {
				h.w.fail("holder %d read at %d: %w", h.number, q.req.Off+int64(off), err)
				return
			}
			got = append(got, v)
		}
	}
	// A deposed holder may read what is old: its lease, not the volume, keeps
	// it from running beside the new one.
	if !q.read || !h.w.deposed(h) {
		h.w.checker.Answered(q.id, got)
	}
	if q.req.Op == volume.OpFlush {
		h.w.flushed()
	}
	h.think()
}

// fill makes the content of n sectors of a write.
func fill(v value, n int) []byte {
	b := make([]byte, n*volume.SectorSize)
	for i := 0; i < len(b); i += 4 {
		binary.LittleEndian.PutUint32(b[i:], uint32(v))
	}
	return b
}

// valueOf is the write that a sector's content is from.
func valueOf(b []byte) (value, error) {
	v := binary.LittleEndian.Uint32(b)
	for i := 4; i < len(b); i += 4 {
		if x := binary.LittleEndian.Uint32(b[i:]); x != v {
			return 0, fmt.Errorf("a sector is torn: it has parts of writes %d and %d", v, x)
		}
	}
	return value(v), nil
}
