package cluster

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// A server whose clock is far ahead forgets what has expired, but no
// revocation: the certificate is still good by the others' clocks.
func TestRevocationsSurviveClocks(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	issue := func(name string) {
		t.Helper()
		_, request, err := newRequest()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.member.IssueClient(t.Context(), name, request, time.Hour, "server s1"); err != nil {
			t.Fatal(err)
		}
	}
	issue("alice")
	issue("bob")
	clients := a.member.Store().Clients
	list, err := clients.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		if c.GetClient() == "alice" {
			c.Revoked = timestamppb.Now()
			if err := clients.Put(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
	}
	a.wrong.Store(int64(40 * 24 * time.Hour))
	issue("carol")
	if list, err = clients.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	known := map[string]*argonv1.ClientCertificate{}
	for _, c := range list {
		known[c.GetClient()] = c
	}
	if known["alice"].GetRevoked() == nil || known["bob"] != nil || known["carol"] == nil {
		t.Errorf("what is known 40 days ahead: %v", list)
	}
}
