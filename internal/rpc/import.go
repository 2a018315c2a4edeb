package rpc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image"
	"github.com/argon-cluster/argon/internal/volume/stream"
)

// Labels say where an imported snapshot comes from, and that a volume is being
// filled.
const (
	labelImporting = "argon/importing"
	labelOrigin    = "argon/origin"
)

type importVolumeStream = connect.BidiStream[argonv1.ImportVolumeRequest, argonv1.ImportVolumeResponse]

// ImportVolume makes a volume of what it is sent, or brings one up to date with
// a stream. All of it is received and checked before anything is changed: a
// stream that is damaged, or cut off, leaves nothing behind.
func (s volumeService) ImportVolume(ctx context.Context, from *importVolumeStream) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	first, err := from.Receive()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	header := first.GetHeader()
	if header == nil {
		return invalid("an import begins with the volume's header")
	}
	if err := checkName("volume", header.GetName()); err != nil {
		return err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	if st.Servers[p.ServerID].GetWitness() {
		return precondition("server %s is a witness and keeps no data: import on another", serverName(st, p.ServerID))
	}
	i := &importing{Parts: p, header: header, tell: throttled(func(g image.Progress) error {
		return from.Send(&argonv1.ImportVolumeResponse{Progress: &argonv1.Progress{Phase: g.Phase, DoneBytes: uint64(g.Done), TotalBytes: uint64(g.Total)}})
	})}
	data := bufio.NewReaderSize(&uploadReader[argonv1.ImportVolumeRequest_Header, *argonv1.ImportVolumeRequest]{receive: from.Receive}, 64<<10)
	head, err := data.Peek(8)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var v *argonv1.Volume
	if header.GetFormat() == formatStream || header.GetFormat() == "" && stream.Looks(head) {
		v, err = i.stream(ctx, data)
	} else {
		v, err = i.image(ctx, data)
	}
	if err != nil {
		return about("volume "+header.GetName(), err)
	}
	if st, err = p.fresh(ctx); err != nil {
		return err
	}
	res := &argonv1.ImportVolumeResponse{Volume: volumeView(st, v)}
	if now := st.Volumes[v.GetMeta().GetId()]; now != nil {
		res.Volume, res.Warnings = volumeView(st, now), incomplete(st, now)
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_INFO, "volume", v.GetMeta().GetId(), header.GetName(), "volume-imported", i.said)
	return from.Send(res)
}

// about puts in front what an error is about.
func about(what string, err error) error {
	var coded *connect.Error
	if errors.As(err, &coded) {
		return connect.NewError(coded.Code(), fmt.Errorf("%s: %s", what, coded.Message()))
	}
	return fmt.Errorf("%s: %w", what, err)
}

// importing is one import under way.
type importing struct {
	*Parts
	header *argonv1.ImportVolumeRequest_Header
	tell   func(image.Progress)
	// said is what was imported, for the event.
	said string
}

// image makes a volume of a disk image.
func (i *importing) image(ctx context.Context, data io.Reader) (*argonv1.Volume, error) {
	if err := i.nameIsFree(ctx); err != nil {
		return nil, err
	}
	given, err := i.Images.Receive(ctx, image.Request{
		Data: data, Format: image.Format(i.header.GetFormat()), Size: int64(i.header.GetSizeBytes()),
	}, i.tell)
	if err != nil {
		return nil, err
	}
	defer given.Close()
	disks := given.Disks()
	if len(disks) != 1 {
		return nil, invalid("the file holds %d disks: a volume is one", len(disks))
	}
	i.said = "imported from a " + string(given.Format) + " file"
	size := wholeMiB(uint64(disks[0]))
	return i.fill(ctx, size, func(ctx context.Context, c Connection) error { return given.Fill(ctx, c.URI(), i.tell) })
}

func (i *importing) nameIsFree(ctx context.Context) error {
	st, err := i.fresh(ctx)
	if err != nil {
		return err
	}
	if _, ok := byName(st.Volumes, i.header.GetName()); ok {
		return connect.NewError(connect.CodeAlreadyExists, errors.New("it exists already: choose another name (only a stream of what differs from its newest snapshot can be imported into it)"))
	}
	return nil
}

// fill makes a new volume and has it written to. Until that is done nobody
// else can use it, and if it fails the volume goes.
func (i *importing) fill(ctx context.Context, size uint64, write func(context.Context, Connection) error) (*argonv1.Volume, error) {
	var v *argonv1.Volume
	err := i.change(ctx, func(st *catalog.State, txn *catalog.Txn) (err error) {
		v, err = i.planVolume(st, txn, newVolume{
			name: i.header.GetName(), size: size, replicas: i.header.GetReplicas(), labels: map[string]string{labelImporting: i.ServerID},
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	id := v.GetMeta().GetId()
	_, err = i.await(ctx, func(st *catalog.State) bool { return st.Volumes[id] == nil || settled(st, st.Volumes[id]) })
	if err == nil {
		err = i.connected(ctx, id, write)
	}
	if err == nil {
		v, err = i.Store.Volumes.Update(ctx, id, func(v *argonv1.Volume) error {
			delete(v.GetMeta().GetLabels(), labelImporting)
			return nil
		})
	}
	if err != nil {
		return nil, errors.Join(err, i.giveUp(ctx, id))
	}
	return v, nil
}

// connected writes to a volume while it is attached here.
func (i *importing) connected(ctx context.Context, id string, write func(context.Context, Connection) error) error {
	c, err := i.Volumes.Connect(ctx, id)
	if err != nil {
		return precondition("connecting it: %w", err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := make(chan struct{})
	defer func() { <-over }()
	stop, end := context.WithCancel(ctx)
	defer end()
	go func() {
		defer close(over)
		select {
		case <-c.Done():
			cancel(fmt.Errorf("it is not attached here any more: %w", c.Err()))
		case <-stop.Done():
		}
	}()
	if err := write(ctx, c); err != nil {
		return errors.Join(err, ignore(context.Cause(ctx), context.Canceled))
	}
	return nil
}

// giveUp removes a volume that was not filled.
func (i *importing) giveUp(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*catalogTimeout)
	defer cancel()
	err := i.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		if v := st.Volumes[id]; v != nil && !v.GetRemoving() {
			return i.planRemoval(st, txn, v)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("what was made of it is left: remove it with `argon volume rm %s`: %w", i.header.GetName(), err)
	}
	return nil
}

// stream receives a stream, checks it, and only then applies it.
func (i *importing) stream(ctx context.Context, data io.Reader) (*argonv1.Volume, error) {
	spool, err := i.Images.Spool()
	if err != nil {
		return nil, err
	}
	defer spool.Close()
	h, err := stream.Verify(&spooling{ctx: ctx, from: data, to: spool, total: int64(i.header.GetSizeBytes()), tell: i.tell})
	if err != nil {
		if errors.Is(err, stream.ErrDamaged) || errors.Is(err, stream.ErrUnknown) {
			return nil, invalid("%w; nothing was changed", err)
		}
		return nil, fmt.Errorf("receiving the stream: %w", err)
	}
	if err := checkName("snapshot", h.Snapshot.Name); err != nil {
		return nil, err
	}
	apply := func(ctx context.Context, c Connection) error { return i.apply(ctx, spool, c) }
	if !h.Whole() {
		return i.advance(ctx, h, apply)
	}
	if err := i.nameIsFree(ctx); err != nil {
		return nil, err
	}
	i.said = fmt.Sprintf("imported from a stream of snapshot %s/%s", h.VolumeName, h.Snapshot.Name)
	v, err := i.fill(ctx, (uint64(h.Size)+mib-1)/mib*mib, apply)
	if err != nil {
		return nil, err
	}
	return v, i.mark(ctx, h)
}

// mark keeps what was imported as a snapshot, which a later stream begins from.
func (i *importing) mark(ctx context.Context, h stream.Header) error {
	ids, err := i.askForSnapshots(ctx, &argonv1.CreateSnapshotRequest{
		Volume: i.header.GetName(), Name: h.Snapshot.Name, Labels: map[string]string{labelOrigin: originLabel(h.VolumeID, h.Snapshot)},
	})
	if err == nil {
		_, err = i.awaitSnapshots(ctx, ids, h.Snapshot.Name)
	}
	if err != nil {
		return fmt.Errorf("it was imported, but without a snapshot that a later stream could begin from: %w", err)
	}
	return nil
}

// originLabel names a snapshot for all clusters and times.
func originLabel(volumeID string, p stream.Point) string {
	return volumeID + "/" + strconv.FormatUint(uint64(p.ID), 10) + "/" + strconv.FormatUint(p.Generation, 10)
}

// isOrigin tells whether a snapshot is the one that a stream speaks of: itself,
// or as it was imported here.
func isOrigin(v *argonv1.Volume, s *argonv1.Snapshot, volumeID string, p stream.Point) bool {
	return s.GetLabels()[labelOrigin] == originLabel(volumeID, p) ||
		v.GetMeta().GetId() == volumeID && s.GetId() == p.ID && s.GetGeneration() == p.Generation
}

// advance brings a volume up to date that has the stream's base as its newest
// snapshot and was not written to since.
func (i *importing) advance(ctx context.Context, h stream.Header, apply func(context.Context, Connection) error) (*argonv1.Volume, error) {
	name := i.header.GetName()
	st, err := i.fresh(ctx)
	if err != nil {
		return nil, err
	}
	v, ok := byName(st.Volumes, name)
	if !ok {
		return nil, precondition("the stream is what differs from snapshot %s/%s: import that one first", h.VolumeName, h.Base.Name)
	}
	base, err := advanceable(st, v, h)
	if err != nil {
		return nil, err
	}
	if want := wholeMiB(uint64(h.Size)); want > v.GetSizeBytes() {
		i.tell(image.Progress{Phase: "growing"})
		if err := i.grow(ctx, v, want); err != nil {
			return nil, err
		}
	}
	id := v.GetMeta().GetId()
	begun := false
	err = i.connected(ctx, id, func(ctx context.Context, c Connection) error {
		if err := i.unwritten(ctx, base); err != nil {
			return err
		}
		begun = true
		return apply(ctx, c)
	})
	if err != nil {
		if begun {
			err = errors.Join(err, i.takeBack(ctx, id, base))
		}
		return nil, err
	}
	i.said = fmt.Sprintf("brought from snapshot %s to %s by a stream", base.GetName(), h.Snapshot.Name)
	return v, i.mark(ctx, h)
}

// advanceable finds the snapshot that the stream begins from.
func advanceable(st *catalog.State, v *argonv1.Volume, h stream.Header) (*argonv1.Snapshot, error) {
	if err := idleVolume(st, v, "importing"); err != nil {
		return nil, err
	}
	if err := filled(v); err != nil {
		return nil, err
	}
	if err := served(st, v, "importing"); err != nil {
		return nil, err
	}
	var newest *argonv1.Snapshot
	if n := len(v.GetSnapshots()); n > 0 {
		newest = v.GetSnapshots()[n-1]
	}
	switch {
	case newest == nil || !isOrigin(v, newest, h.VolumeID, h.Base):
		return nil, precondition("the stream is what differs from snapshot %s/%s, and that is not the newest snapshot here", h.VolumeName, h.Base.Name)
	case newest.GetState() != taken || newest.GetRemoving():
		return nil, precondition("its snapshot %s is still being taken, or removed: try again", newest.GetName())
	case snapshotOf(v, h.Snapshot.Name) != nil:
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("it has a snapshot %s already", h.Snapshot.Name))
	}
	return newest, nil
}

// filled refuses a volume that an import fills, or should have filled.
func filled(v *argonv1.Volume) error {
	if v.GetMeta().GetLabels()[labelImporting] != "" {
		return precondition("volume %s is being imported, or its import was cut short: then remove it", v.GetMeta().GetName())
	}
	return nil
}

func (i *importing) grow(ctx context.Context, v *argonv1.Volume, size uint64) error {
	id, err := i.changeVolume(ctx, v.GetMeta().GetName(), func(_ *catalog.State, v *argonv1.Volume) error {
		v.WantedBytes = max(v.GetWantedBytes(), size)
		return nil
	})
	if err != nil {
		return err
	}
	_, err = i.await(ctx, func(st *catalog.State) bool { return st.Volumes[id] == nil || st.Volumes[id].GetSizeBytes() >= size })
	return err
}

// unwritten refuses a volume that has more than its newest snapshot.
func (i *importing) unwritten(ctx context.Context, base *argonv1.Snapshot) error {
	name := i.header.GetName()
	now, remove, err := i.passingSnapshot(ctx, name, "import")
	if err != nil {
		return err
	}
	defer remove()
	differs, err := i.differs(ctx, name, base.GetName(), now)
	if err != nil {
		return err
	}
	if differs {
		return precondition("it was written to since its snapshot %s: go back to that with `argon snapshot rollback %s %s`, then import again", base.GetName(), name, base.GetName())
	}
	return nil
}

// takeBack undoes what was applied of a stream that could not be applied whole.
func (i *importing) takeBack(ctx context.Context, id string, base *argonv1.Snapshot) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*catalogTimeout)
	defer cancel()
	err := i.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		if v := proto.CloneOf(st.Volumes[id]); v != nil {
			v.RollbackTo = base.GetId()
			txn.Put(v)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("a part of it was applied: take it back with `argon snapshot rollback %s %s`: %w", i.header.GetName(), base.GetName(), err)
	}
	return nil
}

// apply writes a stream that was found whole to the volume.
func (i *importing) apply(ctx context.Context, spool *os.File, c Connection) error {
	if _, err := spool.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("reading what was received: %w", err)
	}
	r, err := stream.NewReader(spool)
	if err != nil {
		return err
	}
	w := newDeviceWriter(c.Device())
	for {
		rec, err := r.Next()
		if errors.Is(err, io.EOF) {
			return w.finish()
		}
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = w.put(rec)
		}
		if err != nil {
			return errors.Join(err, w.wait())
		}
		i.tell(image.Progress{Phase: "applying", Done: rec.Off + rec.Len, Total: r.Header().Size})
	}
}

// spooling keeps what is read, and tells how far it is.
type spooling struct {
	ctx   context.Context
	from  io.Reader
	to    *os.File
	done  int64
	total int64
	tell  func(image.Progress)
}

func (s *spooling) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.from.Read(p)
	if n > 0 {
		if _, werr := s.to.Write(p[:n]); werr != nil {
			return 0, fmt.Errorf("keeping what was received: %w", werr)
		}
		s.done += int64(n)
		s.tell(image.Progress{Phase: "receiving", Done: s.done, Total: s.total})
	}
	return n, err
}
