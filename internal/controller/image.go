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

// image keeps an image on enough servers, or finishes its removal. A copy that
// replicas on its server read from stays as long as that server does.
func (p *planner) image(i *argonv1.Image) {
	if i.GetRemoving() {
		p.removeImage(i)
		return
	}
	next := proto.CloneOf(i)
	next.Copies = slices.DeleteFunc(next.Copies, func(c *argonv1.ImageCopy) bool {
		if p.st.Servers[c.GetServerId()] != nil && placement.ImageNeeded(p.st, i.GetMeta().GetId(), c.GetServerId()) {
			return false
		}
		if p.evacuated(c.GetServerId()) && p.readyElsewhere(i, c) {
			return true
		}
		return p.writtenOff(c.GetServerId()) && (p.st.Servers[c.GetServerId()] == nil || p.readyElsewhere(i, c))
	})
	var stay, never []string
	for _, c := range next.GetCopies() {
		if never = append(never, c.GetServerId()); !p.writtenOff(c.GetServerId()) && !p.evacuated(c.GetServerId()) {
			stay = append(stay, c.GetServerId())
		}
	}
	if missing := ImageCopies - len(stay); missing > 0 && p.readyElsewhere(next, nil) {
		// With fewer servers than copies wanted, those there are have to do.
		found, _ := placement.PlaceReplicas(p.st, placement.Replicas{
			Count: missing, NeedBytes: i.GetSizeBytes(), SizeBytes: i.GetSizeBytes(), Stay: stay, Never: never,
			Near: placement.ImageUsers(p.st, i.GetMeta().GetId()),
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

// removeImage deletes the record of an image that no volume needs any more;
// servers then delete their copies.
func (p *planner) removeImage(i *argonv1.Image) {
	if len(placement.OnImage(p.st, i.GetMeta().GetId())) > 0 {
		return
	}
	delete(p.st.Images, i.GetMeta().GetId())
	p.act(Action{
		Why:    fmt.Sprintf("image %s is removed", i.GetMeta().GetName()),
		Delete: []proto.Message{i},
		Events: []*argonv1.Event{{
			Severity: argonv1.Severity_SEVERITY_INFO, Kind: "image", SubjectId: i.GetMeta().GetId(), SubjectName: i.GetMeta().GetName(),
			Reason: "image-removed", Message: "removed; no volume needs it any more",
		}},
	})
}

// readyElsewhere tells whether a server that lives has the whole image, not
// counting one copy.
func (p *planner) readyElsewhere(i *argonv1.Image, but *argonv1.ImageCopy) bool {
	return slices.ContainsFunc(i.GetCopies(), func(c *argonv1.ImageCopy) bool {
		return c.GetServerId() != but.GetServerId() && c.GetReady() && placement.Alive(p.st, c.GetServerId())
	})
}
