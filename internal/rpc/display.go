package rpc

import (
	"context"
	"errors"
	"io"
	"net/http"

	"connectrpc.com/connect"
	"github.com/coder/websocket"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
)

type displayStream = connect.BidiStream[argonv1.DisplayRequest, argonv1.DisplayResponse]

// Display carries bytes between the caller's viewer and a guest's screen.
func (s machineService) Display(ctx context.Context, stream *displayStream) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	first, err := stream.Receive()
	if errors.Is(err, io.EOF) {
		return invalid("name the machine in the first message")
	}
	if err != nil {
		return err
	}
	screen, err := p.openDisplay(ctx, first.GetName(), stream.RequestHeader())
	if err != nil {
		return err
	}
	return carry(ctx, screen, first.GetData(), func() ([]byte, error) {
		m, err := stream.Receive()
		return m.GetData(), err
	}, func(data []byte) error {
		return stream.Send(&argonv1.DisplayResponse{Data: data})
	})
}

// openDisplay opens a machine's screen, wherever it runs.
func (p *Parts) openDisplay(ctx context.Context, name string, header http.Header) (io.ReadWriteCloser, error) {
	m, here, err := p.findGuest(ctx, name, header)
	if err != nil {
		return nil, err
	}
	if here {
		screen, err := p.Guests.Display(ctx, m.GetMeta().GetId())
		if err != nil {
			return nil, p.guestError(m, "screen", err)
		}
		return screen, nil
	}
	machines, err := p.Peers.Machines(m.GetServerId())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	there := machines.Display(ctx)
	there.RequestHeader().Set(forwarded, p.ServerID)
	if err := there.Send(&argonv1.DisplayRequest{Name: name}); err != nil && !errors.Is(err, io.EOF) {
		cancel()
		return nil, err
	}
	return &remoteDisplay{stream: there, cancel: cancel}, nil
}

// remoteDisplay is the screen of a guest on another server.
type remoteDisplay struct {
	stream *connect.BidiStreamForClient[argonv1.DisplayRequest, argonv1.DisplayResponse]
	cancel context.CancelFunc
	rest   []byte
}

// Read implements io.Reader.
func (r *remoteDisplay) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		m, err := r.stream.Receive()
		if err != nil {
			return 0, err
		}
		r.rest = m.GetData()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Write implements io.Writer.
func (r *remoteDisplay) Write(p []byte) (int, error) {
	if err := r.stream.Send(&argonv1.DisplayRequest{Data: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close implements io.Closer.
func (r *remoteDisplay) Close() error {
	r.cancel()
	return nil
}

// maxFrame bounds what a browser sends at once; a viewer sends keys.
const maxFrame = 1 << 20

// webDisplay is Display for browsers: a WebSocket of binary messages, as noVNC
// speaks it. Who may call it is who may call Display; a page of another origin
// may not.
func (a *API) webDisplay(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	screen, err := a.webScreen(ctx, r)
	if err != nil {
		http.Error(w, a.asConnect(ctx, r.URL.Path, err).(*connect.Error).Message(), webStatus(connect.CodeOf(err)))
		return
	}
	defer screen.Close()
	socket, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"binary"}})
	if err != nil {
		return // it has been answered
	}
	socket.SetReadLimit(maxFrame)
	err = carry(ctx, screen, nil, func() ([]byte, error) {
		_, data, err := socket.Read(ctx)
		if err != nil {
			_ = screen.Close() // the viewer is gone
		}
		return data, err
	}, func(data []byte) error {
		return socket.Write(ctx, websocket.MessageBinary, data)
	})
	if err == nil {
		_ = socket.Close(websocket.StatusNormalClosure, "the machine's screen is closed")
	}
	_ = socket.CloseNow()
}

func (a *API) webScreen(ctx context.Context, r *http.Request) (io.ReadWriteCloser, error) {
	if err := a.authorize(ctx, argonv1connect.MachineServiceDisplayProcedure); err != nil {
		return nil, err
	}
	p, err := a.parts()
	if err != nil {
		return nil, err
	}
	return p.openDisplay(ctx, r.URL.Query().Get("machine"), nil)
}

// webStatus is the status that browsers know for a code.
func webStatus(c connect.Code) int {
	switch c {
	case connect.CodeUnauthenticated:
		return http.StatusUnauthorized
	case connect.CodePermissionDenied:
		return http.StatusForbidden
	case connect.CodeNotFound:
		return http.StatusNotFound
	case connect.CodeFailedPrecondition:
		return http.StatusConflict
	case connect.CodeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// screenPiece is how much of a screenshot one message carries.
const screenPiece = 256 << 10

// Screenshot sends a PNG of what a guest's screen shows.
func (s machineService) Screenshot(ctx context.Context, req *connect.Request[argonv1.ScreenshotRequest], stream *connect.ServerStream[argonv1.ScreenshotResponse]) error {
	p, err := s.parts()
	if err != nil {
		return err
	}
	m, here, err := p.findGuest(ctx, req.Msg.GetName(), req.Header())
	if err != nil {
		return err
	}
	if !here {
		return p.relay(ctx, m, func(ctx context.Context, machines argonv1connect.MachineServiceClient) error {
			there, err := machines.Screenshot(ctx, handedOn(p, req.Msg))
			return pass(there, err, stream.Send)
		})
	}
	picture, err := p.Guests.Screenshot(ctx, m.GetMeta().GetId())
	if err != nil {
		return p.guestError(m, "screen", err)
	}
	for len(picture) > 0 {
		n := min(len(picture), screenPiece)
		if err := stream.Send(&argonv1.ScreenshotResponse{Data: picture[:n]}); err != nil {
			return err
		}
		picture = picture[n:]
	}
	return nil
}
