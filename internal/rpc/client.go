package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
)

// This file: the certificates of remote administrators.

// ListClients lists them, the oldest first.
func (s clusterService) ListClients(ctx context.Context, _ *connect.Request[argonv1.ListClientsRequest]) (*connect.Response[argonv1.ListClientsResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	res := &argonv1.ListClientsResponse{}
	for _, c := range st.Clients {
		if c.GetExpires().AsTime().After(p.Now()) {
			res.Clients = append(res.Clients, c)
		}
	}
	slices.SortFunc(res.Clients, func(a, b *argonv1.ClientCertificate) int {
		if n := a.GetCreated().AsTime().Compare(b.GetCreated().AsTime()); n != 0 {
			return n
		}
		return strings.Compare(a.GetSerial(), b.GetSerial())
	})
	return answer(res, nil)
}

// RevokeClient also revokes the caller's own certificate, if it is told to: the
// servers' own sockets always let an administrator in.
func (s clusterService) RevokeClient(ctx context.Context, req *connect.Request[argonv1.RevokeClientRequest]) (*connect.Response[argonv1.RevokeClientResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	by := callerName(st, p.ServerID, callerOf(ctx))
	res := &argonv1.RevokeClientResponse{}
	for _, c := range st.Clients {
		if c.GetSerial() != req.Msg.GetClient() && c.GetClient() != req.Msg.GetClient() {
			continue
		}
		rec, err := p.Store.Clients.Update(ctx, c.GetSerial(), func(c *argonv1.ClientCertificate) error {
			if c.Revoked != nil {
				return catalog.ErrUnchanged
			}
			c.Revoked, c.RevokedBy = timestamppb.New(p.Now()), by
			return nil
		})
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return nil, err
		}
		res.Revoked = append(res.Revoked, rec)
	}
	if len(res.Revoked) == 0 {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no client has the name or the serial number %q: see `argon client ls`", req.Msg.GetClient()))
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_WARNING, "cluster", "", res.GetRevoked()[0].GetClient(), "client-revoked",
		fmt.Sprintf("certificates revoked by %s: %d", by, len(res.GetRevoked())))
	return answer(res, nil)
}

// callerName is who calls, for records.
func callerName(st *catalog.State, serverID string, c Caller) string {
	switch c.Kind {
	case Client:
		return "client " + c.ID
	case Server:
		return "server " + serverName(st, c.ID)
	default:
		return "server " + serverName(st, serverID)
	}
}

// stillClient refuses certificates that were revoked. One that no record knows was
// signed by an argon that kept none: it is written down now, so that it can be
// revoked.
func (a *API) stillClient(ctx context.Context, c Caller) error {
	p := a.local.Parts()
	if p == nil {
		return nil // there is nothing to be had yet
	}
	rec := p.View.State().Clients[c.Serial]
	if rec.GetRevoked() != nil {
		return errRevoked(c)
	}
	if rec == nil {
		a.noteClient(ctx, p, c)
	}
	return nil
}

func errRevoked(c Caller) error {
	return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("the certificate of client %s was revoked: another one comes from `argon client create` on a server", c.ID))
}

// noteClient fails only so that the next call tries again.
func (a *API) noteClient(ctx context.Context, p *Parts, c Caller) {
	bounded, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	err := p.Store.Clients.Create(bounded, &argonv1.ClientCertificate{
		Serial: c.Serial, Client: c.ID, Created: timestamppb.New(p.Now()), Expires: timestamppb.New(c.Expires),
	})
	if err != nil && !errors.Is(err, catalog.ErrExists) {
		a.log.Warn("a client certificate from before they were recorded can't be", "client", c.ID, "err", err)
	}
}

// whileGood ends what a client has under way when its certificate is revoked.
func (a *API) whileGood(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, p := callerOf(r.Context()), a.local.Parts()
		// A client that revokes its own is still told so.
		if c.Kind != Client || p == nil || r.URL.Path == argonv1connect.ClusterServiceRevokeClientProcedure {
			h.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancel(r.Context())
		var watching sync.WaitGroup
		watching.Go(func() {
			if !untilRevoked(ctx, p, c) {
				return
			}
			cancel()
			// Whoever waits for the next message, or to send one, is woken.
			control := http.NewResponseController(w)
			_ = control.SetReadDeadline(time.Unix(1, 0))
			_ = control.SetWriteDeadline(time.Unix(1, 0))
		})
		defer watching.Wait()
		defer cancel()
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

// untilRevoked waits until a client's certificate is revoked, or until ctx ends; it
// tells whether the certificate is.
func untilRevoked(ctx context.Context, p *Parts, c Caller) bool {
	// One that is revoked already is refused in words.
	if p.View.State().Clients[c.Serial].GetRevoked() != nil {
		return false
	}
	for {
		changed := p.View.Changed()
		if p.View.State().Clients[c.Serial].GetRevoked() != nil {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// apiAddresses are where the servers' APIs are reached.
func apiAddresses(st *catalog.State) []string {
	var all []string
	for _, s := range sorted(st.Servers) {
		all = append(all, apiAddress(s))
	}
	return all
}

func apiAddress(s *argonv1.Server) string {
	return net.JoinHostPort(s.GetAddress(), strconv.Itoa(int(s.GetApiPort())))
}

// certificateSoon is how long before its end a certificate is warned of.
const certificateSoon = 30 * 24 * time.Hour

func certificateWarnings(st *catalog.State, now time.Time) []string {
	var w []string
	for _, s := range sorted(st.Servers) {
		if end := s.GetCertificateExpires(); end != nil && end.AsTime().Sub(now) < certificateSoon {
			w = append(w, fmt.Sprintf("the certificate of server %s ends at %s: remove the server and join it anew before", s.GetMeta().GetName(), end.AsTime().UTC().Format(time.DateOnly)))
		}
	}
	return w
}
