package rpc

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file: growing, detaching and scrubbing volumes. Each is a wish in the
// record that the holder or the agents carry out.

// ResizeVolume answers once the volume has the size.
func (s volumeService) ResizeVolume(ctx context.Context, req *connect.Request[argonv1.ResizeVolumeRequest]) (*connect.Response[argonv1.ResizeVolumeResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	size := req.Msg.GetSizeBytes()
	id, err := p.changeVolume(ctx, req.Msg.GetName(), func(st *catalog.State, v *argonv1.Volume) error {
		if err := checkGrowth(v, size); err != nil {
			return err
		}
		if size > v.GetSizeBytes() {
			if err := checkHolds(st, v, size); err != nil {
				return err
			}
			v.WantedBytes = size
			return served(st, v, "growing")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	st, err := p.await(ctx, func(st *catalog.State) bool {
		v := st.Volumes[id]
		return v == nil || v.GetRemoving() || v.GetSizeBytes() >= size
	})
	if err != nil {
		return nil, err
	}
	v := st.Volumes[id]
	if v == nil || v.GetRemoving() {
		return nil, precondition("volume %s was removed while it grew", req.Msg.GetName())
	}
	return answer(&argonv1.ResizeVolumeResponse{Volume: volumeView(st, v)}, nil)
}

// checkGrowth refuses what is no growth.
func checkGrowth(v *argonv1.Volume, size uint64) error {
	name := v.GetMeta().GetName()
	if size < v.GetSizeBytes() {
		return invalid("volume %s has %s: it can only grow, since what lies beyond %s would be lost; to have less, copy it to a smaller volume",
			name, humanize.IBytes(v.GetSizeBytes()), humanize.IBytes(size))
	}
	if size < v.GetWantedBytes() {
		return precondition("volume %s is growing to %s already: give at least that", name, humanize.IBytes(v.GetWantedBytes()))
	}
	_, err := checkVolumeSize(name, size, origin{})
	return err
}

// checkHolds refuses a size that a server with a replica can't keep.
func checkHolds(st *catalog.State, v *argonv1.Volume, size uint64) error {
	for _, id := range placement.Holders(v) {
		if s := st.Servers[id]; !placement.CanHold(s, size) {
			return precondition("volume %s can't grow to %s: the file system of server %s, which has a replica, can't hold more than %s in a volume",
				v.GetMeta().GetName(), humanize.IBytes(size), s.GetMeta().GetName(), humanize.IBytes(s.GetCapacity().GetLargestFileBytes()))
		}
	}
	return nil
}

// DetachBase answers at once; the copying goes on in the background.
func (s volumeService) DetachBase(ctx context.Context, req *connect.Request[argonv1.DetachBaseRequest]) (*connect.Response[argonv1.DetachBaseResponse], error) {
	view, err := s.wish(ctx, req.Msg.GetName(), func(_ *catalog.State, v *argonv1.Volume) error {
		if v.GetBase() == nil {
			return precondition("volume %s has no base: it needs no image and no other volume", req.Msg.GetName())
		}
		v.Base.Detaching = true
		return nil
	})
	return answer(&argonv1.DetachBaseResponse{Volume: view}, err)
}

// ScrubVolume answers at once; a scrub that is under way, or waits for its
// turn, is the one that is meant.
func (s volumeService) ScrubVolume(ctx context.Context, req *connect.Request[argonv1.ScrubVolumeRequest]) (*connect.Response[argonv1.ScrubVolumeResponse], error) {
	var number uint64
	view, err := s.wish(ctx, req.Msg.GetName(), func(st *catalog.State, v *argonv1.Volume) error {
		if err := served(st, v, "scrub"); err != nil {
			return err
		}
		if v.GetScrub() == nil {
			v.Scrub = &argonv1.Scrub{}
		}
		if v.GetScrub().GetWanted() <= v.GetScrub().GetFinished() {
			v.Scrub.Wanted = v.GetScrub().GetFinished() + 1
		}
		number = v.GetScrub().GetWanted()
		return nil
	})
	return answer(&argonv1.ScrubVolumeResponse{Volume: view, Number: number}, err)
}

// wish changes a volume's record, and returns the volume as it is then.
func (s volumeService) wish(ctx context.Context, name string, change func(*catalog.State, *argonv1.Volume) error) (*argonv1.VolumeView, error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	id, err := p.changeVolume(ctx, name, change)
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	if v := st.Volumes[id]; v != nil {
		return volumeView(st, v), nil
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("volume %s is gone", name))
}

// changeVolume changes the record of a volume that is not being removed.
func (p *Parts) changeVolume(ctx context.Context, name string, change func(*catalog.State, *argonv1.Volume) error) (id string, err error) {
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		old, ok := byName(st.Volumes, name)
		if !ok {
			return notFound("volume", name)
		}
		if old.GetRemoving() {
			return precondition("volume %s is being removed", name)
		}
		id = old.GetMeta().GetId()
		v := proto.CloneOf(old)
		if err := change(st, v); err != nil {
			return err
		}
		if !proto.Equal(old, v) {
			txn.Put(v)
		}
		return nil
	})
	return id, err
}
