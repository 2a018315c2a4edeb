package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image"
)

type machineImport = connect.BidiStream[argonv1.ImportMachineRequest, argonv1.ImportMachineResponse]

// ImportMachine makes volumes of the files that come, on servers that the
// cluster chooses, and a machine of the volumes. Nothing is recorded before all
// files are here and found whole; if anything fails later, or the caller goes
// away, the volumes are removed again.
func (s machineService) ImportMachine(ctx context.Context, stream *machineImport) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	first, err := stream.Receive()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	req := first.GetMachine()
	if req == nil || req.GetImage() != "" || len(req.GetVolumes()) > 0 {
		return invalid("an import begins with the machine, without an image and volumes")
	}
	if err := p.mayImport(ctx, req); err != nil {
		return err
	}
	say := throttled(func(g image.Progress) error {
		return stream.Send(&argonv1.ImportMachineResponse{Phase: g.Phase, DoneBytes: uint64(g.Done), TotalBytes: uint64(g.Total)})
	})
	given, err := p.receiveDisks(ctx, stream, req, say)
	defer func() {
		for _, g := range given {
			g.Close()
		}
	}()
	if err != nil {
		return fmt.Errorf("machine %s: %w", req.GetName(), err)
	}
	view, warnings, err := p.machineOf(ctx, s, req, given, say)
	if err != nil {
		return err
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_INFO, "machine", view.GetMachine().GetMeta().GetId(), req.GetName(), "machine-imported", "its disks came from elsewhere")
	return stream.Send(&argonv1.ImportMachineResponse{Phase: "done", Machine: view, Warnings: warnings})
}

// mayImport refuses early what would be refused in the end.
func (p *Parts) mayImport(ctx context.Context, req *argonv1.CreateMachineRequest) error {
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	if st.Servers[p.ServerID].GetWitness() {
		return precondition("server %s is a witness and has no disks: import on another", serverName(st, p.ServerID))
	}
	if err := checkName("machine", req.GetName()); err != nil {
		return err
	}
	if _, ok := byName(st.Machines, req.GetName()); ok {
		return exists("machine", req.GetName())
	}
	if v, ok := byName(st.Volumes, req.GetName()); ok {
		return inTheWay(st, v)
	}
	if err := freePorts(st, req.GetName(), req.GetPorts()); err != nil {
		return err
	}
	_, err = checkReplicas(req.GetName(), req.GetReplicas())
	return err
}

// receiveDisks takes in all files. What it returns is to be closed, also with an
// error. The first OVA's words about its machine fill in what req leaves open.
func (p *Parts) receiveDisks(ctx context.Context, stream *machineImport, req *argonv1.CreateMachineRequest, say func(image.Progress)) ([]*image.Given, error) {
	in := &filesReader{stream: stream}
	var given []*image.Given
	disks := 0
	for {
		file, err := in.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return given, err
		}
		if file.GetSha256() != "" && !goodSum.MatchString(file.GetSha256()) {
			return given, invalid("%q is not a SHA-256 checksum: give 64 hexadecimal digits", file.GetSha256())
		}
		g, err := p.Images.Receive(ctx, image.Request{
			Data: in, Format: image.Format(file.GetFormat()), SHA256: file.GetSha256(), Size: int64(min(file.GetSizeBytes(), image.MaxSize)),
		}, say)
		if err != nil {
			return given, fmt.Errorf("%s: %w", file.GetName(), err)
		}
		given = append(given, g)
		if disks += len(g.Disks()); disks > maxDisks {
			return given, invalid("%d disks: at most %d", disks, maxDisks)
		}
		applyHints(req, hints(g.Hints))
		if len(req.GetMacs()) == 0 {
			req.Macs = g.MACs[:min(len(g.MACs), int(req.GetNetworks()))]
		}
	}
	if disks == 0 {
		return given, invalid("give at least one disk")
	}
	return given, nil
}

// filesReader reads one file after the other from an import's stream.
type filesReader struct {
	stream *machineImport
	rest   []byte
	after  *argonv1.ImportMachineRequest_File // begins what comes next
	begun  bool
}

// next is the next file; io.EOF after the last. What of the one before was not
// read is skipped.
func (r *filesReader) next() (*argonv1.ImportMachineRequest_File, error) {
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	if r.after == nil {
		return nil, io.EOF
	}
	file := r.after
	r.after, r.begun = nil, true
	return file, nil
}

// Read implements io.Reader, up to the end of one file.
func (r *filesReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.after != nil {
			return 0, io.EOF
		}
		m, err := r.stream.Receive()
		if err != nil {
			return 0, asReader(err)
		}
		switch {
		case m.GetFile() != nil:
			r.after = m.GetFile()
		case m.GetMachine() != nil || !r.begun:
			return 0, invalid("an import has one machine, then files, each before its data")
		default:
			r.rest = m.GetData()
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// machineOf makes the volumes, fills them, and makes the machine.
func (p *Parts) machineOf(ctx context.Context, s machineService, req *argonv1.CreateMachineRequest, given []*image.Given, say func(image.Progress)) (*argonv1.MachineView, []string, error) {
	var taken []string
	if st, err := p.fresh(ctx); err != nil {
		return nil, nil, err
	} else if len(req.GetMacs()) > 0 {
		req.Macs, taken = keepFreeMACs(st, req.GetMacs())
	}
	names, err := p.makeVolumes(ctx, req, given)
	if err == nil {
		err = p.fillVolumes(ctx, names, given, say)
	}
	if err == nil {
		req.Volumes, req.Replicas = names, 0
		var res *connect.Response[argonv1.CreateMachineResponse]
		if res, err = s.createMachine(ctx, req, true); err == nil {
			return res.Msg.GetMachine(), append(taken, res.Msg.GetWarnings()...), nil
		}
	}
	return nil, nil, errors.Join(err, p.dropVolumes(context.WithoutCancel(ctx), names))
}

// makeVolumes makes one for each disk, called like the machine.
func (p *Parts) makeVolumes(ctx context.Context, req *argonv1.CreateMachineRequest, given []*image.Given) ([]string, error) {
	var names []string
	err := p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		names = nil
		for _, g := range given {
			for _, size := range g.Disks() {
				name := req.GetName()
				if n := len(names); n > 0 {
					name = fmt.Sprintf("%.60s-%d", name, n+1)
				}
				want := newVolume{name: name, size: wholeMiB(uint64(size)), replicas: req.GetReplicas()}
				if _, err := p.planVolume(st, txn, want); err != nil {
					return err
				}
				names = append(names, name)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	_, err = p.await(bounded, func(st *catalog.State) bool {
		for _, name := range names {
			if v, ok := byName(st.Volumes, name); ok && !settled(st, v) {
				return false
			}
		}
		return true
	})
	return names, err
}

func (p *Parts) fillVolumes(ctx context.Context, names []string, given []*image.Given, say func(image.Progress)) error {
	for _, g := range given {
		for i := range g.Disks() {
			if err := p.fillVolume(ctx, names[0], g, i, say); err != nil {
				return fmt.Errorf("filling volume %s: %w", names[0], err)
			}
			names = names[1:]
		}
	}
	return nil
}

func (p *Parts) fillVolume(ctx context.Context, name string, g *image.Given, i int, say func(image.Progress)) error {
	return p.attachedHere(ctx, name, func(ctx context.Context, uri string) error {
		return g.WriteDisk(ctx, i, uri, func(x image.Progress) { say(image.Progress{Phase: "copying", Done: x.Done, Total: x.Total}) })
	})
}

// attachedHere runs do while a volume is attached here. It is told to end when the
// attachment does.
func (p *Parts) attachedHere(ctx context.Context, volume string, do func(ctx context.Context, uri string) error) error {
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	v, ok := byName(st.Volumes, volume)
	if !ok {
		return notFound("volume", volume)
	}
	c, err := p.Volumes.Connect(ctx, v.GetMeta().GetId())
	if err != nil {
		return precondition("connecting volume %s: %w", volume, err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-c.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	err = do(ctx, c.URI())
	lost := ctx.Err() != nil
	cancel()
	<-ended
	if err != nil && lost && c.Err() != nil {
		return connect.NewError(connect.CodeAborted, fmt.Errorf("volume %s is not attached here any more: %w", volume, c.Err()))
	}
	return err
}

// dropVolumes takes back what an import has made.
func (p *Parts) dropVolumes(ctx context.Context, names []string) error {
	if len(names) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		for _, name := range names {
			if v, ok := byName(st.Volumes, name); ok && userOf(st, v) == nil {
				p.planRemoval(st, txn, v)
			}
		}
		return nil
	})
}

// ExportMachine sends a stopped machine's disks as one file. A machine that is
// started meanwhile gets its disks, and the export ends.
func (s machineService) ExportMachine(ctx context.Context, req *connect.Request[argonv1.ExportMachineRequest], stream *connect.ServerStream[argonv1.ExportMachineResponse]) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	name := req.Msg.GetName()
	m, ok := byName(st.Machines, name)
	if !ok {
		return notFound("machine", name)
	}
	if m.GetServerId() != "" || m.GetWanted() == argonv1.Wanted_WANTED_RUNNING {
		return precondition("machine %s runs, or is about to: stop it first, or export a snapshot of its volumes with `argon volume export`", name)
	}
	ids := m.GetVolumeIds()
	if n := int(req.Msg.GetDisk()); n > len(ids) {
		return invalid("machine %s has %s, not %d", name, plural(uint64(len(ids)), "disk"), n)
	} else if n > 0 {
		ids = ids[n-1 : n]
	}
	var volumes []*argonv1.Volume
	for _, id := range ids {
		if st.Volumes[id] == nil {
			return precondition("machine %s: its volume %s is gone", name, id)
		}
		volumes = append(volumes, st.Volumes[id])
	}
	macs := []string{""}
	if n := m.GetNetworks(); len(n) > 0 {
		macs = nil
		for _, card := range n {
			macs = append(macs, card.GetMac())
		}
	}
	about := image.Description{Name: name, MACs: macs, Hints: image.Hints{
		CPUs: int(m.GetCpus()), MemoryBytes: int64(m.GetMemoryBytes()), Firmware: cmp.Or(m.GetFirmware(), "bios"),
	}}
	var packed *image.Packed
	err = p.allAttachedHere(ctx, volumes, nil, func(ctx context.Context, disks []image.Source) (err error) {
		packed, err = p.Images.Pack(ctx, image.Format(req.Msg.GetFormat()), about, disks, throttledExport(stream))
		return err
	})
	if err != nil {
		return fmt.Errorf("machine %s: %w", name, err)
	}
	defer packed.Close()
	_, err = packed.WriteTo(&exportWriter{stream: stream, total: packed.Size()})
	return err
}

// allAttachedHere is attachedHere for several.
func (p *Parts) allAttachedHere(ctx context.Context, volumes []*argonv1.Volume, before []image.Source, do func(context.Context, []image.Source) error) error {
	if len(volumes) == 0 {
		return do(ctx, before)
	}
	v := volumes[0]
	return p.attachedHere(ctx, v.GetMeta().GetName(), func(ctx context.Context, uri string) error {
		return p.allAttachedHere(ctx, volumes[1:], append(before, image.Source{URI: uri, Size: int64(v.GetSizeBytes())}), do)
	})
}

func throttledExport(stream *connect.ServerStream[argonv1.ExportMachineResponse]) func(image.Progress) {
	var last time.Time
	return func(g image.Progress) {
		if time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		_ = stream.Send(&argonv1.ExportMachineResponse{Phase: g.Phase, DoneBytes: uint64(g.Done), TotalBytes: uint64(g.Total)})
	}
}

// exportWriter sends what is written.
type exportWriter struct {
	stream      *connect.ServerStream[argonv1.ExportMachineResponse]
	done, total int64
}

// Write implements io.Writer.
func (w *exportWriter) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n := min(len(p)-sent, exportPiece)
		w.done += int64(n)
		err := w.stream.Send(&argonv1.ExportMachineResponse{
			Phase: "sending", DoneBytes: uint64(w.done), TotalBytes: uint64(w.total), Data: p[sent : sent+n],
		})
		if err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}
