package mirror

import (
	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// This file lets the volume grow: first its replicas, then the record, then
// what requests may reach. So whoever comes next finds replicas that are at
// least as large as the record says; what is beyond reads as zeros on each.

// growing is a growth under way.
type growing struct {
	under bool
	to    uint64
	done  bool // by all replicas in sync
}

// tryGrow begins a growth that the record asks for. A replica that begins to be
// copied to is told of a size; so neither begins during the other. Nor while
// checksums are asked for: of the last region a replica that has grown has more.
func (c *Core) tryGrow() {
	g := &c.grow
	if g.under || c.volume.GetWantedBytes() <= uint64(c.cfg.Size) || c.anyRole(starting) || c.scrub.busy || c.scrub.mending > 0 {
		return
	}
	*g = growing{under: true, to: c.volume.GetWantedBytes()}
	c.submit(&op{verb: VerbResize, who: everyone, len: int64(g.to), then: func(*op) { g.done = true }})
}

// grown ends a growth that was recorded.
func (c *Core) grown(v *argonv1.Volume, to uint64) {
	if to == 0 {
		return
	}
	c.grow = growing{}
	old := c.cfg.Size
	c.cfg.Size = max(old, int64(v.GetSizeBytes()))
	for _, p := range c.peers {
		cp := p.copy
		switch {
		case p.role != syncing:
		case cp.listedTo < old: // lists end where a byte does: begin again
			p.run++
			c.dropBlocked(p)
			cp.todo, cp.going, cp.listing, cp.listedTo, cp.total = nil, nil, false, 0, 0
		default:
			// What is new is equal: it holds nothing, and every write goes there.
			more := make([]byte, wire.BitBytes(c.cfg.Size, c.cfg.Grain)-int64(len(cp.todo)))
			cp.todo, cp.going, cp.listedTo = append(cp.todo, more...), append(cp.going, more...), c.cfg.Size
		}
	}
	c.emit(Effect{Grown: true, Len: c.cfg.Size})
	c.tell(argonv1.Severity_SEVERITY_INFO, "volume-grown", "the volume has %d bytes now", c.cfg.Size)
}
