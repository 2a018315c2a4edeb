package placement

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// Replicas is a wish for replicas of one volume.
type Replicas struct {
	// Count is how many are to be placed.
	Count int
	// NeedBytes is what is put into each replica at once. It may grow to the
	// volume's size later, if there is room then.
	NeedBytes uint64
	// SizeBytes is the size of each. A replica's layers are files of that size,
	// which not every file system can hold, however thin they are.
	SizeBytes uint64
	// Near lists the servers that have what the replica is made from; they
	// are preferred, and after them those that are Coming to have it.
	Near, Coming []string
	// OnlyNear: no other server can have one.
	OnlyNear bool
	// Stay lists the servers whose replicas of the volume are counted on:
	// their zones are avoided.
	Stay []string
	// Never lists further servers that must not get one, such as those that
	// are about to delete theirs.
	Never []string
}

// PlaceReplicas chooses servers for replicas: ones that hold their lease, are
// no witness and have room on their disks, never two of a volume on one. It
// spreads them over as many zones as it can (servers without a zone count as
// one zone); then it leaves out those that are crowded, then prefers servers that
// are near, then those with the smaller part of their disk promised, then the first
// by name. So what is made from one image does not all go where its copies are.
//
// When there are not enough servers it returns those it found together with an
// error that says in one line what is missing: the volume can be created
// degraded and is healed when servers come.
func PlaceReplicas(st *catalog.State, want Replicas) (serverIDs []string, err error) {
	all := candidates(st)
	var bad []string
	all = slices.DeleteFunc(all, func(c candidate) bool {
		if BadDisk(c.server) != "" {
			bad = append(bad, c.name())
		}
		return BadDisk(c.server) != ""
	})
	if want.OnlyNear {
		all = slices.DeleteFunc(all, func(c candidate) bool { return !slices.Contains(want.Near, c.id()) })
	}
	fit := slices.DeleteFunc(slices.Clone(all), func(c candidate) bool {
		return slices.Contains(want.Stay, c.id()) || slices.Contains(want.Never, c.id()) || c.free.GetDiskBytes() < want.room() || !CanHold(c.server, want.SizeBytes)
	})
	inZone := map[string]int{}
	for _, id := range want.Stay {
		inZone[st.Servers[id].GetZone()]++
	}
	far := func(c candidate) int {
		switch {
		case slices.Contains(want.Near, c.id()):
			return 0
		case slices.Contains(want.Coming, c.id()):
			return 1
		}
		return 2
	}
	// Taking the emptiest zone each time gives the most zones that are
	// possible: a server never changes what another zone can give.
	for len(serverIDs) < want.Count && len(fit) > 0 {
		isCrowded := crowded(fit)
		best := slices.MinFunc(fit, func(a, b candidate) int {
			return cmp.Or(
				cmp.Compare(inZone[a.server.GetZone()], inZone[b.server.GetZone()]),
				cmp.Compare(isCrowded(a), isCrowded(b)),
				cmp.Compare(far(a), far(b)),
				cmp.Compare(a.promised, b.promised),
				byName(a, b),
			)
		})
		serverIDs = append(serverIDs, best.id())
		inZone[best.server.GetZone()]++
		fit = slices.DeleteFunc(fit, func(c candidate) bool { return c.id() == best.id() })
	}
	if len(serverIDs) < want.Count {
		err := tooFew(all, want, len(serverIDs))
		if len(bad) > 0 {
			err = fmt.Errorf("%w; the disk of %s failed", err, strings.Join(bad, ", "))
		}
		return serverIDs, err
	}
	return serverIDs, nil
}

// crowdedBy is by how much more of its disk a server may have promised than the one
// with the least, and still be preferred for what it has already.
const crowdedBy = 0.1

// crowded tells which of some servers have promised so much that it is worth going
// elsewhere, and to copy what others have: 1, or 0.
func crowded(all []candidate) func(candidate) int {
	least := slices.MinFunc(all, func(a, b candidate) int { return cmp.Compare(a.promised, b.promised) }).promised
	return func(c candidate) int {
		if c.promised > least+crowdedBy {
			return 1
		}
		return 0
	}
}

// room is what a server must have free. One whose disk is full up to the
// reserve gets nothing, not even what needs no room yet.
func (r Replicas) room() uint64 { return max(r.NeedBytes, leastRoom) }

// CanHold tells whether a server's file system can hold a replica of that size,
// leaving aside whether there is room for what is in it.
func CanHold(s *argonv1.Server, sizeBytes uint64) bool {
	largest := s.GetCapacity().GetLargestFileBytes()
	return largest == 0 || sizeBytes <= largest
}

// leastRoom is what a new replica needs for its tables and its first writes.
const leastRoom = 16 << 20

// tooFew says why so few servers were found.
func tooFew(all []candidate, want Replicas, found int) error {
	open := slices.DeleteFunc(all, func(c candidate) bool {
		return slices.Contains(want.Stay, c.id()) || slices.Contains(want.Never, c.id())
	})
	total := len(want.Stay) + want.Count
	switch {
	case want.OnlyNear && len(open) == 0:
		return errors.New("no server that has what it is made from is alive")
	case len(open) == 0 && len(want.Stay) == 0:
		return errors.New("no server that may keep volumes is alive")
	case len(open) < want.Count:
		have := ""
		if want.OnlyNear {
			have = " and have what they are made from"
		}
		return fmt.Errorf("%s would need %s that are alive%s; there %s",
			plural(total, "replica"), plural(total, "server"), have, isAre(len(open)+len(want.Stay)))
	}
	able := slices.DeleteFunc(slices.Clone(open), func(c candidate) bool { return !CanHold(c.server, want.SizeBytes) })
	if len(able) == 0 {
		most := slices.MaxFunc(open, func(a, b candidate) int {
			return cmp.Or(cmp.Compare(a.server.GetCapacity().GetLargestFileBytes(), b.server.GetCapacity().GetLargestFileBytes()), byName(b, a))
		})
		return fmt.Errorf("no server's file system can hold a volume of %s; the most is %s on server %s",
			humanize.IBytes(want.SizeBytes), humanize.IBytes(most.server.GetCapacity().GetLargestFileBytes()), most.name())
	}
	if len(able) < want.Count {
		return fmt.Errorf("only %s of the %d needed %s a file system that can hold a volume of %s",
			plural(len(able), "server"), want.Count, hasHave(len(able)), humanize.IBytes(want.SizeBytes))
	}
	most := slices.MaxFunc(open, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.free.GetDiskBytes(), b.free.GetDiskBytes()), byName(b, a))
	})
	if found == 0 {
		return fmt.Errorf("no server has %s of disk free; the most is %s on server %s",
			humanize.IBytes(want.room()), humanize.IBytes(most.free.GetDiskBytes()), most.name())
	}
	return fmt.Errorf("only %s of the %d needed %s %s of disk free",
		plural(found, "server"), want.Count, hasHave(found), humanize.IBytes(want.room()))
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

func isAre(n int) string {
	if n == 1 {
		return "is 1"
	}
	return fmt.Sprintf("are %d", n)
}

func hasHave(n int) string {
	if n == 1 {
		return "has"
	}
	return "have"
}

// Holders lists the servers that a volume's replicas are on, whatever their
// state, in the order of the record.
func Holders(v *argonv1.Volume) []string {
	var ids []string
	for _, r := range v.GetReplicas() {
		ids = append(ids, r.GetServerId())
	}
	return ids
}
