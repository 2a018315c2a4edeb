package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
)

// Caller is who makes a call.
type Caller struct {
	Kind CallerKind
	// ID is a server's id, or a client certificate's name.
	ID string
	// Serial of a server's or client's certificate, as in its record.
	Serial string
	// Expires is when the certificate does.
	Expires time.Time
}

// CallerKind says by what right somebody calls.
type CallerKind uint8

// The kinds of callers.
const (
	// Nobody came over TLS without a certificate of this cluster.
	Nobody CallerKind = iota
	// Admin came over the local unix socket, whose mode keeps others out.
	Admin
	// Client has a client certificate of this cluster.
	Client
	// Server has a server certificate of this cluster; the record decides
	// whether it still counts.
	Server
)

type callerKey struct{}

// ForSocket marks every call as the local administrator's.
func ForSocket(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, Caller{Kind: Admin})))
	})
}

const (
	// maxAdmission bounds what somebody without a certificate may send, in bytes,
	// and admissionWithin how long that may take.
	maxAdmission    = 64 << 10
	admissionWithin = 20 * time.Second
)

// ForTLS marks every call with who its certificate says it is from. The TLS
// layer has checked the certificate against the cluster's authority. Who has
// none can ask for admission, briefly, or fetch what a new server needs, with a
// token; nothing else of theirs is read.
func ForTLS(h http.Handler, identify func(tls.ConnectionState) (Caller, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var c Caller
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			var err error
			if c, err = identify(*r.TLS); err != nil {
				http.Error(w, "the certificate is not one of this cluster", http.StatusForbidden)
				return
			}
		}
		if c.Kind == Nobody {
			if r.URL.Path != argonv1connect.ClusterServiceAdmitProcedure && !strings.HasPrefix(r.URL.Path, installPath) {
				refuse(w, r, errNobody())
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, maxAdmission)
			// That it can't be set shows in nothing worse than a slow call.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(admissionWithin))
		}
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
	})
}

// refuse answers a request without reading it, in the words of its protocol.
func refuse(w http.ResponseWriter, r *http.Request, err *connect.Error) {
	if answer := connect.NewErrorWriter(); answer.IsSupported(r) {
		_ = answer.Write(w, r, err) // the caller is gone
		return
	}
	http.Error(w, err.Message(), webStatus(err.Code()))
}

func errNobody() *connect.Error {
	return connect.NewError(connect.CodeUnauthenticated, errors.New("a client certificate is needed: make one with `argon client create` on a server"))
}

func callerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// authorize decides whether a caller may call a procedure.
func (a *API) authorize(ctx context.Context, procedure string) error {
	c := callerOf(ctx)
	switch procedure {
	case argonv1connect.ClusterServiceInitProcedure, argonv1connect.ClusterServiceJoinProcedure:
		if c.Kind != Admin {
			return connect.NewError(connect.CodePermissionDenied, errors.New("a server is initialised or joined only through its own unix socket: run the command on that server"))
		}
	case argonv1connect.ClusterServiceAdmitProcedure:
		return nil // the token is the credential
	case argonv1connect.ServerServiceMeetServersProcedure:
		// It works without the catalog, which says who may call.
		if c.Kind != Admin {
			return connect.NewError(connect.CodePermissionDenied, errors.New("a server is led to others only through its own unix socket: run the command on that server"))
		}
	case argonv1connect.ServerServiceIntroduceProcedure:
		return a.mayIntroduce(c)
	case argonv1connect.ImageServiceFetchImageProcedure:
		if c.Kind == Client {
			return connect.NewError(connect.CodePermissionDenied, errors.New("only servers fetch images"))
		}
	}
	switch c.Kind {
	case Admin:
		return nil
	case Client:
		return a.stillClient(ctx, c)
	case Server:
		return a.stillServer(ctx, c)
	}
	return errNobody()
}

// stillServer refuses the certificates of servers that were removed, or that
// joined anew with another one. One may have joined a moment ago, which the
// view need not show yet.
func (a *API) stillServer(ctx context.Context, c Caller) error {
	p, err := a.parts()
	if err != nil {
		return err
	}
	if stillKnown(p.View.State(), c) {
		return nil
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return err
	}
	if !stillKnown(st, c) {
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("server %s is not part of this cluster any more", c.ID))
	}
	return nil
}

// stillKnown tells whether the records have the server with this certificate.
func stillKnown(st *catalog.State, c Caller) bool {
	s := st.Servers[c.ID]
	return s != nil && s.GetCertificateSerial() == c.Serial
}

// interceptor authorizes each call and gives each error its code.
type interceptor struct{ api *API }

func (i interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := i.api.authorize(ctx, req.Spec().Procedure); err != nil {
			return nil, err
		}
		res, err := next(ctx, req)
		if err != nil {
			return nil, i.api.asConnect(ctx, req.Spec().Procedure, err)
		}
		return res, nil
	}
}

func (i interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (i interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := i.api.authorize(ctx, conn.Spec().Procedure); err != nil {
			return err
		}
		if err := next(ctx, conn); err != nil {
			return i.api.asConnect(ctx, conn.Spec().Procedure, err)
		}
		return nil
	}
}
