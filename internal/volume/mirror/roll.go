package mirror

import (
	"slices"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// clock is the volume's generation, as this holder keeps it. Replicas stamp
// what is written with the generation that the holder says, durably before the
// data. A roll makes that useful: the holder takes the next generation, waits
// until every write of earlier ones is answered by all replicas in sync, and
// flushes them. Then whatever may differ between any two of them, now or after
// any crash, is stamped with the new generation or a later one.
type clock struct {
	generation uint64
	// used: something was stamped with the generation, or a replica entered
	// the set, which is worth a roll.
	used bool
	// last is when a roll began.
	last time.Duration
	// rollingTo is the generation of the roll under way, 0 if none is: it waits
	// for changes up to mark, then for flush.
	rollingTo uint64
	mark      uint64
	flush     *op
	// reached is how far each copy had come when the flush began.
	reached map[*peer]reached
	// equalBefore is the newest generation before which all is equal and
	// flushed; recorded is what the catalog knows of it.
	equalBefore, recorded uint64
}

// reached is a fact about a copy, if that is still the same one.
type reached struct {
	run  int
	fact fact
}

// tryRoll begins a roll when it is due, and goes on with one under way.
func (c *Core) tryRoll() {
	k := &c.clock
	switch {
	case k.rollingTo != 0:
		if k.flush == nil && (!c.changesUpTo(k.mark) || c.breaks(BreakRollUnfinished)) {
			k.flush = &op{verb: VerbFlush, who: everyone, then: c.rollFlushed}
			k.reached = map[*peer]reached{}
			for _, p := range c.peers {
				if f, ok := c.reachedBy(p, k.rollingTo); ok {
					k.reached[p] = reached{p.run, f}
				}
			}
			c.start(k.flush)
		}
	case c.proposed != nil || c.take.rolling || c.now-k.last < c.cfg.RollEvery || !sameSet(c.wantedSet(), c.set):
	case k.used || c.anyRole(catching) || c.anyRole(syncing):
		c.propose(Proposal{InSync: c.set, Generation: k.generation + 1})
	case k.equalBefore > k.recorded:
		c.propose(Proposal{InSync: c.set})
	}
}

// rolled goes on after a proposal was carried out; the set is still the one
// before.
func (c *Core) rolled(p *Proposal, v *argonv1.Volume) {
	k := &c.clock
	k.generation = max(k.generation, v.GetGeneration())
	k.recorded = max(k.recorded, p.EqualBefore)
	if p.Generation == 0 {
		// One that enters is equal from now on: soon the record shall say so.
		k.used = k.used || !sameSet(c.set, p.InSync)
		return
	}
	k.used, k.last, k.rollingTo, k.mark = false, c.now, k.generation, c.nextID
	c.takeRolled(k.generation)
	if c.breaks(BreakRollUnflushed) {
		c.rollFlushed(nil)
	}
}

// rollFlushed ends a roll.
func (c *Core) rollFlushed(o *op) {
	k := &c.clock
	if k.flush != o {
		return
	}
	k.equalBefore, k.rollingTo, k.flush = k.rollingTo, 0, nil
	for p, r := range k.reached {
		if p.run == r.run && p.copied() {
			c.record(r.fact)
		}
	}
	k.reached = nil
}

// changesUpTo tells whether a change that began before the mark is under way.
func (c *Core) changesUpTo(mark uint64) bool {
	return slices.ContainsFunc(c.inflight, func(o *op) bool { return o.id <= mark && o.changes() })
}
