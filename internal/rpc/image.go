package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image"
	"github.com/argon-cluster/argon/internal/placement"
)

// progressEvery bounds how often an import tells how far it is.
const progressEvery = 200 * time.Millisecond

var goodSum = regexp.MustCompile(`^[0-9a-fA-F]{64}$`)

type imageService struct{ *API }

type importStream = connect.BidiStream[argonv1.ImportImageRequest, argonv1.ImportImageResponse]

// ImportImage stores the image on the server that is asked and records it;
// copies on other servers follow by themselves. If the caller goes away before
// it is recorded nothing is left.
func (s imageService) ImportImage(ctx context.Context, stream *importStream) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	header, err := receiveHeader(stream)
	if err != nil {
		return err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	if st.Servers[p.ServerID].GetWitness() {
		return precondition("server %s is a witness and keeps no images: import on another", serverName(st, p.ServerID))
	}
	if _, ok := byName(st.Images, header.GetName()); ok {
		return exists("image", header.GetName())
	}
	req := image.Request{
		URL: header.GetUrl(), Format: image.Format(header.GetFormat()),
		SHA256: header.GetSha256(), Size: int64(header.GetSizeBytes()),
	}
	if req.URL == "" {
		req.Data = &uploadReader[argonv1.ImportImageRequest_Header, *argonv1.ImportImageRequest]{receive: stream.Receive}
	}
	id := catalog.NewID()
	staged, err := p.Images.Import(ctx, id, req, throttled(func(g image.Progress) error {
		return stream.Send(&argonv1.ImportImageResponse{Phase: g.Phase, DoneBytes: uint64(g.Done), TotalBytes: uint64(g.Total)})
	}))
	if err != nil {
		return fmt.Errorf("image %s: %w", header.GetName(), err)
	}
	if err := p.recordImage(ctx, id, header, staged); err != nil {
		return err
	}
	if st, err = p.fresh(ctx); err != nil {
		return err
	}
	record := st.Images[id]
	if record == nil {
		return notFound("image", header.GetName()) // somebody was quick to remove it
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_INFO, "image", id, header.GetName(), "image-imported", "imported from "+header.GetSource())
	return stream.Send(&argonv1.ImportImageResponse{
		Phase: "done", DoneBytes: record.GetSizeBytes(), TotalBytes: record.GetSizeBytes(), Image: record,
	})
}

func receiveHeader(stream *importStream) (*argonv1.ImportImageRequest_Header, error) {
	first, err := stream.Receive()
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	header := first.GetHeader()
	if header == nil {
		return nil, invalid("an import begins with the image's header")
	}
	if err := checkName("image", header.GetName()); err != nil {
		return nil, err
	}
	if header.GetSha256() != "" && !goodSum.MatchString(header.GetSha256()) {
		return nil, invalid("image %s: %q is not a SHA-256 checksum: give 64 hexadecimal digits", header.GetName(), header.GetSha256())
	}
	if header.GetSizeBytes() > image.MaxSize {
		return nil, invalid("image %s: %d bytes are too many", header.GetName(), header.GetSizeBytes())
	}
	return header, nil
}

// recordImage makes the image known to the cluster. What is staged goes if that
// fails, unless it is not known whether it has: a record without its data would
// be worse than data without a record, which the agent deletes when it starts.
func (p *Parts) recordImage(ctx context.Context, id string, header *argonv1.ImportImageRequest_Header, staged *image.Staged) error {
	if err := ctx.Err(); err != nil {
		return errors.Join(err, staged.Discard())
	}
	ctx = context.WithoutCancel(ctx) // a caller who goes away now is too late
	tried := false
	err := p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		tried = false
		if _, ok := byName(st.Images, header.GetName()); ok {
			return exists("image", header.GetName())
		}
		txn.Create(&argonv1.Image{
			Meta:         &argonv1.Meta{Id: id, Name: header.GetName()},
			SizeBytes:    uint64(staged.Size),
			Sha256:       staged.SHA256,
			SourceFormat: string(staged.Format),
			Source:       cmp.Or(header.GetSource(), header.GetUrl()),
			Copies:       []*argonv1.ImageCopy{{ServerId: p.ServerID, Ready: true}},
			Hints:        hints(staged.Hints),
		})
		tried = true
		return nil
	})
	if err != nil && !(tried && connect.CodeOf(err) == connect.CodeUnavailable) {
		return errors.Join(err, staged.Discard())
	}
	staged.Done()
	return err
}

// hints are absent if nothing is known.
func hints(h image.Hints) *argonv1.MachineHints {
	if h == (image.Hints{}) {
		return nil
	}
	return &argonv1.MachineHints{Cpus: uint32(h.CPUs), MemoryBytes: uint64(h.MemoryBytes), Firmware: h.Firmware, Networks: uint32(h.Networks)}
}

func (s imageService) ListImages(ctx context.Context, _ *connect.Request[argonv1.ListImagesRequest]) (*connect.Response[argonv1.ListImagesResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	return answer(&argonv1.ListImagesResponse{Images: sorted(st.Images)}, nil)
}

func (s imageService) GetImage(ctx context.Context, req *connect.Request[argonv1.GetImageRequest]) (*connect.Response[argonv1.GetImageResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	i, ok := byName(st.Images, req.Msg.GetName())
	if !ok {
		return nil, notFound("image", req.Msg.GetName())
	}
	return answer(&argonv1.GetImageResponse{Image: i}, nil)
}

// RemoveImage forgets the image; servers delete their copies. It is refused
// while volumes are based on it, unless they are to be detached first.
func (s imageService) RemoveImage(ctx context.Context, req *connect.Request[argonv1.RemoveImageRequest]) (*connect.Response[argonv1.RemoveImageResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	name := req.Msg.GetName()
	res := &argonv1.RemoveImageResponse{}
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		i, ok := byName(st.Images, name)
		if !ok {
			return notFound("image", name)
		}
		based := placement.OnImage(st, i.GetMeta().GetId())
		if res.WaitsFor = namesOf(based); len(based) == 0 {
			txn.Delete(proto.CloneOf(i))
			return nil
		}
		if !req.Msg.GetDetach() {
			return precondition("%s based on image %s: remove them first, or have them copy what they need of it with --detach", areBased(based), name)
		}
		i = proto.CloneOf(i)
		i.Removing = true
		txn.Put(i)
		d := drafts{}
		d.detach(based)
		d.put(txn)
		return nil
	})
	return answer(res, err)
}

// FetchImage sends an image to another server.
func (s imageService) FetchImage(ctx context.Context, req *connect.Request[argonv1.FetchImageRequest], stream *connect.ServerStream[argonv1.FetchImageResponse]) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	err = p.Images.Send(ctx, req.Msg.GetId(), func(off int64, data []byte) error {
		return stream.Send(&argonv1.FetchImageResponse{Offset: uint64(off), Data: data})
	})
	if errors.Is(err, fs.ErrNotExist) {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("image %s is not on this server", req.Msg.GetId()))
	}
	return err
}
