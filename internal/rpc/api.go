package rpc

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/image"
)

// maxMessage bounds one message, in bytes. Streams carry images in pieces of
// at most 1 MiB.
const maxMessage = 4 << 20

// API answers every call of this server's API. Safe for concurrent use.
type API struct {
	local Local
	log   *slog.Logger
}

// New makes the API of a server.
func New(local Local, log *slog.Logger) *API { return &API{local: local, log: log} }

// Handler is the API for [ForSocket] or [ForTLS].
func (a *API) Handler() http.Handler {
	mux := http.NewServeMux()
	options := []connect.HandlerOption{
		connect.WithInterceptors(interceptor{a}),
		connect.WithReadMaxBytes(maxMessage),
	}
	mux.Handle(argonv1connect.NewClusterServiceHandler(clusterService{a}, options...))
	mux.Handle(argonv1connect.NewServerServiceHandler(serverService{a}, options...))
	mux.Handle(argonv1connect.NewImageServiceHandler(imageService{a}, options...))
	mux.Handle(argonv1connect.NewVolumeServiceHandler(volumeService{a}, options...))
	mux.Handle(argonv1connect.NewSnapshotServiceHandler(snapshotService{a}, options...))
	mux.Handle(argonv1connect.NewMachineServiceHandler(machineService{a}, options...))
	mux.Handle(argonv1connect.NewCheckpointServiceHandler(checkpointService{a}, options...))
	mux.Handle(argonv1connect.NewEventServiceHandler(eventService{a}, options...))
	mux.HandleFunc("GET /vnc", a.webDisplay)
	mux.HandleFunc("GET "+installPath+"{token}", a.installScript)
	mux.HandleFunc("GET "+installPath+"{token}/argon", a.installProgram)
	return a.whileGood(mux)
}

// parts are those of a member, or the error for who calls a server that is
// none.
func (a *API) parts() (*Parts, error) {
	p := a.local.Parts()
	if p == nil {
		return nil, unconfigured(a.local)
	}
	return p, nil
}

func unconfigured(l Local) error {
	state, detail := l.Condition()
	if state == "unconfigured" {
		return precondition("this server is not part of a cluster: run `argon init` or `argon join`")
	}
	if detail == "" {
		detail = "this server is still starting: try again"
	}
	return connect.NewError(connect.CodeUnavailable, errors.New(detail))
}

// codes are those of errors that mean the same wherever they come from.
var codes = []struct {
	err  error
	code connect.Code
}{
	{context.Canceled, connect.CodeCanceled},
	{context.DeadlineExceeded, connect.CodeDeadlineExceeded},
	{catalog.ErrNotFound, connect.CodeNotFound},
	{catalog.ErrExists, connect.CodeAlreadyExists},
	{catalog.ErrConflict, connect.CodeAborted},
	{catalog.ErrFull, connect.CodeResourceExhausted},
	{image.ErrNotImage, connect.CodeInvalidArgument},
	{image.ErrChecksum, connect.CodeInvalidArgument},
	{image.ErrNoSpace, connect.CodeResourceExhausted},
	{fs.ErrNotExist, connect.CodeNotFound},
	{hypervisor.ErrNoAgent, connect.CodeFailedPrecondition},
	{hypervisor.ErrOldGuest, connect.CodeFailedPrecondition},
}

// asConnect gives an error its code and makes one line of it.
func (a *API) asConnect(ctx context.Context, procedure string, err error) error {
	var coded *connect.Error
	if errors.As(err, &coded) {
		return coded
	}
	code := connect.CodeInternal
	for _, c := range codes {
		if errors.Is(err, c.err) {
			code = c.code
			break
		}
	}
	switch {
	case ctx.Err() != nil:
		code = connect.CodeCanceled
	case catalog.Unavailable(err):
		code = connect.CodeUnavailable
	}
	if code == connect.CodeInternal {
		a.log.Error("a call failed", "procedure", procedure, "err", err)
	}
	return connect.NewError(code, errors.New(strings.Join(strings.Fields(err.Error()), " ")))
}
