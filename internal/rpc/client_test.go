package rpc

import (
	"context"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// asClient serves the API to a client with this certificate.
func (w *world) asClient(serial, name string) *world {
	w.t.Helper()
	remote := &world{t: w.t, local: w.local}
	h := New(w.local, w.parts.Log).Handler()
	remote.serve(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		c := Caller{Kind: Client, ID: name, Serial: serial, Expires: time.Now().Add(time.Hour)}
		h.ServeHTTP(rw, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
	}))
	return remote
}

// A certificate that is revoked is refused, and what it has under way ends: a
// console that is only listened to, and events that are only waited for.
func TestRevokedClient(t *testing.T) {
	w := newWorld(t)
	for serial, name := range map[string]string{"1": "alice", "2": "alice", "3": "bob"} {
		w.must(w.store.Clients.Create(t.Context(), &argonv1.ClientCertificate{
			Serial: serial, Client: name, Expires: timestamppb.New(time.Now().Add(time.Hour)), IssuedBy: "server a",
		}))
	}
	alice, bob := w.asClient("1", "alice"), w.asClient("3", "bob")
	status := func(who *world) error {
		_, err := who.cluster.Status(t.Context(), connect.NewRequest(&argonv1.StatusRequest{}))
		return err
	}
	w.must(status(alice))
	w.must(w.store.Machines.Create(t.Context(), &argonv1.Machine{Meta: &argonv1.Meta{Id: "M", Name: "web"}, ServerId: "A"}))
	console := alice.machines.Console(t.Context())
	w.must(console.Send(&argonv1.ConsoleRequest{Name: "web"}))
	if res, err := console.Receive(); err != nil || string(res.GetData()) != "hello" {
		t.Fatalf("got %v, %v", res, err)
	}
	events, err := alice.events.WatchEvents(t.Context(), connect.NewRequest(&argonv1.WatchEventsRequest{}))
	w.must(err)

	res, err := bob.cluster.RevokeClient(t.Context(), connect.NewRequest(&argonv1.RevokeClientRequest{Client: "alice"}))
	w.must(err)
	if n := len(res.Msg.GetRevoked()); n != 2 {
		t.Errorf("%d revoked", n)
	}
	for events.Receive() {
	}
	if events.Err() == nil {
		t.Error("the events end as if they were all")
	}
	if _, err := console.Receive(); err == nil {
		t.Error("the console goes on")
	}
	wantError(t, status(alice), connect.CodePermissionDenied, "revoked")
	w.must(status(bob))

	list, err := w.cluster.ListClients(t.Context(), connect.NewRequest(&argonv1.ListClientsRequest{}))
	w.must(err)
	for _, c := range list.Msg.GetClients() {
		if revoked := c.GetRevoked() != nil; revoked != (c.GetClient() == "alice") || revoked && c.GetRevokedBy() != "client bob" {
			t.Errorf("listed: %v", c)
		}
	}
	// By its serial number, also one's own; the socket is always open.
	_, err = bob.cluster.RevokeClient(t.Context(), connect.NewRequest(&argonv1.RevokeClientRequest{Client: "3"}))
	w.must(err)
	w.must(w.view.Sync(t.Context()))
	wantError(t, status(bob), connect.CodePermissionDenied, "revoked")
	w.must(status(w))
	_, err = w.cluster.RevokeClient(t.Context(), connect.NewRequest(&argonv1.RevokeClientRequest{Client: "carol"}))
	wantError(t, err, connect.CodeNotFound, "argon client ls")
}

// A certificate from before they were written down is listed once it is used, and
// can be revoked.
func TestUnrecordedClient(t *testing.T) {
	w := newWorld(t)
	old := w.asClient("9", "dave")
	status := func() error {
		_, err := old.cluster.Status(t.Context(), connect.NewRequest(&argonv1.StatusRequest{}))
		return err
	}
	w.must(status())
	list, err := w.cluster.ListClients(t.Context(), connect.NewRequest(&argonv1.ListClientsRequest{}))
	w.must(err)
	if c := list.Msg.GetClients(); len(c) != 1 || c[0].GetClient() != "dave" || c[0].GetSerial() != "9" {
		t.Errorf("listed: %v", c)
	}
	_, err = w.cluster.RevokeClient(t.Context(), connect.NewRequest(&argonv1.RevokeClientRequest{Client: "dave"}))
	w.must(err)
	w.must(w.view.Sync(t.Context()))
	wantError(t, status(), connect.CodePermissionDenied, "revoked")
}

func TestCertificateWarnings(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	for id, left := range map[string]time.Duration{"A": certificateSoon - time.Hour, "B": certificateSoon + time.Hour} {
		_, err := w.store.Servers.Update(t.Context(), id, func(s *argonv1.Server) error {
			s.CertificateExpires = timestamppb.New(now.Add(left))
			return nil
		})
		w.must(err)
	}
	w.must(w.view.Sync(t.Context()))
	if got := certificateWarnings(w.view.State(), now); len(got) != 1 {
		t.Errorf("got %q", got)
	}
}
