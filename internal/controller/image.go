package controller

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/placement"
)

// ImageCopies is how many servers keep an image: enough that the loss of one
// does not lose it.
const ImageCopies = 2

// image keeps an image on enough servers.
func (p *planner) image(i *argonv1.Image) {
	next := proto.CloneOf(i)
	next.Copies = slices.DeleteFunc(next.Copies, func(c *argonv1.ImageCopy) bool {
		return p.writtenOff(c.GetServerId()) && (p.st.Servers[c.GetServerId()] == nil || p.readyElsewhere(i, c))
	})
	var stay, never []string
	for _, c := range next.GetCopies() {
		if never = append(never, c.GetServerId()); !p.writtenOff(c.GetServerId()) {
			stay = append(stay, c.GetServerId())
		}
	}
	if missing := ImageCopies - len(stay); missing > 0 && p.readyElsewhere(next, nil) {
		// With fewer servers than copies wanted, those there are have to do.
		found, _ := placement.PlaceReplicas(p.st, placement.Replicas{
			Count: missing, SizeBytes: i.GetSizeBytes(), Stay: stay, Never: never,
		})
		for _, id := range found {
			next.Copies = append(next.Copies, &argonv1.ImageCopy{ServerId: id})
		}
	}
	if proto.Equal(i, next) {
		return
	}
	p.st.Images[i.GetMeta().GetId()] = next
	p.act(Action{
		Why: fmt.Sprintf("image %s has its copies changed", i.GetMeta().GetName()),
		Put: []proto.Message{next},
	})
}

// readyElsewhere tells whether a server that lives has the whole image, not
// counting one copy.
func (p *planner) readyElsewhere(i *argonv1.Image, but *argonv1.ImageCopy) bool {
	return slices.ContainsFunc(i.GetCopies(), func(c *argonv1.ImageCopy) bool {
		return c.GetServerId() != but.GetServerId() && c.GetReady() && placement.Alive(p.st, c.GetServerId())
	})
}
