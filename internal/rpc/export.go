package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image"
	"github.com/argon-cluster/argon/internal/placement"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/stream"
)

const (
	formatRaw    = "raw"
	formatQCOW2  = "qcow2"
	formatStream = "stream"

	// exportPiece is how much data one message carries at most.
	exportPiece = 1 << 20
)

type exportStream = *connect.ServerStream[argonv1.ExportVolumeResponse]

// ExportVolume reads a snapshot on a server that has it. If none is named, one
// is taken for the export only.
func (s volumeService) ExportVolume(ctx context.Context, req *connect.Request[argonv1.ExportVolumeRequest], to exportStream) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	m := req.Msg
	if !slices.Contains([]string{formatRaw, formatQCOW2, formatStream}, m.GetFormat()) {
		return invalid("volume %s: format %q: use raw, qcow2 or stream", m.GetVolume(), m.GetFormat())
	}
	if m.GetSince() != "" && m.GetFormat() != formatStream {
		return invalid("volume %s: only a stream can hold what differs from a snapshot", m.GetVolume())
	}
	if m.GetSnapshot() == "" {
		name, remove, err := p.passingSnapshot(ctx, m.GetVolume(), "export")
		if err != nil {
			return err
		}
		defer remove()
		m.Snapshot = name
	}
	what, err := p.planExport(ctx, m)
	if err != nil {
		return err
	}
	isForwarded := req.Header().Get(forwarded) != ""
	if !isForwarded && !slices.Contains(what.servers, p.ServerID) {
		return p.forwardExport(ctx, m, what.servers[0], to)
	}
	err = p.export(ctx, what, to)
	if errors.Is(err, volume.ErrDamaged) {
		return connect.NewError(connect.CodeDataLoss, fmt.Errorf("%w: run `argon volume scrub %s`, which mends it if another server has a good copy", err, m.GetVolume()))
	}
	return err
}

// passingSnapshot takes a snapshot that is needed for a moment only.
func (p *Parts) passingSnapshot(ctx context.Context, volume, why string) (name string, remove func(), err error) {
	name = why + "-" + strings.ToLower(catalog.NewID())
	ids, err := p.askForSnapshots(ctx, &argonv1.CreateSnapshotRequest{Volume: volume, Name: name})
	if err != nil {
		return "", nil, err
	}
	remove = func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*catalogTimeout)
		defer cancel()
		err := p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
			d := drafts{}
			for id := range ids {
				if v := st.Volumes[id]; snapshotOf(v, name) != nil {
					if _, err := planSnapshotRemoval(st, d, v, name, false); err != nil {
						return err
					}
				}
			}
			d.put(txn)
			return nil
		})
		if err != nil {
			p.Log.Warn("a snapshot that was needed for a moment is left", "volume", volume, "snapshot", name, "err", err)
		}
	}
	if _, err := p.awaitSnapshots(ctx, ids, name); err != nil {
		remove()
		return "", nil, err
	}
	return name, remove, nil
}

// toExport is what an export reads.
type toExport struct {
	volume         *argonv1.Volume
	snapshot, base *argonv1.Snapshot // base is nil for all of it
	cluster        string
	format         string
	// servers have the snapshot and live.
	servers []string
}

func (p *Parts) planExport(ctx context.Context, m *argonv1.ExportVolumeRequest) (toExport, error) {
	st, err := p.fresh(ctx)
	if err != nil {
		return toExport{}, err
	}
	v, s, err := findSnapshot(st, m.GetVolume(), m.GetSnapshot())
	if err != nil {
		return toExport{}, err
	}
	if err := usableSnapshot(v, s); err != nil {
		return toExport{}, err
	}
	what := toExport{volume: v, snapshot: s, cluster: st.Cluster.GetId(), format: m.GetFormat()}
	if m.GetSince() != "" {
		if _, what.base, err = findSnapshot(st, m.GetVolume(), m.GetSince()); err != nil {
			return toExport{}, err
		}
		if err := usableSnapshot(v, what.base); err != nil {
			return toExport{}, err
		}
		if what.base.GetId() >= s.GetId() {
			return toExport{}, invalid("volume %s: snapshot %s was not taken before snapshot %s", m.GetVolume(), m.GetSince(), s.GetName())
		}
	}
	var away []string
	for _, id := range placement.SnapshotServers(v, s) {
		if placement.Alive(st, id) {
			what.servers = append(what.servers, id)
		} else {
			away = append(away, serverName(st, id))
		}
	}
	if len(what.servers) == 0 {
		return toExport{}, connect.NewError(connect.CodeUnavailable, fmt.Errorf("snapshot %s/%s is only on server %s, which is down: start it", m.GetVolume(), s.GetName(), strings.Join(away, ", ")))
	}
	return what, nil
}

// header is that of a stream.
func (e toExport) header() stream.Header {
	h := stream.Header{
		ClusterID: e.cluster, VolumeID: e.volume.GetMeta().GetId(), VolumeName: e.volume.GetMeta().GetName(),
		Size: int64(e.snapshot.GetSizeBytes()), Taken: e.snapshot.GetCreated().GetSeconds(), Snapshot: pointOf(e.snapshot),
	}
	if e.base != nil {
		h.Base = pointOf(e.base)
	}
	return h
}

func pointOf(s *argonv1.Snapshot) stream.Point {
	return stream.Point{ID: s.GetId(), Generation: s.GetGeneration(), Name: s.GetName()}
}

// open finds the replica here that has the snapshot.
func (p *Parts) openSnapshot(e toExport) (SnapshotView, error) {
	for _, r := range e.volume.GetReplicas() {
		if r.GetServerId() == p.ServerID && slices.Contains(e.snapshot.GetReplicaIds(), r.GetId()) {
			view, err := p.Volumes.OpenSnapshot(e.volume.GetMeta().GetId(), r.GetId(), e.snapshot.GetId())
			if err != nil {
				return nil, fmt.Errorf("snapshot %s of volume %s: %w", e.snapshot.GetName(), e.volume.GetMeta().GetName(), err)
			}
			return view, nil
		}
	}
	return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("this server has snapshot %s of volume %s no more: try again", e.snapshot.GetName(), e.volume.GetMeta().GetName()))
}

// export reads the snapshot here.
func (p *Parts) export(ctx context.Context, e toExport, to exportStream) error {
	view, err := p.openSnapshot(e)
	if err != nil {
		return err
	}
	defer view.Close()
	h := e.header()
	err = to.Send(&argonv1.ExportVolumeResponse{Part: &argonv1.ExportVolumeResponse_Header_{Header: &argonv1.ExportVolumeResponse_Header{
		Volume: h.VolumeName, Snapshot: h.Snapshot.Name, SizeBytes: uint64(h.Size),
	}}})
	if err != nil {
		return err
	}
	tell := &exportProgress{to: to}
	switch e.format {
	case formatRaw:
		out := &rawSink{to: to}
		if err := stream.Walk(ctx, view, h.Size, 0, out, func(int64) {}); err != nil {
			return err
		}
		return out.skip(h.Size)
	case formatQCOW2:
		return p.exportQCOW2(ctx, view, h.Size, to, tell)
	}
	w, err := stream.NewWriter(dataWriter{to}, h)
	if err != nil {
		return err
	}
	err = stream.Walk(ctx, view, h.Size, h.Base.Generation, w, func(done int64) { tell.show("exporting", done, h.Size) })
	if err != nil {
		return err
	}
	return w.Close()
}

// exportQCOW2 makes the file here first: its parts are not written in order.
func (p *Parts) exportQCOW2(ctx context.Context, view SnapshotView, size int64, to exportStream, tell *exportProgress) error {
	fill := func(f *os.File) error {
		return stream.Walk(ctx, view, size, 0, fileSink{f}, func(done int64) { tell.show("reading", done, size) })
	}
	f, err := p.Images.QCOW2(ctx, size, fill, func(g image.Progress) { tell.show(g.Phase, g.Done, g.Total) })
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyBuffer(dataWriter{to}, struct{ io.Reader }{f}, make([]byte, exportPiece)); err != nil {
		return fmt.Errorf("sending the qcow2 file: %w", err)
	}
	return ctx.Err()
}

// forwardExport has a server that has the snapshot export it.
func (p *Parts) forwardExport(ctx context.Context, m *argonv1.ExportVolumeRequest, serverID string, to exportStream) error {
	volumes, err := p.Peers.Volumes(serverID)
	if err != nil {
		return err
	}
	req := connect.NewRequest(m)
	req.Header().Set(forwarded, p.ServerID)
	there, err := volumes.ExportVolume(ctx, req)
	if err != nil {
		return err
	}
	defer there.Close()
	for there.Receive() {
		if err := to.Send(there.Msg()); err != nil {
			return err
		}
	}
	return there.Err()
}

// dataWriter sends what is written.
type dataWriter struct{ to exportStream }

func (w dataWriter) Write(p []byte) (int, error) {
	for at := 0; at < len(p); at += exportPiece {
		part := p[at:min(at+exportPiece, len(p))]
		if err := w.to.Send(&argonv1.ExportVolumeResponse{Part: &argonv1.ExportVolumeResponse_Data{Data: part}}); err != nil {
			return at, err
		}
	}
	return len(p), nil
}

// rawSink sends a disk from its beginning to its end.
type rawSink struct {
	to   exportStream
	next int64
}

func (r *rawSink) Data(off int64, p []byte) error {
	if err := r.skip(off); err != nil {
		return err
	}
	r.next += int64(len(p))
	_, err := dataWriter{r.to}.Write(p)
	return err
}

func (r *rawSink) Zeros(int64, int64) error { return nil }

// skip says that there is nothing up to an offset.
func (r *rawSink) skip(off int64) error {
	n := off - r.next
	if n <= 0 {
		return nil
	}
	r.next = off
	return r.to.Send(&argonv1.ExportVolumeResponse{Part: &argonv1.ExportVolumeResponse_Zeros{Zeros: uint64(n)}})
}

// fileSink writes into an empty file of the right size.
type fileSink struct{ f *os.File }

func (s fileSink) Data(off int64, p []byte) error {
	_, err := s.f.WriteAt(p, off)
	return err
}

func (fileSink) Zeros(int64, int64) error { return nil }

// exportProgress tells the caller how far the server is, now and then. That it
// can't be told shows when data is sent.
type exportProgress struct {
	to    exportStream
	last  time.Time
	phase string
}

func (e *exportProgress) show(phase string, done, total int64) {
	if e.phase == phase && time.Since(e.last) < progressEvery {
		return
	}
	e.last, e.phase = time.Now(), phase
	_ = e.to.Send(&argonv1.ExportVolumeResponse{Part: &argonv1.ExportVolumeResponse_Progress{Progress: &argonv1.Progress{
		Phase: phase, DoneBytes: uint64(done), TotalBytes: uint64(total),
	}}})
}

// differs tells whether a volume was written to between two snapshots, on
// whichever server can tell.
func (p *Parts) differs(ctx context.Context, volume, since, until string) (bool, error) {
	m := &argonv1.ExportVolumeRequest{Volume: volume, Snapshot: until, Since: since, Format: formatStream}
	what, err := p.planExport(ctx, m)
	if err != nil {
		return false, err
	}
	if slices.Contains(what.servers, p.ServerID) {
		view, err := p.openSnapshot(what)
		if err != nil {
			return false, err
		}
		defer view.Close()
		h := what.header()
		err = stream.Walk(ctx, view, h.Size, h.Base.Generation, tripwire{}, func(int64) {})
		return errors.Is(err, errTouched), ignore(err, errTouched)
	}
	volumes, err := p.Peers.Volumes(what.servers[0])
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req := connect.NewRequest(m)
	req.Header().Set(forwarded, p.ServerID)
	there, err := volumes.ExportVolume(ctx, req)
	if err != nil {
		return false, err
	}
	defer there.Close()
	r, err := stream.NewReader(&exportReader{there: there})
	if err == nil {
		_, err = r.Next()
	}
	return err == nil, ignore(err, io.EOF)
}

var errTouched = errors.New("something is there")

// tripwire ends a walk at the first thing that it finds.
type tripwire struct{}

func (tripwire) Data(int64, []byte) error { return errTouched }
func (tripwire) Zeros(_, n int64) error   { return errTouched }

func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}

// exportReader reads the data of another server's export.
type exportReader struct {
	there *connect.ServerStreamForClient[argonv1.ExportVolumeResponse]
	rest  []byte
}

func (r *exportReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if !r.there.Receive() {
			if err := r.there.Err(); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		r.rest = r.there.Msg().GetData()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
