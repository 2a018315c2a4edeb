package rpc

import (
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

func TestSetServer(t *testing.T) {
	w := newWorld(t)
	there := *w.parts
	there.ServerID = "B"
	b := &world{t: t, local: &fakeLocal{parts: &there}}
	b.serve(ForSocket(New(b.local, w.parts.Log).Handler()))
	w.parts.Peers = onePeer{servers: b.servers}
	lost := &argonv1.Server{Meta: &argonv1.Meta{Id: "L", Name: "l"}, Address: "192.0.2.9", CertificateSerial: "1"}
	w.must(w.store.Servers.Create(t.Context(), lost))
	for _, c := range []struct {
		name, address string
		want          connect.Code
		says          string
	}{
		{"a", "192.0.2.7", 0, ""},
		{"a", "192.0.2.1", connect.CodeFailedPrecondition, "server a: it is not an address of this host"},
		{"a", "", connect.CodeInvalidArgument, "give an address"},
		{"b", "192.0.2.7", 0, ""},
		{"b", "192.0.2.1", connect.CodeFailedPrecondition, "server b: it is not an address of this host"},
		{"l", "192.0.2.7", connect.CodeFailedPrecondition, "start it with --address 192.0.2.7"},
		{"nobody", "192.0.2.7", connect.CodeNotFound, "argon server ls"},
	} {
		_, err := w.servers.SetServer(t.Context(), connect.NewRequest(&argonv1.SetServerRequest{Name: c.name, Address: c.address}))
		wantError(t, err, c.want, c.says)
	}
	_, err := w.servers.MeetServers(t.Context(), connect.NewRequest(&argonv1.MeetServersRequest{}))
	wantError(t, err, connect.CodeInvalidArgument, "another server")
	_, err = w.servers.MeetServers(t.Context(), connect.NewRequest(&argonv1.MeetServersRequest{Addresses: []string{"192.0.2.7"}}))
	wantError(t, err, connect.CodeUnavailable, "nobody answers there")
}
