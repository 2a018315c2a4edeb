package rpc

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
)

// disk is a raw disk that can be imported.
func disk(size int) []byte {
	d := make([]byte, size)
	d[510], d[511], d[1000] = 0x55, 0xaa, 1
	return d
}

// importImage sends an image in pieces and returns what came back last.
func (w *world) importImage(header *argonv1.ImportImageRequest_Header, data []byte) (*argonv1.Image, error) {
	w.t.Helper()
	stream := w.images.ImportImage(w.t.Context())
	_ = stream.Send(&argonv1.ImportImageRequest{Part: &argonv1.ImportImageRequest_Header_{Header: header}})
	for piece := range chunks(data, 100_000) {
		if stream.Send(&argonv1.ImportImageRequest{Part: &argonv1.ImportImageRequest_Data{Data: piece}}) != nil {
			break // Receive tells why
		}
	}
	_ = stream.CloseRequest()
	defer stream.CloseResponse()
	for {
		res, err := stream.Receive()
		if err != nil {
			return nil, err
		}
		if res.GetImage() != nil {
			return res.GetImage(), nil
		}
	}
}

func chunks(data []byte, n int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(data) > 0 {
			k := min(n, len(data))
			if !yield(data[:k]) {
				return
			}
			data = data[k:]
		}
	}
}

func TestImages(t *testing.T) {
	w := newWorld(t)
	image, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian", Source: "debian.raw"}, disk(2*mib))
	w.must(err)
	if image.GetSizeBytes() != 2*mib || image.GetSourceFormat() != "raw" || len(image.GetSha256()) != 64 ||
		len(image.GetCopies()) != 1 || image.GetCopies()[0].GetServerId() != "A" || !image.GetCopies()[0].GetReady() {
		t.Errorf("got %v", image)
	}
	_, err = w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(mib))
	wantError(t, err, connect.CodeAlreadyExists, "debian")
	_, err = w.importImage(&argonv1.ImportImageRequest_Header{Name: "../x"}, disk(mib))
	wantError(t, err, connect.CodeInvalidArgument, "image name")
	_, err = w.importImage(&argonv1.ImportImageRequest_Header{Name: "x"}, []byte("what"))
	wantError(t, err, connect.CodeInvalidArgument, "nor a raw disk")
	_, err = w.importImage(&argonv1.ImportImageRequest_Header{Name: "x", Sha256: "12"}, disk(mib))
	wantError(t, err, connect.CodeInvalidArgument, "64 hex")
	_, err = w.importImage(&argonv1.ImportImageRequest_Header{Name: "x", Url: "http://localhost/"}, nil)
	wantError(t, err, connect.CodeInvalidArgument, "https")

	id := image.GetMeta().GetId()
	stream, err := w.images.FetchImage(t.Context(), connect.NewRequest(&argonv1.FetchImageRequest{Id: id}))
	w.must(err)
	got := make([]byte, 2*mib)
	for stream.Receive() {
		copy(got[stream.Msg().GetOffset():], stream.Msg().GetData())
	}
	if stream.Err() != nil || !bytes.Equal(got, disk(2*mib)) {
		t.Errorf("fetched something else, %v", stream.Err())
	}

	_, err = call(t, w.images.RemoveImage, &argonv1.RemoveImageRequest{Name: "debian"})
	w.must(err)
	list, err := call(t, w.images.ListImages, &argonv1.ListImagesRequest{})
	if err != nil || len(list.GetImages()) != 0 {
		t.Errorf("still there: %v, %v", list, err)
	}
}

func TestImageInUse(t *testing.T) {
	w := newWorld(t)
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(2*mib))
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "web", Image: "debian"})
	w.must(err)
	w.agents()
	_, err = w.parts.await(t.Context(), func(st *catalog.State) bool {
		v, _ := byName(st.Volumes, "web")
		return settled(st, v)
	})
	w.must(err)
	_, err = call(t, w.images.RemoveImage, &argonv1.RemoveImageRequest{Name: "debian"})
	wantError(t, err, connect.CodeFailedPrecondition, "volume web is based on image debian")

	res, err := call(t, w.images.RemoveImage, &argonv1.RemoveImageRequest{Name: "debian", Detach: true})
	w.must(err)
	view, err := call(t, w.volumes.GetVolume, &argonv1.GetVolumeRequest{Name: "web"})
	w.must(err)
	if len(res.GetWaitsFor()) != 1 || !view.GetVolume().GetVolume().GetBase().GetDetaching() || len(view.GetVolume().GetActivity()) != 2 {
		t.Errorf("detaching: waits for %v, %v", res.GetWaitsFor(), view)
	}
	_, err = call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "x", Image: "debian"})
	wantError(t, err, connect.CodeFailedPrecondition, "being removed")

	// The agents are done, and the leader has noticed.
	_, err = w.store.Volumes.Update(t.Context(), view.GetVolume().GetVolume().GetMeta().GetId(), func(v *argonv1.Volume) error {
		v.Base = nil
		return nil
	})
	w.must(err)
	_, err = call(t, w.images.RemoveImage, &argonv1.RemoveImageRequest{Name: "debian"})
	wantError(t, err, 0, "")
}

func TestMachines(t *testing.T) {
	w := newWorld(t)
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(2*mib+512))
	w.must(err)
	create := func(change func(*argonv1.CreateMachineRequest)) (*argonv1.CreateMachineResponse, error) {
		req := &argonv1.CreateMachineRequest{Name: "web", Image: "debian", Ports: ports(8080, 80)}
		change(req)
		return call(t, w.machines.CreateMachine, req)
	}
	res, err := create(func(*argonv1.CreateMachineRequest) {})
	w.must(err)
	m := res.GetMachine()
	if m.GetMachine().GetWanted() != argonv1.Wanted_WANTED_RUNNING || len(m.GetVolumeNames()) != 1 || m.GetVolumeNames()[0] != "web" {
		t.Errorf("got %v", m)
	}
	v, err := call(t, w.volumes.GetVolume, &argonv1.GetVolumeRequest{Name: "web"})
	if err != nil || v.GetVolume().GetVolume().GetSizeBytes() != 3*mib {
		t.Errorf("its disk: %v, %v", v, err)
	}
	w.agents()
	for says, c := range map[string]struct {
		code   connect.Code
		change func(*argonv1.CreateMachineRequest)
	}{
		`"web" exists`: {connect.CodeAlreadyExists, func(*argonv1.CreateMachineRequest) {}},
		"published by": {connect.CodeFailedPrecondition, func(r *argonv1.CreateMachineRequest) { r.Name = "x" }},
		`image "none"`: {connect.CodeNotFound, func(r *argonv1.CreateMachineRequest) { r.Name, r.Ports, r.Image = "x", nil, "none" }},
		"disk of machine": {connect.CodeFailedPrecondition, func(r *argonv1.CreateMachineRequest) {
			r.Name, r.Ports, r.Image, r.Volumes = "x", nil, "", []string{"web"}
		}},
		`volume "none"`: {connect.CodeNotFound, func(r *argonv1.CreateMachineRequest) {
			r.Name, r.Ports, r.Image, r.Volumes = "x", nil, "", []string{"none"}
		}},
		"memory free":      {connect.CodeResourceExhausted, func(r *argonv1.CreateMachineRequest) { r.Name, r.Ports, r.MemoryBytes = "x", nil, 1<<40 }},
		"KVM":              {connect.CodeResourceExhausted, func(r *argonv1.CreateMachineRequest) { r.Name, r.Ports, r.Acceleration = "x", nil, "kvm" }},
		"less than image":  {connect.CodeInvalidArgument, func(r *argonv1.CreateMachineRequest) { r.Name, r.Ports, r.DiskBytes = "x", nil, mib }},
		"server a for API": {connect.CodeFailedPrecondition, func(r *argonv1.CreateMachineRequest) { r.Name, r.Ports = "x", ports(7440, 1) }},
	} {
		_, err := create(c.change)
		wantError(t, err, c.code, says)
		if _, err := call(t, w.machines.GetMachine, &argonv1.GetMachineRequest{Name: "x"}); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("%s: something was made: %v", says, err)
		}
	}
	_, err = call(t, w.volumes.RemoveVolume, &argonv1.RemoveVolumeRequest{Name: "web"})
	wantError(t, err, connect.CodeFailedPrecondition, "machine web")
	_, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "web"})
	wantError(t, err, connect.CodeFailedPrecondition, "--force")

	stopped, err := call(t, w.machines.StopMachine, &argonv1.StopMachineRequest{Name: "web"})
	if err != nil || stopped.GetMachine().GetMachine().GetWanted() != argonv1.Wanted_WANTED_STOPPED || stopped.GetMachine().GetMachine().GetForceStop() {
		t.Errorf("stopping: %v, %v", stopped, err)
	}
	started, err := call(t, w.machines.StartMachine, &argonv1.StartMachineRequest{Name: "web"})
	if err != nil || started.GetMachine().GetMachine().GetWanted() != argonv1.Wanted_WANTED_RUNNING {
		t.Errorf("starting: %v, %v", started, err)
	}
	_, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "web", Force: true})
	w.must(err)
	for _, err := range []error{
		second(call(t, w.machines.GetMachine, &argonv1.GetMachineRequest{Name: "web"})),
		second(call(t, w.volumes.GetVolume, &argonv1.GetVolumeRequest{Name: "web"})),
	} {
		wantError(t, err, connect.CodeNotFound, "web")
	}
}

func second[T any](_ T, err error) error { return err }

func TestKeepVolumes(t *testing.T) {
	w := newWorld(t)
	w.agents()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	_, err = call(t, w.machines.CreateMachine, &argonv1.CreateMachineRequest{Name: "db", Volumes: []string{"data"}, Stopped: true})
	w.must(err)
	_, err = call(t, w.machines.RemoveMachine, &argonv1.RemoveMachineRequest{Name: "db", KeepVolumes: true})
	w.must(err)
	_, err = call(t, w.volumes.GetVolume, &argonv1.GetVolumeRequest{Name: "data"})
	wantError(t, err, 0, "")
}

// TestOnlyOneGetsIt lets many ask for the same at once.
func TestOnlyOneGetsIt(t *testing.T) {
	w := newWorld(t)
	w.agents()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "data", SizeBytes: mib})
	w.must(err)
	_, err = w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(mib))
	w.must(err)
	for what, req := range map[string]func(i int) *argonv1.CreateMachineRequest{
		"volume": func(i int) *argonv1.CreateMachineRequest {
			return &argonv1.CreateMachineRequest{Name: fmt.Sprintf("v%d", i), Volumes: []string{"data"}, Stopped: true}
		},
		"port": func(i int) *argonv1.CreateMachineRequest {
			return &argonv1.CreateMachineRequest{Name: fmt.Sprintf("p%d", i), Image: "debian", Ports: ports(80, 80), Stopped: true}
		},
		"name": func(int) *argonv1.CreateMachineRequest {
			return &argonv1.CreateMachineRequest{Name: "same", Image: "debian", Stopped: true}
		},
	} {
		t.Run(what, func(t *testing.T) {
			var wg sync.WaitGroup
			errs := make([]error, 6)
			for i := range errs {
				wg.Go(func() { _, errs[i] = call(t, w.machines.CreateMachine, req(i)) })
			}
			wg.Wait()
			won := 0
			for _, err := range errs {
				switch code := connect.CodeOf(err); {
				case err == nil:
					won++
				case code != connect.CodeFailedPrecondition && code != connect.CodeAlreadyExists:
					t.Errorf("got %v", err)
				}
			}
			if won != 1 {
				t.Errorf("%d of %d got the %s", won, len(errs), what)
			}
		})
	}
}

// console makes machine M on a server and opens its console.
func (w *world) console(serverID string) *connect.BidiStreamForClient[argonv1.ConsoleRequest, argonv1.ConsoleResponse] {
	w.t.Helper()
	w.must(w.store.Machines.Create(w.t.Context(), &argonv1.Machine{Meta: &argonv1.Meta{Id: "M", Name: "web"}, ServerId: serverID}))
	return w.machines.Console(w.t.Context())
}

func TestConsole(t *testing.T) {
	w := newWorld(t)
	echo(t, w.console("A"))
}

func echo(t *testing.T, stream *connect.BidiStreamForClient[argonv1.ConsoleRequest, argonv1.ConsoleResponse]) {
	t.Helper()
	if err := stream.Send(&argonv1.ConsoleRequest{Name: "web"}); err != nil {
		t.Fatal(err)
	}
	res, err := stream.Receive()
	if err != nil || string(res.GetData()) != "hello" {
		t.Fatalf("got %v, %v", res, err)
	}
	if err := stream.Send(&argonv1.ConsoleRequest{Data: []byte("ls")}); err != nil {
		t.Fatal(err)
	}
	res, err = stream.Receive()
	if err != nil || string(res.GetData()) != "ls" {
		t.Fatalf("got %v, %v", res, err)
	}
	_ = stream.CloseRequest()
	_ = stream.CloseResponse()
}

// onePeer is server B's API: the same handlers, with B's parts.
type onePeer struct {
	machines argonv1connect.MachineServiceClient
	volumes  argonv1connect.VolumeServiceClient
	servers  argonv1connect.ServerServiceClient
}

func (p onePeer) Servers(string) (argonv1connect.ServerServiceClient, error) { return p.servers, nil }

func (p onePeer) Volumes(string) (argonv1connect.VolumeServiceClient, error) { return p.volumes, nil }

func (p onePeer) Machines(serverID string) (argonv1connect.MachineServiceClient, error) {
	if serverID != "B" {
		return nil, errors.New("no such server")
	}
	return p.machines, nil
}

func TestConsoleOfAnotherServer(t *testing.T) {
	w := newWorld(t)
	there := *w.parts
	there.ServerID = "B"
	b := &world{t: t, local: &fakeLocal{parts: &there}}
	b.serve(ForSocket(New(b.local, w.parts.Log).Handler()))
	w.parts.Peers = onePeer{machines: b.machines}
	echo(t, w.console("B"))
}

func TestConsoleThatIsNotThere(t *testing.T) {
	for name, c := range map[string]struct {
		machine *argonv1.Machine
		code    connect.Code
		says    string
	}{
		"no machine":  {&argonv1.Machine{Meta: &argonv1.Meta{Name: "other"}}, connect.CodeNotFound, "web"},
		"not running": {&argonv1.Machine{Meta: &argonv1.Meta{Name: "web"}}, connect.CodeFailedPrecondition, "machine start web"},
		"not yet":     {&argonv1.Machine{Meta: &argonv1.Meta{Name: "web"}, ServerId: "A"}, connect.CodeFailedPrecondition, "yet"},
		"server down": {&argonv1.Machine{Meta: &argonv1.Meta{Name: "web"}, ServerId: "Z"}, connect.CodeUnavailable, "down"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.must(w.store.Machines.Create(t.Context(), c.machine))
			stream := w.machines.Console(t.Context())
			_ = stream.Send(&argonv1.ConsoleRequest{Name: "web"})
			_, err := stream.Receive()
			wantError(t, err, c.code, c.says)
		})
	}
}

func TestEvents(t *testing.T) {
	w := newWorld(t)
	w.parts.tell(t.Context(), argonv1.Severity_SEVERITY_INFO, "machine", "M", "web", "machine-started", "started")
	w.parts.tell(t.Context(), argonv1.Severity_SEVERITY_INFO, "server", "A", "a", "server-returned", "back")
	list, err := call(t, w.events.ListEvents, &argonv1.ListEventsRequest{Kind: "machine"})
	if err != nil || len(list.GetEvents()) != 1 || list.GetEvents()[0].GetReason() != "machine-started" {
		t.Errorf("got %v, %v", list, err)
	}
	stream, err := w.events.WatchEvents(t.Context(), connect.NewRequest(&argonv1.WatchEventsRequest{Backlog: 1}))
	w.must(err)
	defer stream.Close()
	w.parts.tell(t.Context(), argonv1.Severity_SEVERITY_INFO, "image", "I", "x", "image-imported", "new")
	for _, want := range []string{"server-returned", "image-imported"} {
		if !stream.Receive() || stream.Msg().GetEvent().GetReason() != want {
			t.Errorf("got %v, %v, want %s", stream.Msg(), stream.Err(), want)
		}
	}
}

// TestNoMajority stops the only voter.
func TestNoMajority(t *testing.T) {
	w := newWorld(t)
	w.etcd.Stop()
	_, err := call(t, w.volumes.CreateVolume, &argonv1.CreateVolumeRequest{Name: "v", SizeBytes: mib})
	wantError(t, err, connect.CodeUnavailable, "no majority")
	status, err := call(t, w.cluster.Status, &argonv1.StatusRequest{})
	if err != nil || status.GetState() != "no-majority" || len(status.GetServers()) != 2 {
		t.Errorf("status: %v, %v", status, err)
	}
	w.etcd.Start()
	_, err = w.parts.await(t.Context(), func(*catalog.State) bool { return true })
	wantError(t, err, 0, "")
}

func TestServers(t *testing.T) {
	w := newWorld(t)
	list, err := call(t, w.servers.ListServers, &argonv1.ListServersRequest{})
	if err != nil || len(list.GetServers()) != 2 || !list.GetServers()[0].GetAlive() {
		t.Errorf("got %v, %v", list, err)
	}
	_, err = call(t, w.servers.GetServer, &argonv1.GetServerRequest{Name: "z"})
	wantError(t, err, connect.CodeNotFound, "z")
	_, err = call(t, w.servers.RemoveServer, &argonv1.RemoveServerRequest{Name: "b", Force: true})
	wantError(t, err, connect.CodeFailedPrecondition, "alive")
	_, err = call(t, w.servers.RemoveServer, &argonv1.RemoveServerRequest{Name: "b"})
	wantError(t, err, 0, "")
	_, err = call(t, w.servers.RemoveServer, &argonv1.RemoveServerRequest{Name: "a"})
	wantError(t, err, connect.CodeFailedPrecondition, "last one")
	status, err := call(t, w.cluster.Status, &argonv1.StatusRequest{})
	if err != nil || status.GetState() != "ready" || status.GetLeaderId() != "A" || status.GetCluster().GetName() != "test" || len(status.GetServers()) != 1 {
		t.Errorf("status: %v, %v", status, err)
	}
}

// Two operators remove a server each, and each has seen that the other one stays.
func TestServersAreRemovedOneByOne(t *testing.T) {
	w := newWorld(t)
	w.addServer("c")
	w.must(w.view.Sync(t.Context()))
	for _, pair := range [][2]string{{"a", "b"}, {"b", "a"}, {"b", "c"}, {"c", "a"}} {
		st := w.view.State()
		var txns [2]*catalog.Txn
		for i, name := range pair {
			txns[i] = w.store.Txn()
			w.must(planServerRemoval(st, txns[i], &argonv1.RemoveServerRequest{Name: name}))
		}
		w.must(txns[0].Commit(t.Context()))
		if err := txns[1].Commit(t.Context()); err == nil {
			t.Errorf("%s is removed after %s by somebody who does not know of that", pair[1], pair[0])
		}
		w.addServer(pair[0]) // anew
		w.must(w.view.Sync(t.Context()))
	}
}

func TestSetCluster(t *testing.T) {
	w := newWorld(t)
	hours, seconds, eight, hundreds, none := uint32(24), uint32(30), uint32(8), uint32(300), uint32(0)
	for _, tt := range []struct {
		req  *argonv1.SetClusterRequest
		want *argonv1.Settings
	}{
		{&argonv1.SetClusterRequest{ScrubIntervalHours: &hours}, &argonv1.Settings{ScrubIntervalHours: 24}},
		{&argonv1.SetClusterRequest{ReplicaGraceSeconds: &seconds}, &argonv1.Settings{ScrubIntervalHours: 24, ReplicaGraceSeconds: 30}},
		{&argonv1.SetClusterRequest{ScrubIntervalHours: &none, VoterGraceSeconds: &seconds}, &argonv1.Settings{ScrubOff: true, ReplicaGraceSeconds: 30, VoterGraceSeconds: 30}},
		{&argonv1.SetClusterRequest{ScrubIntervalHours: &hours}, &argonv1.Settings{ScrubIntervalHours: 24, ReplicaGraceSeconds: 30, VoterGraceSeconds: 30}},
		{&argonv1.SetClusterRequest{CpuOvercommit: &eight}, &argonv1.Settings{ScrubIntervalHours: 24, ReplicaGraceSeconds: 30, VoterGraceSeconds: 30, CpuOvercommit: 8}},
	} {
		res, err := call(t, w.cluster.SetCluster, tt.req)
		if err != nil || !proto.Equal(res.GetCluster().GetSettings(), tt.want) {
			t.Errorf("%v: %v, %v; want %v", tt.req, res, err, tt.want)
		}
	}
	_, err := call(t, w.cluster.SetCluster, &argonv1.SetClusterRequest{VoterGraceSeconds: &none})
	wantError(t, err, connect.CodeInvalidArgument, "at least")
	for _, n := range []*uint32{&none, &hundreds} {
		_, err = call(t, w.cluster.SetCluster, &argonv1.SetClusterRequest{CpuOvercommit: n})
		wantError(t, err, connect.CodeInvalidArgument, "give 1 to 100")
	}
	status, err := call(t, w.cluster.Status, &argonv1.StatusRequest{})
	if err != nil || status.GetCluster().GetName() != "test" || status.GetCluster().GetSettings().GetScrubIntervalHours() != 24 {
		t.Errorf("status: %v, %v", status, err)
	}
}

func TestTokensAndClients(t *testing.T) {
	w := newWorld(t)
	_, err := call(t, w.cluster.CreateToken, &argonv1.CreateTokenRequest{TtlSeconds: 31 * 24 * 3600})
	wantError(t, err, connect.CodeInvalidArgument, "at most")
	token, err := call(t, w.cluster.CreateToken, &argonv1.CreateTokenRequest{})
	if err != nil || token.GetToken() == "" {
		t.Errorf("got %v, %v", token, err)
	}
	_, err = call(t, w.cluster.DeleteToken, &argonv1.DeleteTokenRequest{Id: "x"})
	wantError(t, err, connect.CodeNotFound, "see `argon token ls`")
	_, err = call(t, w.cluster.IssueClientCertificate, &argonv1.IssueClientCertificateRequest{Name: "A B"})
	wantError(t, err, connect.CodeInvalidArgument, "client name")
	client, err := call(t, w.cluster.IssueClientCertificate, &argonv1.IssueClientCertificateRequest{Name: "alice"})
	if err != nil || client.GetCertificatePem() != "PEM" {
		t.Errorf("got %v, %v", client, err)
	}
}
