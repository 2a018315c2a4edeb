package sim

import (
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file makes things go wrong, and looks after the volume in between, as
// the controller and the agents of a cluster do.

// fault makes one thing go wrong, then plans the next.
func (w *world) fault() {
	if w.quiet {
		return
	}
	w.stats.Faults++
	s := w.servers[w.rng.IntN(len(w.servers))]
	switch p := w.rng.Float64(); {
	case p < 0.15:
		s.crash(false)
	case p < 0.27:
		s.crash(true)
	case p < 0.31:
		w.trace("all servers lose power")
		for _, s := range w.servers {
			s.crash(true)
		}
	case p < 0.46:
		w.cutLink(s)
	case p < 0.52:
		w.trace("catalog away")
		w.catalog.away = true
		w.after(w.between(100*time.Millisecond, 4*time.Second), func() { w.catalog.away = false })
	case p < 0.62:
		w.pause()
	case p < 0.72:
		w.trace("the volume moves to %s", s.name)
		w.move(s)
	case p < 0.8:
		w.detach()
	case p < 0.9:
		s.fillDisk()
	default:
		s.breakDisk()
	}
	w.after(w.between(50*time.Millisecond, 2500*time.Millisecond), w.fault)
}

// flushed is called when a flush was answered. At times power fails everywhere
// right then: what only seems to be safe shows.
func (w *world) flushed() {
	if w.quiet || w.stats.Faults == 0 || !w.chance(0.005) {
		return
	}
	w.stats.Faults++
	w.after(w.between(0, time.Millisecond), func() {
		w.trace("all servers lose power after a flush")
		for _, s := range w.servers {
			s.crash(true)
		}
	})
}

// cutLink severs one server from another, one way or both, for a while.
func (w *world) cutLink(a *server) {
	b := w.servers[w.rng.IntN(len(w.servers))]
	both := w.chance(0.6)
	w.trace("cut %s to %s, both ways: %v", a.name, b.name, both)
	links := [][2]int{{a.number, b.number}}
	if both {
		links = append(links, [2]int{b.number, a.number})
	}
	for _, l := range links {
		w.cut[l] = true
	}
	w.after(w.between(50*time.Millisecond, 6*time.Second), func() {
		for _, l := range links {
			delete(w.cut, l)
		}
	})
}

// pause stops the holder's process and lets it go on, perhaps after others
// have taken over.
func (w *world) pause() {
	h := w.current
	if h == nil || !h.alive() {
		return
	}
	w.trace("holder %d stands still", h.number)
	h.paused = true
	w.after(w.between(50*time.Millisecond, 8*time.Second), func() {
		w.trace("holder %d goes on", h.number)
		h.paused = false
		parked := h.parked
		h.parked = nil
		for _, do := range parked {
			do()
		}
	})
	if w.chance(0.5) {
		w.after(w.between(100*time.Millisecond, 4*time.Second), func() {
			if !w.quiet {
				w.move(w.servers[w.rng.IntN(len(w.servers))])
			}
		})
	}
}

// move attaches the volume elsewhere, whoever has it.
func (w *world) move(to *server) {
	if to.up {
		w.attach(to)
	}
}

// detach ends the attachment clean, if it can.
func (w *world) detach() {
	h := w.current
	if h == nil || !h.alive() || h.core == nil {
		return
	}
	w.trace("holder %d detaches", h.number)
	h.do(h.core.Detach)
}

// tend attaches the volume again whenever nobody has it.
func (w *world) tend() {
	w.after(w.between(100*time.Millisecond, time.Second), func() {
		if w.current == nil || !w.current.alive() {
			w.move(w.servers[w.rng.IntN(len(w.servers))])
		}
		w.tend()
	})
}

// serves is called when a holder begins to serve.
func (w *world) serves(h *holder) {
	w.trace("holder %d serves", h.number)
	for _, other := range w.holders {
		if other.epoch < h.epoch {
			w.checker.HolderOver(other.number)
			if !other.alive() {
				w.checker.Forget(other.number)
			}
		}
	}
}

// ended is called when an attachment is over by itself.
func (w *world) ended(h *holder, _ error) {
	clear(h.bytes)
	if w.deposed(h) {
		w.checker.Forget(h.number)
	}
}

// deposed tells whether a newer holder has served.
func (w *world) deposed(h *holder) bool {
	for _, other := range w.holders {
		if other.served && other.epoch > h.epoch {
			return true
		}
	}
	return false
}

// powerLost notes that a replica lost what it had not synced, and tells the
// checker when that was so for all that were in sync.
func (w *world) powerLost(s *server) {
	s.lostPower = true
	for _, r := range w.catalog.volume.GetReplicas() {
		if r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC && !w.servers[r.GetId()-1].lostPower {
			return
		}
	}
	w.trace("every replica in sync has lost power")
	w.checker.PowerLost()
}
