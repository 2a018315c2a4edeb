package sim

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

const (
	clusterID = "cluster"
	volumeID  = "volume"
)

// server is one server: its disk, its replica store, its process.
type server struct {
	w      *world
	number int // from 1; also its replica's id
	name   string
	fs     *simfs.FS
	boot   int // of its kernel
	run    int // of its process
	up     bool
	store  *replica.Store
	// view is the record, as the server's agent knows it.
	view *argonv1.Volume

	// lostPower: it lost what was not synced, and did not begin anew in the
	// in-sync set since.
	lostPower bool
	// diskBroken: a fault was made that the replica must notice (I8).
	diskBroken bool
}

func newServer(w *world, number int) *server {
	return &server{
		w: w, number: number, name: fmt.Sprintf("s%d", number), up: true, boot: 1, run: 1,
		fs: simfs.New(rand.New(rand.NewPCG(w.opts.Seed, uint64(number)))),
	}
}

func (s *server) open() error {
	store, err := replica.Open(replica.Options{
		FS: s.fs, Dir: "/volumes", ClusterID: clusterID, BootID: fmt.Sprintf("%s-boot-%d", s.name, s.boot),
		RegionSize: grain, Images: func(string) string { return imageFile }, Log: slog.New(slog.DiscardHandler), Hooks: s.w.opts.Hooks,
	})
	s.store = store
	return err
}

// observe tells the agent of a record.
func (s *server) observe(v *argonv1.Volume) {
	if v.GetMeta().GetRevision() > s.view.GetMeta().GetRevision() {
		s.view = v
	}
}

// crash ends the server's process; with power also what its disk had not
// synced. It comes back after a while.
func (s *server) crash(power bool) {
	if !s.up {
		if power { // down already; now its disk forgets, too
			s.losePower()
		}
		return
	}
	s.w.trace("%s crashes, power: %v", s.name, power)
	s.up = false
	s.store = nil
	for _, h := range s.w.holders {
		if h.server == s && !h.over {
			h.over = true
			s.w.ended(h, nil)
		}
		for _, c := range h.conns {
			if c.server == s {
				s.w.after(s.w.between(0, 300*time.Millisecond), func() { c.close(false) })
			}
		}
	}
	if power {
		s.losePower()
	}
	s.w.after(s.w.between(100*time.Millisecond, 6*time.Second), s.start)
}

// mendDisk takes back a fault that has not shown yet.
func (s *server) mendDisk() {
	if s.fs.FailWrite || s.fs.FailSync {
		s.diskBroken = false
	}
	s.fs.FailWrite, s.fs.FailSync = false, false
}

func (s *server) losePower() {
	s.boot++
	s.mendDisk()
	s.fs.Crash()
	s.w.powerLost(s)
}

func (s *server) start() {
	if s.up {
		return
	}
	s.run++
	s.up = true
	s.mendDisk() // a disk that fails at opening is a disk that is away
	if err := s.open(); err != nil {
		s.w.fail("%s cannot open its replicas: %w", s.name, err)
		return
	}
	if _, err := s.store.Get(volumeID, uint32(s.number)); err != nil {
		s.w.fail("%s lost its replica in a crash: %w", s.name, err)
	}
	s.w.trace("%s is up", s.name)
}

// rot changes a byte of what the replica holds at or after off.
func (s *server) rot(off int64) error {
	name := fmt.Sprintf("/volumes/%s/%d/layer-00000000.data", volumeID, s.number)
	f, err := s.fs.Open(name, false)
	if err != nil {
		return err
	}
	start, _, ok, err := f.NextData(off)
	if !ok || err != nil {
		return fmt.Errorf("no data at %d: %w", off, err)
	}
	return s.fs.Rot(name, start+100)
}

// fillDisk leaves no room for a while.
func (s *server) fillDisk() {
	s.w.trace("disk of %s full", s.name)
	s.fs.Full = true
	s.w.after(s.w.between(50*time.Millisecond, 3*time.Second), func() { s.fs.Full = false })
}

// breakDisk makes one write or sync fail, if another replica in sync is whole.
func (s *server) breakDisk() {
	if s.diskBroken || !s.w.spare(s) {
		return
	}
	s.diskBroken = true
	if s.w.chance(0.5) {
		s.w.trace("a sync of %s will fail", s.name)
		s.fs.FailSync = true
	} else {
		s.w.trace("a write of %s will fail", s.name)
		s.fs.FailWrite = true
	}
}

// spare tells whether a replica in sync other than the server's is whole.
func (w *world) spare(s *server) bool {
	return slices.ContainsFunc(w.catalog.volume.GetReplicas(), func(r *argonv1.Replica) bool {
		other := w.servers[r.GetId()-1]
		return other != s && r.GetState() == argonv1.ReplicaState_REPLICA_STATE_IN_SYNC &&
			other.up && !other.lostPower && !other.diskBroken
	})
}

// lost tells whether no replica in sync can be trusted: an operator's case.
func (w *world) lost() bool {
	broken := false
	for _, r := range w.catalog.volume.GetReplicas() {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
			continue
		}
		s := w.servers[r.GetId()-1]
		if !s.lostPower && !s.diskBroken {
			return false
		}
		broken = broken || s.diskBroken
	}
	return broken
}

// conn is one connection between a holder and a replica, and the session it
// has there. Messages are carried out and answered in any order.
type conn struct {
	h       *holder
	server  *server
	run     int
	peer    uint32
	session uint64 // the holder's number for it; 0 until up
	sess    *replica.Session
	open    bool
}

const dialPause = 100 * time.Millisecond

// dial tries to reach a replica until it is told not to.
func (h *holder) dial(peer uint32) {
	w := h.w
	if !h.alive() || !h.dials[peer] {
		return
	}
	if c := h.conns[peer]; c != nil && c.open {
		return
	}
	s := w.servers[peer-1]
	again := func() { w.after(dialPause, func() { h.dial(peer) }) }
	w.after(w.delay(), func() {
		if !w.reachable(h.server.number, s.number) || !w.reachable(s.number, h.server.number) || !s.up {
			again()
			return
		}
		r, err := s.store.Get(volumeID, peer)
		if err != nil {
			again()
			return
		}
		sess, info, err := r.Seal(h.epoch)
		w.trace("%s sealed in epoch %d for holder %d: incarnation %d, health %d, %v", s.name, h.epoch, h.number, info.Incarnation, info.Health, err)
		c := &conn{h: h, server: s, run: s.run, peer: peer, sess: sess, open: err == nil}
		w.after(w.delay(), func() { h.dialled(c, info, err, again) })
	})
}

// dialled is the holder's side of a dial.
func (h *holder) dialled(c *conn, info replica.Info, err error, again func()) {
	if !h.alive() {
		return
	}
	var sealed *replica.SealedError
	switch {
	case errors.As(err, &sealed):
		h.refused(c.peer, sealed.Epoch, again)
	case err != nil || !c.open || c.server.run != c.run:
		again()
	default:
		h.next++
		c.session = h.next
		h.conns[c.peer] = c
		h.do(func(now time.Duration) []mirror.Effect { return h.core.PeerUp(now, c.peer, c.session, infoOf(info)) })
	}
}

func infoOf(i replica.Info) mirror.Info {
	return mirror.Info{Incarnation: i.Incarnation, Health: mirror.Health(i.Health), Emptied: i.Emptied}
}

// refused asks the catalog what a higher epoch means.
func (h *holder) refused(peer uint32, sealed uint64, again func()) {
	h.w.catalog.get(h.alive, func(v *argonv1.Volume) {
		h.do(func(now time.Duration) []mirror.Effect {
			if v.GetEpoch() != h.epoch {
				return h.core.Deposed(now, mirror.ErrDeposed)
			}
			return h.core.PeerAhead(now, peer, sealed)
		})
		again()
	})
}

// close ends the connection. What was sent and not carried out never is; what
// was carried out and not answered stays unanswered.
func (c *conn) close(clean bool) {
	if !c.open {
		return
	}
	c.open = false
	h, w := c.h, c.h.w
	if c.server.up && c.server.run == c.run {
		_ = c.sess.Close(clean) // what it cannot note, the next opening finds out
	}
	w.after(0, func() {
		h.do(func(now time.Duration) []mirror.Effect { return h.core.PeerDown(now, c.peer, c.session) })
		h.dial(c.peer)
	})
}

// breakLater ends a connection over which nothing gets through, some time.
func (c *conn) breakLater() {
	c.h.w.after(c.h.w.between(100*time.Millisecond, 3*time.Second), func() {
		if !c.through() {
			c.close(false)
		}
	})
}

func (c *conn) through() bool {
	a, b := c.h.server.number, c.server.number
	return c.h.w.reachable(a, b) && c.h.w.reachable(b, a)
}

// send carries a message to the replica and its answer back.
func (h *holder) send(e mirror.Effect) {
	c := h.conns[e.Peer]
	if c == nil || c.session != e.Session || !c.open {
		return
	}
	h.w.after(h.w.delay(), func() { c.deliver(e) })
}

func (c *conn) deliver(e mirror.Effect) {
	w := c.h.w
	if !c.open || c.server.run != c.run || !c.server.up {
		return
	}
	if !w.reachable(c.h.server.number, c.server.number) {
		c.breakLater()
		w.after(50*time.Millisecond, func() { c.deliver(e) })
		return
	}
	buf := e.Data
	if e.Verb.Reads() {
		buf = make([]byte, len(e.Data))
	}
	info, err := c.carryOut(e, buf)
	if errors.Is(err, replica.ErrFenced) {
		c.close(false)
		return
	}
	w.after(w.delay(), func() { c.answer(e, buf, info, err) })
}

// carryOut has the replica do what an effect asks, as a holder on its server would.
func (c *conn) carryOut(e mirror.Effect, buf []byte) (info mirror.Info, err error) {
	info, err = mirror.CarryOut(copyOf{c.sess}, &mirror.Message{
		Verb: e.Verb, Snapshot: e.Snapshot, Off: e.Off, Len: e.Len, Data: buf, FUA: e.FUA, Generation: e.Generation, Base: e.Base,
	}, grain)
	switch {
	case e.Verb != mirror.VerbBeginSync || err != nil:
	case info.Emptied:
		c.server.diskBroken = false // new files
		c.h.w.stats.Whole++
	default:
		c.h.w.stats.Partial++
	}
	return info, err
}

// copyOf is a session in the words of the holder.
type copyOf struct{ *replica.Session }

func (c copyOf) BeginSync(base, generation uint64, size int64) (mirror.Info, error) {
	info, err := c.Session.BeginSync(base, generation, size)
	return infoOf(info), err
}

func (c *conn) answer(e mirror.Effect, buf []byte, info mirror.Info, err error) {
	w := c.h.w
	if !c.open {
		return
	}
	if !w.reachable(c.server.number, c.h.server.number) {
		c.breakLater()
		w.after(50*time.Millisecond, func() { c.answer(e, buf, info, err) })
		return
	}
	if e.Verb.Reads() && err == nil {
		copy(e.Data, buf)
	}
	out := mirror.Done
	switch {
	case errors.Is(err, volume.ErrNoSpace):
		out = mirror.Full
	case errors.Is(err, volume.ErrDamaged):
		out = mirror.Damaged
	case errors.Is(err, volume.ErrNoSnapshot):
		out = mirror.Missing
	case err != nil:
		out = mirror.Broken
	}
	c.h.do(func(now time.Duration) []mirror.Effect {
		return c.h.core.Reply(now, c.peer, c.session, e.ID, out, info, err)
	})
}

// content is a replica's whole data, as a fresh session reads it.
func (s *server) content(epoch uint64) ([]byte, layer.Health, error) {
	r, err := s.store.Get(volumeID, uint32(s.number))
	if err != nil {
		return nil, 0, err
	}
	sess, info, err := r.Seal(epoch)
	if err != nil {
		return nil, 0, err
	}
	b := make([]byte, r.Info().Size)
	return b, info.Health, sess.ReadAt(b, 0)
}
