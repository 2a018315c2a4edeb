package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/image"
	"github.com/argon-cluster/argon/internal/image/seed"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// seeds makes the disks for guests' first boot; see agent.Seeds.
type seeds struct{}

// Write implements agent.Seeds.
func (seeds) Write(dir string, m *argonv1.Machine) (string, error) {
	files, err := seed.Files(m)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "seed.iso")
	return path, seed.Write(path, files)
}

// imageCopies is this server's store of images as the agent sees it.
type imageCopies struct {
	store    *image.Store
	replicas *replica.Store
	peers    *peers
	log      *slog.Logger
}

// List implements agent.Images.
func (c imageCopies) List(context.Context) ([]string, error) { return c.store.List() }

// Has implements agent.Images.
func (c imageCopies) Has(_ context.Context, imageID string) (bool, error) {
	return c.store.Has(imageID)
}

// Remove implements agent.Images. What replicas here still read stays.
func (c imageCopies) Remove(_ context.Context, imageID string) error {
	return c.replicas.RemoveImage(imageID, func() error { return c.store.Remove(imageID) })
}

// Fetch implements agent.Images: the first server that has the image whole is
// enough.
func (c imageCopies) Fetch(ctx context.Context, i *argonv1.Image, from []*argonv1.Server, progress func(copied, checked int64)) error {
	err := errors.New("no server that has it is alive")
	for _, s := range from {
		if err = c.fetchFrom(ctx, i, s, progress); err == nil || ctx.Err() != nil {
			return err
		}
		c.log.Warn("an image could not be copied from a server", "image", i.GetMeta().GetName(), "server", s.GetMeta().GetName(), "err", err)
	}
	return fmt.Errorf("copying image %s: %w", i.GetMeta().GetName(), err)
}

func (c imageCopies) fetchFrom(ctx context.Context, i *argonv1.Image, s *argonv1.Server, progress func(copied, checked int64)) error {
	images, err := c.peers.images(s.GetMeta().GetId())
	if err != nil {
		return err
	}
	stream, err := images.FetchImage(ctx, connect.NewRequest(&argonv1.FetchImageRequest{Id: i.GetMeta().GetId()}))
	if err != nil {
		return err
	}
	defer stream.Close()
	next := func() (image.Piece, error) {
		if !stream.Receive() {
			if err := stream.Err(); err != nil {
				return image.Piece{}, err
			}
			return image.Piece{}, io.EOF
		}
		return image.Piece{Offset: int64(stream.Msg().GetOffset()), Data: stream.Msg().GetData()}, nil
	}
	return c.store.Fetch(ctx, i.GetMeta().GetId(), int64(i.GetSizeBytes()), i.GetSha256(), next, func(p image.Progress) {
		if p.Phase == "checking" {
			progress(p.Total, p.Done)
		} else {
			progress(p.Done, 0)
		}
	})
}
