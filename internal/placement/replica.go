package placement

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/dustin/go-humanize"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// Replicas is a wish for replicas of one volume.
type Replicas struct {
	// Count is how many are to be placed.
	Count int
	// SizeBytes is the volume's size: what each replica may come to need.
	SizeBytes uint64
	// ImageID is the image the volume is filled from; servers that have it
	// are preferred. Empty for an empty volume.
	ImageID string
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
// one zone); then it prefers servers that have the image, then those with the
// larger part of their disk free, then the first by name.
//
// When there are not enough servers it returns those it found together with an
// error that says in one line what is missing: the volume can be created
// degraded and is healed when servers come.
func PlaceReplicas(st *catalog.State, want Replicas) (serverIDs []string, err error) {
	all := candidates(st)
	fit := slices.DeleteFunc(slices.Clone(all), func(c candidate) bool {
		return slices.Contains(want.Stay, c.id()) || slices.Contains(want.Never, c.id()) || c.free.GetDiskBytes() < want.SizeBytes
	})
	inZone := map[string]int{}
	for _, id := range want.Stay {
		inZone[st.Servers[id].GetZone()]++
	}
	withImage := map[string]int{}
	for _, c := range st.Images[want.ImageID].GetCopies() {
		if c.GetReady() {
			withImage[c.GetServerId()] = 1
		}
	}
	// Taking the emptiest zone each time gives the most zones that are
	// possible: a server never changes what another zone can give.
	for len(serverIDs) < want.Count && len(fit) > 0 {
		best := slices.MinFunc(fit, func(a, b candidate) int {
			return cmp.Or(
				cmp.Compare(inZone[a.server.GetZone()], inZone[b.server.GetZone()]),
				cmp.Compare(withImage[b.id()], withImage[a.id()]),
				cmp.Compare(freePart(b), freePart(a)),
				byName(a, b),
			)
		})
		serverIDs = append(serverIDs, best.id())
		inZone[best.server.GetZone()]++
		fit = slices.DeleteFunc(fit, func(c candidate) bool { return c.id() == best.id() })
	}
	if len(serverIDs) < want.Count {
		return serverIDs, tooFew(all, want, len(serverIDs))
	}
	return serverIDs, nil
}

// freePart is the free part of a server's disk, between 0 and 1.
func freePart(c candidate) float64 {
	return float64(c.free.GetDiskBytes()) / float64(max(1, c.server.GetCapacity().GetDiskBytes()))
}

// tooFew says why so few servers were found.
func tooFew(all []candidate, want Replicas, found int) error {
	open := slices.DeleteFunc(all, func(c candidate) bool {
		return slices.Contains(want.Stay, c.id()) || slices.Contains(want.Never, c.id())
	})
	total := len(want.Stay) + want.Count
	switch {
	case len(open) == 0 && len(want.Stay) == 0:
		return errors.New("no server that may keep volumes is alive")
	case len(open) < want.Count:
		return fmt.Errorf("%s would need %s that are alive; there %s",
			plural(total, "replica"), plural(total, "server"), isAre(len(open)+len(want.Stay)))
	}
	most := slices.MaxFunc(open, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.free.GetDiskBytes(), b.free.GetDiskBytes()), byName(b, a))
	})
	if found == 0 {
		return fmt.Errorf("no server has %s of disk free; the most is %s on server %s",
			humanize.IBytes(want.SizeBytes), humanize.IBytes(most.free.GetDiskBytes()), most.name())
	}
	return fmt.Errorf("only %s of the %d needed %s %s of disk free",
		plural(found, "server"), want.Count, hasHave(found), humanize.IBytes(want.SizeBytes))
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
