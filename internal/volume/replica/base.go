package replica

import (
	"fmt"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
)

// base opens what a replica here begins with.
func (s *Store) base(ref layer.BaseRef) (layer.Base, error) {
	if ref.Image != "" {
		if s.opts.Images == nil {
			return nil, fmt.Errorf("image %s: there are none here", ref.Image)
		}
		base, err := layer.OpenImage(s.opts.FS, s.opts.Images(ref.Image))
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", ref.Image, err)
		}
		return base, nil
	}
	for _, r := range s.of(ref.Volume) {
		if v, err := r.openSnapshot(ref.Snapshot); err == nil {
			return v, nil
		}
	}
	return nil, fmt.Errorf("snapshot %d of volume %s: %w", ref.Snapshot, ref.Volume, volume.ErrNoSnapshot)
}

func closeBase(b layer.Base) error {
	if b == nil {
		return nil
	}
	return b.Close()
}

// of is the replicas of a volume that are here.
func (s *Store) of(volumeID string) []*Replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*Replica
	for k, r := range s.replicas {
		if k.volumeID == volumeID {
			list = append(list, r)
		}
	}
	return list
}
