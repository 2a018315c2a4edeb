package rpc

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"github.com/coder/websocket"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// fakeGuests has one guest, of the machine that runs. Its screen sends back what
// it gets.
type fakeGuests struct {
	resets int
	mu     sync.Mutex
	calls  []string
	freeze error
	thawed chan struct{}
}

func (f *fakeGuests) called(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, what)
	if what == "thaw" && f.thawed != nil {
		close(f.thawed)
		f.thawed = nil
	}
}

func (f *fakeGuests) Display(_ context.Context, machineID string) (io.ReadWriteCloser, error) {
	if machineID == "" {
		return nil, fs.ErrNotExist
	}
	ours, theirs := net.Pipe()
	go func() {
		_, _ = io.WriteString(theirs, "RFB 003.008\n")
		_, _ = io.Copy(theirs, theirs)
		_ = theirs.Close()
	}()
	return ours, nil
}

func (f *fakeGuests) Screenshot(context.Context, string) ([]byte, error) {
	return []byte(strings.Repeat("picture", 100_000)), nil
}

func (f *fakeGuests) Freeze(context.Context, string) error {
	f.called("freeze")
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.freeze
}

func (f *fakeGuests) Reset(context.Context, string) error {
	f.resets++
	return nil
}

func (f *fakeGuests) Thaw(context.Context, string) error {
	f.called("thaw")
	return nil
}

// withMachine is a world with a machine that runs on the server that is asked.
func withMachine(t *testing.T) (*world, *fakeGuests) {
	t.Helper()
	w := newWorld(t)
	guests := w.parts.Guests.(*fakeGuests)
	w.must(w.parts.Store.Machines.Create(t.Context(), &argonv1.Machine{
		Meta: &argonv1.Meta{Id: "M", Name: "web"}, ServerId: "A", Wanted: argonv1.Wanted_WANTED_RUNNING,
	}))
	w.must(w.parts.Store.Machines.Create(t.Context(), &argonv1.Machine{Meta: &argonv1.Meta{Id: "N", Name: "off"}}))
	return w, guests
}

func TestDisplay(t *testing.T) {
	w, _ := withMachine(t)
	stream := w.machines.Display(t.Context())
	w.must(stream.Send(&argonv1.DisplayRequest{Name: "web", Data: []byte("first")}))
	for got, want := "", "RFB 003.008\nfirst"; got != want; {
		m, err := stream.Receive()
		w.must(err)
		if got += string(m.GetData()); !strings.HasPrefix(want, got) {
			t.Fatalf("got %q", got)
		}
	}
	w.must(stream.CloseRequest())
	w.must(stream.CloseResponse())

	for name, code := range map[string]connect.Code{"off": connect.CodeFailedPrecondition, "none": connect.CodeNotFound} {
		stream := w.machines.Display(t.Context())
		_ = stream.Send(&argonv1.DisplayRequest{Name: name})
		_, err := stream.Receive()
		wantError(t, err, code, name)
		_ = stream.CloseRequest()
		_ = stream.CloseResponse()
	}
}

func TestScreenshot(t *testing.T) {
	w, _ := withMachine(t)
	stream, err := w.machines.Screenshot(t.Context(), connect.NewRequest(&argonv1.ScreenshotRequest{Name: "web"}))
	w.must(err)
	var got []byte
	for stream.Receive() {
		got = append(got, stream.Msg().GetData()...)
	}
	if stream.Err() != nil || string(got) != strings.Repeat("picture", 100_000) {
		t.Errorf("got %d bytes, %v", len(got), stream.Err())
	}
}

// The browser's way to a screen: the same bytes, and the same rights.
func TestWebDisplay(t *testing.T) {
	w, _ := withMachine(t)
	api := New(w.local, w.parts.Log)
	server := httptest.NewServer(ForSocket(api.Handler()))
	defer server.Close()
	closed := httptest.NewServer(api.Handler()) // nobody has a right
	defer closed.Close()

	c, _, err := websocket.Dial(t.Context(), server.URL+"/vnc?machine=web", &websocket.DialOptions{Subprotocols: []string{"binary"}})
	w.must(err)
	conn := websocket.NetConn(t.Context(), c, websocket.MessageBinary)
	w.must(func() error { _, err := conn.Write([]byte("hello")); return err }())
	got := make([]byte, len("RFB 003.008\nhello"))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "RFB 003.008\nhello" {
		t.Errorf("got %q, %v", got, err)
	}
	w.must(conn.Close())

	for name, c := range map[string]struct {
		url    string
		origin string
		status int
	}{
		"without a right":  {closed.URL + "/vnc?machine=web", "", http.StatusUnauthorized},
		"another's page":   {server.URL + "/vnc?machine=web", "https://evil.example", http.StatusForbidden},
		"no such machine":  {server.URL + "/vnc?machine=none", "", http.StatusNotFound},
		"one that is off":  {server.URL + "/vnc?machine=off", "", http.StatusConflict},
		"no machine named": {server.URL + "/vnc", "", http.StatusNotFound},
	} {
		header := http.Header{}
		if c.origin != "" {
			header.Set("Origin", c.origin)
		}
		conn, res, err := websocket.Dial(t.Context(), c.url, &websocket.DialOptions{HTTPHeader: header})
		if err == nil {
			_ = conn.CloseNow()
			t.Errorf("%s: it was let in", name)
			continue
		}
		if res == nil || res.StatusCode != c.status {
			t.Errorf("%s: got %v, %v", name, res, err)
		}
	}
}

// File systems rest until the caller is gone, and go on whatever happens.
func TestQuiesce(t *testing.T) {
	w, guests := withMachine(t)
	ctx, cancel := context.WithCancel(t.Context())
	thawed := make(chan struct{})
	guests.thawed = thawed
	stream, err := w.machines.QuiesceMachine(ctx, connect.NewRequest(&argonv1.QuiesceMachineRequest{Name: "web"}))
	w.must(err)
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	cancel()
	<-thawed
	_ = stream.Close()

	guests.calls, guests.freeze = nil, errors.New("it does not")
	stream, err = w.machines.QuiesceMachine(t.Context(), connect.NewRequest(&argonv1.QuiesceMachineRequest{Name: "web"}))
	w.must(err)
	if stream.Receive() || stream.Err() == nil || strings.Join(guests.calls, " ") != "freeze thaw" {
		t.Errorf("a freeze that fails: %v, %v", stream.Err(), guests.calls)
	}
	_ = stream.Close()
}

func TestQuiesced(t *testing.T) {
	w, guests := withMachine(t)
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		freeze, do error
		server     string
		quiet      bool
		calls      string
	}{
		"rests":          {nil, nil, "A", true, "freeze do thaw"},
		"do fails":       {nil, boom, "A", true, "freeze do thaw"},
		"freeze fails":   {boom, nil, "A", false, "freeze do thaw"},
		"no agent":       {hypervisor.ErrNoAgent, nil, "A", false, "freeze do"},
		"does not run":   {nil, nil, "", false, "do"},
		"no guest there": {fs.ErrNotExist, nil, "A", false, "freeze do"},
	} {
		t.Run(name, func(t *testing.T) {
			guests.calls, guests.freeze = nil, c.freeze
			quiet, err := w.parts.quiesced(t.Context(), &argonv1.Machine{Meta: &argonv1.Meta{Id: "M"}, ServerId: c.server}, func() error {
				guests.called("do")
				return c.do
			})
			if quiet != c.quiet || !errors.Is(err, c.do) || strings.Join(guests.calls, " ") != c.calls {
				t.Errorf("quiet %v, %v, %v", quiet, err, guests.calls)
			}
		})
	}
}
