package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// healWithin bounds, in the world's time, how long a volume may take to be
// whole again once nothing goes wrong any more.
const healWithin = 2 * time.Minute

// Run runs one world.
func Run(o Options) Result {
	if o.Length == 0 {
		o.Length = 20 * time.Second
	}
	w := newWorld(o)
	w.based = o.Seed%3 == 0
	if err := w.build(1 + w.rng.IntN(3)); err != nil {
		w.fail("building the world: %w", err)
		return w.result()
	}
	w.move(w.servers[w.rng.IntN(len(w.servers))])
	w.tend()
	if w.late != 0 {
		w.after(w.between(0, o.Length), w.makeLate)
	}
	w.after(w.between(time.Millisecond, time.Second), w.fault)
	w.after(w.between(time.Millisecond, 4*time.Second), w.wish)
	if w.fewer {
		w.after(w.between(time.Millisecond, 4*time.Second), w.wishFewer)
	}
	w.run(o.Length, func() bool { return w.lost() })
	if w.violation == nil && !w.lost() {
		w.heal()
	}
	return w.result()
}

func newWorld(o Options) *world {
	w := &world{opts: o, rng: rand.New(rand.NewPCG(o.Seed, 0)), cut: map[[2]int]bool{}, kept: map[uint32]*kept{}, checker: NewChecker(maxSectors), fewer: o.Seed%4 == 0}
	pauses := []time.Duration{20 * time.Millisecond, 200 * time.Millisecond, time.Second}
	w.think = pauses[w.rng.IntN(len(pauses))]
	return w
}

// build makes servers and a volume of so many replicas, all in sync.
func (w *world) build(replicas int) error {
	v := &argonv1.Volume{Meta: &argonv1.Meta{Id: volumeID, Name: volumeID}, SizeBytes: volumeSize, ReplicasWanted: uint32(replicas)}
	var image []byte
	if w.based {
		image = w.makeImage()
		v.Base = &argonv1.Base{ImageId: imageID}
		w.after(w.between(0, 2*w.opts.Length), w.wishDetached)
	}
	// One server more than replicas: a holder need not have one.
	for n := 1; n <= replicas+1; n++ {
		s := newServer(w, n)
		w.servers = append(w.servers, s)
		if err := s.open(); err != nil {
			return err
		}
		if w.based {
			if err := putImage(s.fs, image); err != nil {
				return err
			}
		}
		info, err := s.store.Create(replica.CreateSpec{VolumeID: volumeID, ReplicaID: uint32(n), Size: volumeSize, Base: w.base()})
		if err != nil {
			return err
		}
		if n <= replicas {
			v.Replicas = append(v.Replicas, &argonv1.Replica{
				Id: uint32(n), ServerId: s.name, State: argonv1.ReplicaState_REPLICA_STATE_IN_SYNC, Incarnation: info.Incarnation,
			})
		}
	}
	if w.based && replicas > 1 && w.chance(0.5) {
		r := v.Replicas[w.rng.IntN(replicas)]
		w.late, r.State, r.Incarnation = r.GetId(), argonv1.ReplicaState_REPLICA_STATE_CREATING, 0
	}
	w.catalog = &catalog{w: w, volume: v}
	for _, s := range w.servers {
		w.upkeep(s)
	}
	return nil
}

// heal ends all faults, waits until the volume is whole, and looks whether its
// replicas are equal and hold what they may.
func (w *world) heal() {
	w.trace("the faults end")
	w.quiet = true
	clear(w.cut)
	w.catalog.away = false
	w.makeLate()
	if w.fewer {
		w.change("no replica shall leave", func(v *argonv1.Volume) {
			v.ReplicasWanted = uint32(len(v.GetReplicas()))
			for _, r := range v.GetReplicas() {
				r.Retiring = false
			}
		})
	}
	for _, s := range w.servers {
		s.fs.Full = false
		s.mendDisk()
		s.start()
	}
	whole := func() bool {
		v := w.catalog.volume
		return w.lost() || v.GetAttachment() != nil && w.current != nil && w.current.alive() && w.current.served &&
			!slices.ContainsFunc(v.GetReplicas(), func(r *argonv1.Replica) bool {
				return r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
			}) && wished(v)
	}
	w.run(w.now+healWithin, whole)
	if w.violation != nil || w.lost() {
		return
	}
	if !whole() {
		w.fail("the volume was not whole %s after the faults had ended: epoch %d%s", healWithin, w.catalog.volume.GetEpoch(), replicaStates(w.catalog.volume))
		return
	}
	w.run(w.now+3*time.Second, func() bool { return false })
	released := func() bool { return w.catalog.volume.GetAttachment() == nil }
	for range 10 { // a holder that stood still may end, and the next one has to
		w.detach()
		w.run(w.now+10*time.Second, released)
	}
	if w.violation == nil && !released() {
		w.fail("the volume could not be detached")
	}
	if w.violation == nil {
		w.compare()
	}
}

// compare looks at the replicas at rest.
func (w *world) compare() {
	end, err := w.checker.Check()
	if err != nil {
		w.fail("%w", err)
		return
	}
	if !w.catalog.volume.GetClean() {
		return // it was taken and released again without having served
	}
	for _, s := range w.catalog.volume.GetSnapshots() {
		w.compareSnapshot(s)
	}
	var first []byte
	for _, r := range w.catalog.volume.GetReplicas() {
		if r.GetState() != argonv1.ReplicaState_REPLICA_STATE_IN_SYNC {
			continue
		}
		s := w.servers[r.GetId()-1]
		b, health, err := s.content(w.catalog.volume.GetEpoch() + 1)
		if err != nil || health != 1 {
			w.fail("replica %d is in sync and cannot be read: health %d, %w", r.GetId(), health, err)
			return
		}
		if first == nil {
			first = b
		}
		if i := firstDifference(first, b); i >= 0 {
			w.fail("replicas differ at rest, in sector %d of %s", i/volume.SectorSize, s.name)
			return
		}
	}
	for i := range len(first) / volume.SectorSize {
		v, err := valueOf(first[i*volume.SectorSize : (i+1)*volume.SectorSize])
		if err != nil || !slices.Contains(end[i], v) {
			w.fail("sector %d holds %d at rest, it could hold %v: %w", i, v, end[i], err)
			return
		}
	}
}

func (w *world) result() Result {
	if w.violation == nil {
		if _, err := w.checker.Check(); err != nil {
			w.fail("%w", err)
		}
	}
	w.stats.Violation = w.violation
	if w.violation != nil {
		w.stats.Violation = fmt.Errorf("seed %d: %w", w.opts.Seed, w.violation)
	}
	return w.stats
}
