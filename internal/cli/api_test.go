package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
)

// fakeAPI answers with fixed records and remembers what it was asked.
type fakeAPI struct {
	argonv1connect.UnimplementedClusterServiceHandler
	argonv1connect.UnimplementedServerServiceHandler
	argonv1connect.UnimplementedImageServiceHandler
	argonv1connect.UnimplementedVolumeServiceHandler
	argonv1connect.UnimplementedSnapshotServiceHandler
	argonv1connect.UnimplementedMachineServiceHandler
	argonv1connect.UnimplementedEventServiceHandler

	mu       sync.Mutex
	created  *argonv1.CreateMachineRequest
	imported []byte
	// states are what GetMachine answers, one after the other; the last stays.
	states []argonv1.MachineState
	// busy is for how many answers more the volume is busy with something.
	busy int
	// asked lists the calls about snapshots, resizing and scrubbing.
	asked []string
}

var (
	created = timestamppb.New(time.Now().Add(-time.Hour))
	usage1  = &argonv1.Usage{ImagesBytes: 3 << 30, Replicas: []*argonv1.ReplicaUsage{{VolumeId: "01V1", ReplicaId: 1, UsedBytes: 4 << 30, SnapshotBytes: 1 << 30}}}
	server1 = &argonv1.ServerView{Alive: true, Machines: 1, Usage: usage1, Server: &argonv1.Server{
		Meta:    &argonv1.Meta{Id: "01S1", Name: "s1", Created: created},
		Address: "10.0.0.1", VoterRole: argonv1.VoterRole_VOTER_ROLE_VOTER,
		Capacity: &argonv1.Resources{Cpus: 4, MemoryBytes: 8 << 30, DiskBytes: 100 << 30},
	}}
	volume1 = &argonv1.VolumeView{Health: "degraded", Advice: "add a server", Base: "image debian", Activity: []string{"growing to 20 GiB"}, Usage: usage1.GetReplicas(), Volume: &argonv1.Volume{
		Meta: &argonv1.Meta{Id: "01V1", Name: "db", Created: created}, SizeBytes: 10 << 30, ReplicasWanted: 2,
		Replicas: []*argonv1.Replica{{Id: 1, ServerId: "01S1", State: argonv1.ReplicaState_REPLICA_STATE_IN_SYNC}},
	}}
	snapshot1 = &argonv1.SnapshotView{Volume: "db", Servers: []string{"s1", "s2"}, Clones: []string{"test"}, Snapshot: &argonv1.Snapshot{
		Id: 1, Name: "monday", State: argonv1.SnapshotState_SNAPSHOT_STATE_READY, Generation: 7, Created: created, Group: "01G1", GroupSize: 2,
	}}
	image1 = &argonv1.Image{Meta: &argonv1.Meta{Name: "debian"}, SizeBytes: 2 << 30, SourceFormat: "qcow2", Sha256: strings.Repeat("ab", 32)}
	event1 = &argonv1.Event{Id: "01E1", Time: created, Severity: argonv1.Severity_SEVERITY_WARNING, Kind: "machine", SubjectName: "web", Reason: "machine-lost", Message: "its server is gone"}
)

func machine(state argonv1.MachineState) *argonv1.MachineView {
	return &argonv1.MachineView{ServerName: "s1", VolumeNames: []string{"web"}, Machine: &argonv1.Machine{
		Meta: &argonv1.Meta{Id: "01M1", Name: "web", Created: created}, Cpus: 1, MemoryBytes: 512 << 20,
		Ports: []*argonv1.PublishedPort{{ClusterPort: 8080, GuestPort: 80}}, Wanted: argonv1.Wanted_WANTED_RUNNING,
		Status: &argonv1.MachineStatus{State: state, Reason: "for a reason", Since: created},
	}}
}

func answer[T any](msg *T) (*connect.Response[T], error) { return connect.NewResponse(msg), nil }

func (f *fakeAPI) Status(context.Context, *connect.Request[argonv1.StatusRequest]) (*connect.Response[argonv1.StatusResponse], error) {
	return answer(&argonv1.StatusResponse{
		Catalog: &argonv1.CatalogLoad{UsedBytes: 960 << 20, QuotaBytes: 1 << 30, Full: true},
		State:   "ready", Cluster: &argonv1.Cluster{Name: "office"}, Server: server1.GetServer(),
		Servers: []*argonv1.ServerView{server1}, LeaderId: "01S1", Warnings: []string{"one server only"},
	})
}

func (f *fakeAPI) ListTokens(context.Context, *connect.Request[argonv1.ListTokensRequest]) (*connect.Response[argonv1.ListTokensResponse], error) {
	return answer(&argonv1.ListTokensResponse{Tokens: []*argonv1.Token{{Id: "01T1", Expires: created}}})
}

func (f *fakeAPI) ListServers(context.Context, *connect.Request[argonv1.ListServersRequest]) (*connect.Response[argonv1.ListServersResponse], error) {
	return answer(&argonv1.ListServersResponse{Servers: []*argonv1.ServerView{server1}})
}

func (f *fakeAPI) GetServer(context.Context, *connect.Request[argonv1.GetServerRequest]) (*connect.Response[argonv1.GetServerResponse], error) {
	return answer(&argonv1.GetServerResponse{Server: server1})
}

func (f *fakeAPI) ListImages(context.Context, *connect.Request[argonv1.ListImagesRequest]) (*connect.Response[argonv1.ListImagesResponse], error) {
	return answer(&argonv1.ListImagesResponse{})
}

func (f *fakeAPI) ImportImage(_ context.Context, s *connect.BidiStream[argonv1.ImportImageRequest, argonv1.ImportImageResponse]) error {
	for {
		req, err := s.Receive()
		if errors.Is(err, io.EOF) {
			return s.Send(&argonv1.ImportImageResponse{Phase: "done", Image: image1})
		}
		if err != nil {
			return err
		}
		if req.GetHeader().GetName() == "bad" {
			return connect.NewError(connect.CodeInvalidArgument, errors.New("image bad: not an image: give a qcow2 or raw file"))
		}
		if req.GetHeader() != nil {
			if err := s.Send(&argonv1.ImportImageResponse{Phase: "receiving"}); err != nil {
				return err
			}
		}
		f.mu.Lock()
		f.imported = append(f.imported, req.GetData()...)
		f.mu.Unlock()
	}
}

func (f *fakeAPI) ListVolumes(context.Context, *connect.Request[argonv1.ListVolumesRequest]) (*connect.Response[argonv1.ListVolumesResponse], error) {
	return answer(&argonv1.ListVolumesResponse{Volumes: []*argonv1.VolumeView{volume1}})
}

func (f *fakeAPI) GetVolume(context.Context, *connect.Request[argonv1.GetVolumeRequest]) (*connect.Response[argonv1.GetVolumeResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := proto.CloneOf(volume1)
	v.Volume.Scrub = &argonv1.Scrub{Wanted: 5, Finished: 5, FinishedAt: created, Regions: 10, Repaired: 1}
	if f.busy > 0 {
		f.busy--
		v.Volume.RollbackTo, v.Volume.Scrub.Finished, v.Volume.Base = 1, 4, &argonv1.Base{ImageId: "i", Detaching: true}
	}
	return answer(&argonv1.GetVolumeResponse{Volume: v})
}

func (f *fakeAPI) RemoveVolume(_ context.Context, r *connect.Request[argonv1.RemoveVolumeRequest]) (*connect.Response[argonv1.RemoveVolumeResponse], error) {
	if r.Msg.GetName() == "db" {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("volume db: in use by machine web:\nstop it first"))
	}
	return answer(&argonv1.RemoveVolumeResponse{})
}

func (f *fakeAPI) ListMachines(context.Context, *connect.Request[argonv1.ListMachinesRequest]) (*connect.Response[argonv1.ListMachinesResponse], error) {
	return answer(&argonv1.ListMachinesResponse{Machines: []*argonv1.MachineView{machine(argonv1.MachineState_MACHINE_STATE_RUNNING)}})
}

func (f *fakeAPI) CreateMachine(_ context.Context, r *connect.Request[argonv1.CreateMachineRequest]) (*connect.Response[argonv1.CreateMachineResponse], error) {
	f.mu.Lock()
	f.created = r.Msg
	f.mu.Unlock()
	return answer(&argonv1.CreateMachineResponse{
		Machine:  machine(argonv1.MachineState_MACHINE_STATE_PENDING),
		Warnings: []string{"only one server: one replica"},
	})
}

func (f *fakeAPI) GetMachine(context.Context, *connect.Request[argonv1.GetMachineRequest]) (*connect.Response[argonv1.GetMachineResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.states) == 0 { // whoever looks whether to go on finds that it was stopped
		v := machine(argonv1.MachineState_MACHINE_STATE_STOPPED)
		v.Machine.Wanted = argonv1.Wanted_WANTED_STOPPED
		return answer(&argonv1.GetMachineResponse{Machine: v})
	}
	state := f.states[0]
	f.states = f.states[min(1, len(f.states)-1):]
	return answer(&argonv1.GetMachineResponse{Machine: machine(state)})
}

// Console answers in capitals and ends at "bye".
func (f *fakeAPI) Console(_ context.Context, s *connect.BidiStream[argonv1.ConsoleRequest, argonv1.ConsoleResponse]) error {
	for {
		req, err := s.Receive()
		if err != nil || string(req.GetData()) == "bye" {
			return err
		}
		if err := s.Send(&argonv1.ConsoleResponse{Data: bytes.ToUpper(append([]byte(req.GetName()), req.GetData()...))}); err != nil {
			return err
		}
	}
}

func (f *fakeAPI) ListEvents(context.Context, *connect.Request[argonv1.ListEventsRequest]) (*connect.Response[argonv1.ListEventsResponse], error) {
	return answer(&argonv1.ListEventsResponse{Events: []*argonv1.Event{event1}})
}

func (f *fakeAPI) WatchEvents(_ context.Context, _ *connect.Request[argonv1.WatchEventsRequest], s *connect.ServerStream[argonv1.WatchEventsResponse]) error {
	return errors.Join(s.Send(&argonv1.WatchEventsResponse{Event: event1}), s.Send(&argonv1.WatchEventsResponse{Event: event1}))
}

// serveFake puts the fake behind the socket of a server's directory.
func serveFake(t *testing.T, f *fakeAPI) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "argon") // short enough for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "run", "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(argonv1connect.NewClusterServiceHandler(f))
	mux.Handle(argonv1connect.NewServerServiceHandler(f))
	mux.Handle(argonv1connect.NewImageServiceHandler(f))
	mux.Handle(argonv1connect.NewVolumeServiceHandler(f))
	mux.Handle(argonv1connect.NewSnapshotServiceHandler(f))
	mux.Handle(argonv1connect.NewMachineServiceHandler(f))
	mux.Handle(argonv1connect.NewEventServiceHandler(f))
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: mux, Protocols: &protocols}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return dir
}

// result is what one command did.
type result struct {
	code     int
	out, err string
}

func runArgon(dir, stdin string, args ...string) result {
	var out, errs bytes.Buffer
	code := Main(append([]string{"--dir", dir}, args...), "test", strings.NewReader(stdin), &out, &errs)
	return result{code, out.String(), errs.String()}
}

func TestRecordsAsTables(t *testing.T) {
	dir := serveFake(t, &fakeAPI{busy: 9, states: []argonv1.MachineState{argonv1.MachineState_MACHINE_STATE_RUNNING}})
	for command, want := range map[string][]string{
		"status":                  {"office", "one server only", "s1", "960MiB of 1GiB, full"},
		"token ls":                {"01T1", "expired"},
		"server ls":               {"NAME", "s1", "alive", "10.0.0.1", "voter", "0/4", "0B/8GiB", "60m"},
		"image ls":                {"NAME"},
		"volume ls":               {"db", "10GiB", "degraded", "1/2"},
		"volume show db":          {"add a server", "in-sync", "s1", "4GiB on all servers, of that 1GiB", "image debian", "1 region repaired", "now: growing to 20 GiB"},
		"snapshot ls":             {"db", "monday", "ready", "s1,s2", "test"},
		"snapshot show db monday": {"generation", "7", "2 volumes (01G1)"},
		"server show s1":          {"4GiB, of that 1GiB for snapshots only", "3GiB"},
		"machine ls":              {"web", "running", "512MiB", "8080:80", "for a reason"},
		"machine show web":        {"web", "wanted", "running"},
		"events":                  {"machine-lost", "its server is gone"},
		"events -f":               {"machine-lost"},
	} {
		r := runArgon(dir, "", strings.Fields(command)...)
		if r.code != 0 {
			t.Errorf("%s: exit code %d: %s", command, r.code, r.err)
		}
		for _, w := range want {
			if !strings.Contains(r.out, w) {
				t.Errorf("%s: no %q in\n%s", command, w, r.out)
			}
		}
		if strings.Contains(r.out, "\x1b") || strings.Contains(r.err, "\x1b") {
			t.Errorf("%s: escape sequences without a terminal", command)
		}
	}
}

func TestRecordsAsData(t *testing.T) {
	dir := serveFake(t, &fakeAPI{busy: 9, states: []argonv1.MachineState{argonv1.MachineState_MACHINE_STATE_RUNNING}})
	for _, command := range []string{
		"status", "token ls", "server ls", "image ls", "volume ls", "volume show db", "snapshot ls", "snapshot show db monday",
		"machine ls", "machine show web", "events",
	} {
		asJSON := runArgon(dir, "", append(strings.Fields(command), "-o", "json")...)
		var fromJSON, fromYAML any
		if err := json.Unmarshal([]byte(asJSON.out), &fromJSON); err != nil || asJSON.code != 0 {
			t.Errorf("%s: exit code %d, %v:\n%s%s", command, asJSON.code, err, asJSON.out, asJSON.err)
		}
		asYAML := runArgon(dir, "", append(strings.Fields(command), "-o", "yaml")...)
		if err := yaml.Unmarshal([]byte(asYAML.out), &fromYAML); err != nil {
			t.Errorf("%s: %v:\n%s", command, err, asYAML.out)
		}
		if fmt.Sprint(fromJSON) != fmt.Sprint(fromYAML) {
			t.Errorf("%s: JSON and YAML differ:\n%v\n%v", command, fromJSON, fromYAML)
		}
		if _, list := fromJSON.([]any); list != (strings.HasSuffix(command, " ls") || command == "events") {
			t.Errorf("%s: a list: %v", command, list)
		}
	}
	followed := runArgon(dir, "", "events", "-f", "-o", "json")
	if lines := strings.Split(strings.TrimSpace(followed.out), "\n"); len(lines) != 2 || !json.Valid([]byte(lines[1])) {
		t.Errorf("events -f: not one event a line:\n%s", followed.out)
	}
}

func TestServersErrorIsOneLine(t *testing.T) {
	dir := serveFake(t, &fakeAPI{})
	r := runArgon(dir, "", "volume", "rm", "a", "db", "c")
	if r.code != 1 || r.err != "argon: volume db: in use by machine web: stop it first\n" || r.out != "volume a removed\n" {
		t.Errorf("got %+v", r)
	}
	if r := runArgon(dir, "", "image", "rm", "a"); r.code != 1 || !strings.Contains(r.err, "version is older") {
		t.Errorf("got %+v", r)
	}
}

func TestMachineCreateWaits(t *testing.T) {
	const (
		pending  = argonv1.MachineState_MACHINE_STATE_PENDING
		starting = argonv1.MachineState_MACHINE_STATE_STARTING
		running  = argonv1.MachineState_MACHINE_STATE_RUNNING
		failed   = argonv1.MachineState_MACHINE_STATE_FAILED
	)
	for name, c := range map[string]struct {
		states []argonv1.MachineState
		flag   string
		code   int
		want   string
	}{
		"until it runs":   {[]argonv1.MachineState{pending, starting, running}, "--cpus=2", 0, "running"},
		"not when failed": {[]argonv1.MachineState{pending, failed}, "--cpus=2", 1, "machine web: failed: for a reason"},
		"not for ever":    {[]argonv1.MachineState{pending}, "--timeout=1ms", 1, "still pending after 1ms: for a reason"},
		"not at all":      {[]argonv1.MachineState{pending}, "--no-wait", 0, "pending"},
		"not if stopped":  {[]argonv1.MachineState{failed}, "--stopped", 0, "pending"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fakeAPI{states: c.states}
			r := runArgon(serveFake(t, f), "", "machine", "create", "web", "--image", "debian", "--disk", "10G", "--memory", "1GiB", "--publish", "8080:80", c.flag)
			if r.code != c.code || !strings.Contains(r.out+r.err, c.want) {
				t.Errorf("got %+v", r)
			}
			if !strings.HasPrefix(r.err, "warning: only one server: one replica\n") {
				t.Errorf("the server's warning is not shown: %q", r.err)
			}
			if q := f.created; q.GetMemoryBytes() != 1<<30 || q.GetDiskBytes() != 10<<30 || q.GetReplicas() != 2 || q.GetPorts()[0].GetGuestPort() != 80 {
				t.Errorf("asked for %v", q)
			}
		})
	}
}

func TestImageImport(t *testing.T) {
	f := &fakeAPI{}
	dir := serveFake(t, f)
	data := strings.Repeat("0123456789abcdef", importChunk/16*2+3)
	file := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(file, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{file, "-"} {
		f.imported = nil
		r := runArgon(dir, data, "image", "import", "debian", source)
		if r.code != 0 || !strings.Contains(r.out, "qcow2") || r.err != "" {
			t.Errorf("%s: %+v", source, r)
		}
		if string(f.imported) != data {
			t.Errorf("%s: %d bytes arrived of %d", source, len(f.imported), len(data))
		}
	}
	r := runArgon(dir, data, "image", "import", "bad", file)
	if r.code != 1 || r.err != "argon: image bad: not an image: give a qcow2 or raw file\n" {
		t.Errorf("a refused image: %+v", r)
	}
	// /proc/self/mem can be opened and not be read at 0.
	r = runArgon(dir, "", "image", "import", "debian", "/proc/self/mem")
	if r.code != 1 || !strings.Contains(r.err, "reading what is to be sent: read /proc/self/mem") {
		t.Errorf("an unreadable file: %+v", r)
	}
}

// An import ends when one side fails, whatever the other waits for.
func TestImportEnds(t *testing.T) {
	f := &fakeAPI{}
	dir := serveFake(t, f)
	run := func(name string, stdin io.Reader) string {
		var errs strings.Builder
		if code := Main([]string{"--dir", dir, "image", "import", name, "-"}, "test", stdin, io.Discard, &errs); code != 1 {
			t.Errorf("%s: code %d", name, code)
		}
		return errs.String()
	}
	silent, end := io.Pipe()
	t.Cleanup(func() { end.Close() })
	if got := run("bad", silent); !strings.Contains(got, "not an image") {
		t.Errorf("refused while there is nothing to send: %s", got)
	}
	data := strings.Repeat("0123456789abcdef", importChunk/16)
	broken := io.MultiReader(strings.NewReader(data), readerFunc(func([]byte) (int, error) {
		for !f.has(data) {
			time.Sleep(time.Millisecond)
		}
		return 0, errors.New("the cable is out")
	}))
	if got := run("debian", broken); got != "argon: image import: reading what is to be sent: the cable is out\n" {
		t.Errorf("a reader that fails when all is sent that was read: %s", got)
	}
}

func (f *fakeAPI) has(imported string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return string(f.imported) == imported
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestConsole(t *testing.T) {
	dir := serveFake(t, &fakeAPI{})
	if r := runArgon(dir, "ls\x1dnot sent", "machine", "console", "web"); r.code != 0 || strings.Contains(r.out, "NOT") {
		t.Errorf("detached: %+v", r)
	}
	if r := runArgon(dir, "bye", "machine", "console", "web"); r.code != 0 || r.out != "WEB" {
		t.Errorf("ended by the machine: %+v", r)
	}
}

func TestCompletion(t *testing.T) {
	dir := serveFake(t, &fakeAPI{})
	for command, want := range map[string]string{
		"__complete machine start ":       "web",
		"__complete volume promote db ":   "s1",
		"__complete machine ls -o ":       "yaml",
		"__complete machine create m --v": "--volume",
	} {
		args := strings.Split(command, " ")
		var out, errs bytes.Buffer
		// --dir comes after the hidden command, as from a shell.
		args = append([]string{args[0], "--dir", dir}, args[1:]...)
		if code := Main(args, "test", strings.NewReader(""), &out, &errs); code != 0 || !strings.Contains(out.String(), want) {
			t.Errorf("%s: %d: %s%s", command, code, out.String(), errs.String())
		}
	}
}
