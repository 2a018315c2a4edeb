package cli

import (
	"bytes"
	"context"
	"errors"
	"image"
	"image/png"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// Display says who it is, then sends back what it gets, and ends at "bye".
func (f *fakeAPI) Display(_ context.Context, s *connect.BidiStream[argonv1.DisplayRequest, argonv1.DisplayResponse]) error {
	for first := true; ; first = false {
		req, err := s.Receive()
		if err != nil || string(req.GetData()) == "bye" {
			return nil
		}
		if req.GetName() == "off" {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("machine off does not run"))
		}
		data := req.GetData()
		if first {
			data = []byte("RFB 003.008\n")
		}
		if err := s.Send(&argonv1.DisplayResponse{Data: data}); err != nil {
			return err
		}
	}
}

func (f *fakeAPI) Screenshot(_ context.Context, r *connect.Request[argonv1.ScreenshotRequest], s *connect.ServerStream[argonv1.ScreenshotResponse]) error {
	var b bytes.Buffer
	if r.Msg.GetName() == "web" {
		_ = png.Encode(&b, image.NewGray(image.Rect(0, 0, 32, 16)))
	}
	return s.Send(&argonv1.ScreenshotResponse{Data: b.Bytes()})
}

func TestScreenshot(t *testing.T) {
	dir := serveFake(t, &fakeAPI{})
	path := filepath.Join(t.TempDir(), "web.png")
	if r := runArgon(dir, "", "machine", "screenshot", "web", path); r.code != 0 || !strings.Contains(r.err, "32 by 16") {
		t.Errorf("got %+v", r)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", st, err)
	}
	bad := filepath.Join(t.TempDir(), "bad.png")
	if r := runArgon(dir, "", "machine", "screenshot", "bad", bad); r.code != 1 || !strings.Contains(r.err, "no picture") {
		t.Errorf("got %+v", r)
	}
	if _, err := os.Stat(bad); err == nil {
		t.Error("what is no picture was saved")
	}
}

func TestVNC(t *testing.T) {
	dir := serveFake(t, &fakeAPI{})
	if r := runArgon(dir, "", "machine", "vnc", "off"); r.code != 1 || !strings.Contains(r.err, "does not run") {
		t.Errorf("one that is off: %+v", r)
	}
	c, err := client.Dial(client.Options{Socket: client.SocketPath(dir)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	socket := filepath.Join(t.TempDir(), "web.vnc")
	for network, at := range map[string]string{"tcp": "127.0.0.1:0", "unix": socket} {
		t.Run(network, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			ln, hint, err := listenForViewer(ctx, at)
			if err != nil || !strings.HasPrefix(hint, "vncviewer ") {
				t.Fatal(hint, err)
			}
			if st, err := os.Stat(socket); network == "unix" && (err != nil || st.Mode().Perm() != 0o600) {
				t.Errorf("the socket: %v, %v", st, err)
			}
			served := make(chan error, 1)
			go func() {
				served <- serveViewers(ctx, ln, func(ctx context.Context, conn net.Conn) {
					if err := carryDisplay(ctx, c, "web", conn); err != nil {
						t.Error(err)
					}
				})
			}()
			viewer, err := net.Dial(network, ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(viewer, "hello"); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len("RFB 003.008\nhello"))
			if _, err := io.ReadFull(viewer, got); err != nil || string(got) != "RFB 003.008\nhello" {
				t.Errorf("got %q, %v", got, err)
			}
			_, _ = io.WriteString(viewer, "bye")
			if _, err := viewer.Read(got); !errors.Is(err, io.EOF) {
				t.Errorf("after the screen's end: %v", err)
			}
			_ = viewer.Close()
			cancel()
			if err := <-served; err != nil {
				t.Error(err)
			}
			_ = ln.Close()
			if _, err := os.Stat(socket); network == "unix" && err == nil {
				t.Error("the socket is left behind")
			}
		})
	}
}
