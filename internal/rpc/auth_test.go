package rpc

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
)

func TestWhoMayCall(t *testing.T) {
	w := newWorld(t)
	admin, nobody := Caller{Kind: Admin}, Caller{}
	client := Caller{Kind: Client, ID: "alice"}
	server := Caller{Kind: Server, ID: "B", Serial: "1"}
	removed, replaced := Caller{Kind: Server, ID: "Z", Serial: "1"}, Caller{Kind: Server, ID: "B", Serial: "2"}
	api := New(w.local, slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		procedure string
		caller    Caller
		want      connect.Code
	}{
		{argonv1connect.ClusterServiceInitProcedure, admin, 0},
		{argonv1connect.ClusterServiceInitProcedure, client, connect.CodePermissionDenied},
		{argonv1connect.ClusterServiceJoinProcedure, server, connect.CodePermissionDenied},
		{argonv1connect.ClusterServiceJoinProcedure, nobody, connect.CodePermissionDenied},
		{argonv1connect.ClusterServiceAdmitProcedure, nobody, 0},
		{argonv1connect.ClusterServiceStatusProcedure, nobody, connect.CodeUnauthenticated},
		{argonv1connect.ClusterServiceStatusProcedure, client, 0},
		{argonv1connect.MachineServiceConsoleProcedure, server, 0},
		{argonv1connect.MachineServiceConsoleProcedure, removed, connect.CodePermissionDenied},
		{argonv1connect.MachineServiceConsoleProcedure, replaced, connect.CodePermissionDenied},
		{argonv1connect.ServerServiceMeetServersProcedure, admin, 0},
		{argonv1connect.ServerServiceMeetServersProcedure, client, connect.CodePermissionDenied},
		{argonv1connect.ServerServiceMeetServersProcedure, server, connect.CodePermissionDenied},
		{argonv1connect.ServerServiceIntroduceProcedure, server, 0},
		{argonv1connect.ServerServiceIntroduceProcedure, removed, connect.CodePermissionDenied},
		{argonv1connect.ServerServiceIntroduceProcedure, replaced, connect.CodePermissionDenied},
		{argonv1connect.ServerServiceIntroduceProcedure, admin, connect.CodePermissionDenied},
		{argonv1connect.ServerServiceIntroduceProcedure, client, connect.CodePermissionDenied},
		{argonv1connect.ServerServiceIntroduceProcedure, nobody, connect.CodePermissionDenied},
		{argonv1connect.ImageServiceFetchImageProcedure, server, 0},
		{argonv1connect.ImageServiceFetchImageProcedure, client, connect.CodePermissionDenied},
		{argonv1connect.ImageServiceFetchImageProcedure, nobody, connect.CodeUnauthenticated},
	} {
		ctx := context.WithValue(t.Context(), callerKey{}, c.caller)
		wantError(t, api.authorize(ctx, c.procedure), c.want, "")
	}
}

// Servers that wait for a majority meet all the same: without it they may not find
// each other.
func TestIntroductionsNeedNoCatalog(t *testing.T) {
	api := New(&fakeLocal{}, slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		caller Caller
		want   connect.Code
	}{{Caller{Kind: Server, ID: "B", Serial: "1"}, 0}, {Caller{Kind: Client, ID: "alice"}, connect.CodePermissionDenied}} {
		ctx := context.WithValue(t.Context(), callerKey{}, c.caller)
		wantError(t, api.authorize(ctx, argonv1connect.ServerServiceIntroduceProcedure), c.want, "")
	}
}

// A server that joined a moment ago is known, whatever the view shows.
func TestNewServerMayCall(t *testing.T) {
	w := newWorld(t)
	late := *w.parts
	late.View = catalog.NewView(w.store, w.parts.Log)
	follow := func() (end func()) {
		ctx, cancel := context.WithCancel(t.Context())
		var following sync.WaitGroup
		following.Go(func() { _ = late.View.Run(ctx) })
		return func() { cancel(); following.Wait() }
	}
	end := follow()
	w.must(late.View.Sync(t.Context()))
	end()
	w.addServer("c")
	api := New(&fakeLocal{parts: &late}, w.parts.Log)
	defer follow()()
	ctx := context.WithValue(t.Context(), callerKey{}, Caller{Kind: Server, ID: "C", Serial: "1"})
	wantError(t, api.authorize(ctx, argonv1connect.MachineServiceConsoleProcedure), 0, "")
}

// strangers serves the API to callers without a certificate.
func (w *world) strangers() *httptest.Server {
	s := httptest.NewUnstartedServer(ForTLS(New(w.local, slog.New(slog.DiscardHandler)).Handler(), func(tls.ConnectionState) (Caller, error) {
		return Caller{}, errors.New("no certificate was sent")
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	w.t.Cleanup(s.Close)
	return s
}

// procedures are all there are, and what a caller says to call them.
func procedures() map[string]string {
	all := map[string]string{}
	services := argonv1.File_argon_v1_api_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for k := range methods.Len() {
			all["/"+string(services.Get(i).FullName())+"/"+string(methods.Get(k).Name())] = contentType(methods.Get(k))
		}
	}
	return all
}

func contentType(m protoreflect.MethodDescriptor) string {
	if m.IsStreamingClient() || m.IsStreamingServer() {
		return "application/connect+json"
	}
	return "application/json"
}

// Without a certificate nothing can be called but Admit, and nothing of what is
// sent is waited for.
func TestStrangers(t *testing.T) {
	w := newWorld(t)
	s := w.strangers()
	all := procedures()
	if all[argonv1connect.MachineServiceConsoleProcedure] == "" || len(all) < 40 {
		t.Fatalf("only %d procedures are known", len(all))
	}
	all["/vnc"], all["/nothing"] = "", ""
	for procedure, contentType := range all {
		if procedure == argonv1connect.ClusterServiceAdmitProcedure {
			continue
		}
		never, end := io.Pipe()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+procedure, never)
		w.must(err)
		req.Header.Set("Content-Type", contentType)
		res, err := s.Client().Do(req)
		if err != nil {
			t.Errorf("%s: %v", procedure, err)
			continue
		}
		body, err := io.ReadAll(res.Body)
		if res.StatusCode != http.StatusUnauthorized && !bytes.Contains(body, []byte(`"code":"unauthenticated"`)) {
			t.Errorf("%s: %s, %q, %v", procedure, res.Status, body, err)
		}
		_, _ = res.Body.Close(), end.Close()
	}
}

// A stranger's request for admission is bounded.
func TestAdmissionIsBounded(t *testing.T) {
	w := newWorld(t)
	s := w.strangers()
	cluster := argonv1connect.NewClusterServiceClient(s.Client(), s.URL)
	server := &argonv1.Server{Meta: &argonv1.Meta{Name: "c"}}
	_, err := call(t, cluster.Admit, &argonv1.AdmitRequest{Server: server})
	wantError(t, err, 0, "")
	_, err = call(t, cluster.Admit, &argonv1.AdmitRequest{Server: server, Token: strings.Repeat("x", maxAdmission)})
	wantError(t, err, connect.CodeResourceExhausted, "")
	machines := argonv1connect.NewMachineServiceClient(s.Client(), s.URL)
	_, err = call(t, machines.ListMachines, &argonv1.ListMachinesRequest{})
	wantError(t, err, connect.CodeUnauthenticated, "argon client create")
	console := machines.Console(t.Context())
	_ = console.Send(&argonv1.ConsoleRequest{Name: "m"})
	_, err = console.Receive()
	wantError(t, err, connect.CodeUnauthenticated, "argon client create")
}
