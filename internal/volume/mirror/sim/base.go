package sim

import (
	"context"
	"errors"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
	"github.com/argon-cluster/argon/internal/volume/mirror"
)

// This file lets a volume begin with an image, and be detached from it while all
// else happens.

const (
	imageID   = "image"
	imageFile = "/image"
	// imageSectors are fewer than the volume has: zeros follow.
	imageSectors = sectors - 5
)

// makeImage makes what the volume begins with: data, holes and zeros. To the
// checker it is something that was written and flushed before all else.
func (w *world) makeImage() []byte {
	var content []byte
	for i := range imageSectors {
		var v value
		if i/8%3 != 1 {
			w.values++
			v = w.values
			w.checker.Answered(w.checker.Write(operators, i, 1, v, false), nil)
		}
		content = append(content, fill(v, 1)...)
	}
	w.checker.Answered(w.checker.Flush(operators), nil)
	return content
}

// putImage puts an image on a server's disk, durably.
func putImage(fs *simfs.FS, content []byte) error {
	f, err := fs.Open(imageFile, true)
	if err != nil {
		return err
	}
	err = f.Truncate(int64(len(content)))
	for off := 0; err == nil && off < len(content); off += volume.SectorSize {
		if p := content[off : off+volume.SectorSize]; p[0] != 0 {
			_, err = f.WriteAt(p, int64(off))
		}
	}
	return errors.Join(err, f.Sync(), fs.SyncDir("/"))
}

// base is what replicas are made from.
func (w *world) base() layer.BaseRef {
	if !w.based {
		return layer.BaseRef{}
	}
	return layer.BaseRef{Image: imageID}
}

// makeLate does what the agent of a server does that has the image later than
// others: the replica is what all were before the first write.
func (w *world) makeLate() {
	if w.late == 0 {
		return
	}
	w.change("a replica is made late", func(v *argonv1.Volume) {
		r := v.GetReplicas()[w.late-1]
		r.State, r.Incarnation, r.Based = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC, 1, true
		r.EqualBefore = mirror.FirstGeneration
		if w.opts.BreakLate {
			r.EqualBefore = v.GetEqualBefore()
		}
	})
	w.late = 0
	w.stats.Late++
}

// wishDetached lets an operator want the volume to need its image no more.
func (w *world) wishDetached() {
	w.change("the volume shall be detached from its image", func(v *argonv1.Volume) {
		v.Base.Detaching = true
	})
}

// detachBase does what the agent of a server does for a replica that is to be
// detached from its base.
func (s *server) detachBase() error {
	r, err := s.store.Get(volumeID, uint32(s.number))
	if err != nil || !s.view.GetBase().GetDetaching() || !r.Based() {
		return err
	}
	more, err := r.DetachBase(context.Background())
	if err == nil && !more {
		s.w.trace("%s is detached from the image", s.name)
		s.w.stats.Detached++
	}
	return err
}
