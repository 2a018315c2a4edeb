package agent

import (
	"context"
	"errors"
	"fmt"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// imageStep is what to do next with an image's copy on this server.
type imageStep uint8

const (
	asIs imageStep = iota
	fetch
	// confirm records that the copy is here.
	confirm
	// recheck looks again for a copy that should be here: it was imported
	// just now, or is lost.
	recheck
	// keepImage has a copy recorded again that was written off while this
	// server was away.
	keepImage
	deleteImage
)

func (s imageStep) String() string {
	return [...]string{"leave", "fetch", "confirm", "recheck", "keep", "delete"}[s]
}

// nextForImage names the next step. image is nil when its record is gone: an
// image, unlike a replica, can be deleted then, unless a replica here still
// reads from it: that one is needed.
func nextForImage(image *argonv1.Image, serverID string, here, hasSource, needed bool) imageStep {
	c := copyOn(image, serverID)
	switch {
	case c == nil && here && needed && image != nil:
		return keepImage
	case c == nil && here && needed:
		return asIs
	case c == nil && here:
		return deleteImage
	case c == nil:
		return asIs
	case here && !c.GetReady():
		return confirm
	case !here && c.GetReady():
		return recheck
	case !here && hasSource:
		return fetch
	}
	return asIs
}

// copyOn is a server's copy of an image; nil if it has none.
func copyOn(image *argonv1.Image, serverID string) *argonv1.ImageCopy {
	for _, c := range image.GetCopies() {
		if c.GetServerId() == serverID {
			return c
		}
	}
	return nil
}

func (p *plan) planImages() {
	a := p.agent
	ids := map[string]bool{}
	for id := range p.st.Images {
		ids[id] = true
	}
	for id := range a.images {
		ids[id] = true
	}
	for id := range ids {
		image := p.st.Images[id]
		from := p.imageSources(image)
		step := nextForImage(image, a.ServerID, a.images[id], len(from) > 0, placement.ImageNeeded(p.st, id, a.ServerID))
		j := job{step: step.String()}
		switch step {
		case asIs:
			continue
		case fetch:
			j.waits, j.run = true, func(ctx context.Context) error { return a.fetch(ctx, image, from) }
		case confirm:
			j.run = func(ctx context.Context) error { return a.setReady(ctx, id, true) }
		case recheck:
			j.run = func(ctx context.Context) error { return a.recheckImage(ctx, id) }
		case keepImage:
			j.run = func(ctx context.Context) error { return a.askForImage(ctx, id) }
		case deleteImage:
			j.run = func(ctx context.Context) error { return a.deleteImage(ctx, id) }
		}
		p.add("image/"+id, j)
	}
}

// imageSources lists the other servers that live and have the image.
func (p *plan) imageSources(image *argonv1.Image) []*argonv1.Server {
	var from []*argonv1.Server
	for _, c := range image.GetCopies() {
		s := p.st.Servers[c.GetServerId()]
		if c.GetReady() && s != nil && c.GetServerId() != p.agent.ServerID && placement.Alive(p.st, c.GetServerId()) {
			from = append(from, s)
		}
	}
	return from
}

func (a *Agent) fetch(ctx context.Context, image *argonv1.Image, from []*argonv1.Server) error {
	id := image.GetMeta().GetId()
	if err := a.Images.Fetch(ctx, image, from, a.reportFetch(ctx, id)); err != nil {
		return fmt.Errorf("fetch the image: %w", err)
	}
	a.mu.Lock()
	a.images[id] = true
	a.mu.Unlock()
	return a.setReady(ctx, id, true)
}

// reportFetch writes down how far the fetching of an image is, when it is told, and
// not all the time: who waits for a machine that is made of it can see that it goes
// on.
func (a *Agent) reportFetch(ctx context.Context, id string) func(copied, checked int64) {
	last := a.Now()
	return func(copied, checked int64) {
		if a.Now().Sub(last) < progressEvery {
			return
		}
		last = a.Now()
		_, err := a.Store.Images.Update(ctx, id, func(i *argonv1.Image) error {
			c := copyOn(i, a.ServerID)
			if c == nil || c.GetReady() {
				return ErrOvertaken
			}
			c.CopiedBytes, c.CheckedBytes = uint64(copied), uint64(checked)
			return nil
		})
		if err != nil && ctx.Err() == nil {
			a.Log.Debug("how far the fetching of an image is was not recorded", "image", id, "err", err)
		}
	}
}

func (a *Agent) setReady(ctx context.Context, id string, ready bool) error {
	_, err := a.Store.Images.Update(ctx, id, func(i *argonv1.Image) error {
		c := copyOn(i, a.ServerID)
		if c == nil || c.GetReady() == ready {
			return ErrOvertaken
		}
		c.Ready, c.CopiedBytes, c.CheckedBytes = ready, 0, 0
		return nil
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return ErrOvertaken
	}
	if err != nil {
		return fmt.Errorf("record whether the image is here: %w", err)
	}
	return nil
}

func (a *Agent) recheckImage(ctx context.Context, id string) error {
	here, err := a.Images.Has(ctx, id)
	if err != nil {
		return fmt.Errorf("look for the image: %w", err)
	}
	if !here {
		return a.setReady(ctx, id, false)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.images[id] = true
	return nil
}

func (a *Agent) deleteImage(ctx context.Context, id string) error {
	if err := a.Images.Remove(ctx, id); err != nil {
		return fmt.Errorf("delete the image: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.images, id)
	return nil
}
