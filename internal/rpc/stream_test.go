package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/volume/stream"
)

// store is a world with one volume, "db", whose content and snapshots are in
// memory: monday, and tuesday, which differs in one region.
func store(t *testing.T) (w *world, fake *fakeVolumes, monday, tuesday []byte) {
	t.Helper()
	w = withVolume(t, "db")
	monday = disk(8 * mib)
	clear(monday[2*mib : 5*mib])
	tuesday = slices.Clone(monday)
	copy(tuesday[3*mib+4096:], "written on tuesday")
	clear(tuesday[6*mib : 6*mib+64<<10])
	w.must(w.snapshot("db", "monday"))
	w.must(w.snapshot("db", "tuesday"))
	w.record("db", func(v *argonv1.Volume) { v.Snapshots[0].Generation, v.Snapshots[1].Generation = 10, 20 })
	v, err := w.store.Volumes.ByName(t.Context(), "db")
	w.must(err)
	id := v.GetMeta().GetId()
	fake = &fakeVolumes{disks: map[string]*fakeDisk{}, snapshots: map[string]fakeView{
		id + "/1": {data: monday}, id + "/2": {data: tuesday, before: monday},
	}}
	w.parts.Volumes = fake
	w.parts.ServerID = v.GetReplicas()[0].GetServerId()
	return w, fake, monday, tuesday
}

func (w *world) export(req *argonv1.ExportVolumeRequest) ([]byte, error) {
	s, err := w.volumes.ExportVolume(w.t.Context(), connect.NewRequest(req))
	w.must(err)
	defer s.Close()
	var b bytes.Buffer
	for s.Receive() {
		b.Write(s.Msg().GetData())
		b.Write(make([]byte, s.Msg().GetZeros()))
	}
	return b.Bytes(), s.Err()
}

func (w *world) importVolume(name string, data []byte) (*argonv1.VolumeView, error) {
	s := w.volumes.ImportVolume(w.t.Context())
	_ = s.Send(&argonv1.ImportVolumeRequest{Part: &argonv1.ImportVolumeRequest_Header_{Header: &argonv1.ImportVolumeRequest_Header{Name: name}}})
	for chunk := range slices.Chunk(data, 100_000) {
		if s.Send(&argonv1.ImportVolumeRequest{Part: &argonv1.ImportVolumeRequest_Data{Data: chunk}}) != nil {
			break
		}
	}
	_ = s.CloseRequest()
	defer s.CloseResponse()
	for {
		res, err := s.Receive()
		if err != nil {
			return nil, err
		}
		if res.GetVolume() != nil {
			return res.GetVolume(), nil
		}
	}
}

// diskFor gives a disk to each volume that is made, before it is connected.
func (w *world) diskFor(fake *fakeVolumes, name string, content []byte) *fakeDisk {
	d := &fakeDisk{data: content}
	w.parts.Volumes = &named{fake, w, name, d}
	return d
}

// named finds a disk by the volume's name, which a test knows before its id.
type named struct {
	*fakeVolumes
	w    *world
	name string
	disk *fakeDisk
}

func (n *named) Connect(_ context.Context, id string) (Connection, error) {
	if n.w.view.State().Volumes[id].GetMeta().GetName() != n.name {
		return nil, errors.New("another volume is connected")
	}
	return fakeConnection{disk: n.disk}, nil
}

func TestExport(t *testing.T) {
	w, _, monday, tuesday := store(t)
	raw, err := w.export(&argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "tuesday", Format: "raw"})
	if err != nil || !bytes.Equal(raw, tuesday) {
		t.Errorf("raw: %v, equal: %v", err, bytes.Equal(raw, tuesday))
	}
	whole, err := w.export(&argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "monday", Format: "stream"})
	w.must(err)
	h, err := stream.Verify(bytes.NewReader(whole))
	if err != nil || h.Size != int64(len(monday)) || h.Snapshot != (stream.Point{ID: 1, Generation: 10, Name: "monday"}) || !h.Whole() {
		t.Errorf("stream: %v, %v", h, err)
	}
	diff, err := w.export(&argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "tuesday", Since: "monday", Format: "stream"})
	w.must(err)
	h, err = stream.Verify(bytes.NewReader(diff))
	if err != nil || h.Base.Name != "monday" || len(diff) > 3*mib {
		t.Errorf("difference: %v, %v, %d bytes", h, err, len(diff))
	}
	for says, c := range map[string]struct {
		code connect.Code
		req  *argonv1.ExportVolumeRequest
	}{
		"use raw, qcow2 or stream": {connect.CodeInvalidArgument, &argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "monday", Format: "tar"}},
		"only a stream":            {connect.CodeInvalidArgument, &argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "tuesday", Since: "monday", Format: "raw"}},
		"was not taken before":     {connect.CodeInvalidArgument, &argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "monday", Since: "tuesday", Format: "stream"}},
		`no snapshot "friday"`:     {connect.CodeNotFound, &argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "friday", Format: "raw"}},
	} {
		_, err := w.export(c.req)
		wantError(t, err, c.code, says)
	}
	// Of the volume as it is: the snapshot for that is gone afterwards, also
	// when it could not be read.
	if _, err := w.export(&argonv1.ExportVolumeRequest{Volume: "db", Format: "raw"}); err == nil {
		t.Error("a snapshot that is nowhere was read")
	}
	_, err = w.parts.await(t.Context(), func(st *catalog.State) bool {
		v, _ := byName(st.Volumes, "db")
		return len(v.GetSnapshots()) == 2
	})
	w.must(err)
}

func TestImportStreams(t *testing.T) {
	w, fake, monday, tuesday := store(t)
	whole, err := w.export(&argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "monday", Format: "stream"})
	w.must(err)
	diff, err := w.export(&argonv1.ExportVolumeRequest{Volume: "db", Snapshot: "tuesday", Since: "monday", Format: "stream"})
	w.must(err)

	copied := w.diskFor(fake, "copy", make([]byte, len(monday)))
	for what, bad := range map[string][]byte{"cut": whole[:len(whole)-1], "flipped": flip(whole, len(whole)/2), "longer": append(slices.Clone(whole), 0)} {
		_, err := w.importVolume("copy", bad)
		wantError(t, err, connect.CodeInvalidArgument, "volume copy: the stream is damaged")
		if _, err := w.store.Volumes.ByName(t.Context(), "copy"); !errors.Is(err, catalog.ErrNotFound) || !allZero(copied.data) {
			t.Errorf("%s: something was made of it: %v", what, err)
		}
	}
	_, err = w.importVolume("copy", diff)
	wantError(t, err, connect.CodeFailedPrecondition, "import that one first")

	v, err := w.importVolume("copy", whole)
	w.must(err)
	if s := v.GetVolume().GetSnapshots(); !bytes.Equal(copied.data, monday) || len(s) != 1 || s[0].GetName() != "monday" || len(v.GetVolume().GetMeta().GetLabels()) != 0 {
		t.Fatalf("imported %v, equal: %v", v, bytes.Equal(copied.data, monday))
	}
	_, err = w.importVolume("copy", whole)
	wantError(t, err, connect.CodeAlreadyExists, "exists already")
	_, err = w.importVolume("db", diff)
	wantError(t, err, connect.CodeFailedPrecondition, "not the newest snapshot here")

	// The difference: refused when damaged, when the volume was written to
	// since, and taken back when it can't be applied whole.
	id := v.GetVolume().GetMeta().GetId()
	w.record("copy", func(v *argonv1.Volume) { v.Snapshots[0].Generation = 3 })
	_, err = w.importVolume("copy", flip(diff, len(diff)-70))
	wantError(t, err, connect.CodeInvalidArgument, "nothing was changed")
	if !bytes.Equal(copied.data, monday) {
		t.Error("a damaged stream has changed the volume")
	}
	w.seeNow(fake, id, monday, slices.Concat([]byte{1}, monday[1:]))
	_, err = w.importVolume("copy", diff)
	wantError(t, err, connect.CodeFailedPrecondition, "written to since its snapshot monday")

	w.seeNow(fake, id, monday, monday)
	copied.fails, copied.after = errors.New("the disk is on fire"), 1
	_, err = w.importVolume("copy", diff)
	if err == nil || !bytes.Contains([]byte(err.Error()), []byte("on fire")) {
		t.Errorf("a failing disk: %v", err)
	}
	w.record("copy", func(v *argonv1.Volume) {
		if v.GetRollbackTo() != 1 {
			t.Error("what was applied is not taken back")
		}
		v.RollbackTo = 0
	})
	copy(copied.data, monday)
	copied.fails = nil
	v, err = w.importVolume("copy", diff)
	w.must(err)
	if s := v.GetVolume().GetSnapshots(); !bytes.Equal(copied.data, tuesday) || len(s) != 2 || s[1].GetName() != "tuesday" {
		t.Errorf("brought up to date: %v, equal: %v", v, bytes.Equal(copied.data, tuesday))
	}
}

// seeNow says what the snapshots show that are taken next of a volume.
func (w *world) seeNow(fake *fakeVolumes, id string, base, now []byte) {
	for n := range 20 {
		fake.snapshots[fmt.Sprint(id, "/", n+2)] = fakeView{data: now, before: base}
	}
}

func flip(b []byte, at int) []byte {
	b = slices.Clone(b)
	b[at] ^= 1
	return b
}

func TestImportNonsense(t *testing.T) {
	w := newWorld(t)
	s := w.volumes.ImportVolume(t.Context())
	_ = s.CloseRequest()
	_, err := s.Receive()
	wantError(t, err, connect.CodeInvalidArgument, "begins with the volume's header")
	_, err = w.importVolume("Bad Name", nil)
	wantError(t, err, connect.CodeInvalidArgument, "volume name")
	_, err = w.importVolume("empty", nil)
	if err == nil || errors.Is(err, io.EOF) {
		t.Errorf("an empty file: %v", err)
	}
}
