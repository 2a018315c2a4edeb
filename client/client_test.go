package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority signs what the fake cluster needs.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := a.sign(t, a.cert, &key.PublicKey)
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) sign(t *testing.T, template *x509.Certificate, public any) []byte {
	t.Helper()
	parent := a.cert
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (a *authority) leaf(t *testing.T, name string, public any) []byte {
	t.Helper()
	return a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames:    []string{name, "server.argon.internal"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, public)
}

func toPEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// fakeCluster answers Status and signs certificates.
type fakeCluster struct {
	argonv1connect.UnimplementedClusterServiceHandler
	t  *testing.T
	ca *authority
}

func (f *fakeCluster) Status(context.Context, *connect.Request[argonv1.StatusRequest]) (*connect.Response[argonv1.StatusResponse], error) {
	return connect.NewResponse(&argonv1.StatusResponse{State: "ready"}), nil
}

func (f *fakeCluster) IssueClientCertificate(_ context.Context, r *connect.Request[argonv1.IssueClientCertificateRequest]) (*connect.Response[argonv1.IssueClientCertificateResponse], error) {
	request, err := x509.ParseCertificateRequest(r.Msg.GetCertificateRequest())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return connect.NewResponse(&argonv1.IssueClientCertificateResponse{
		CertificatePem:   string(toPEM("CERTIFICATE", f.ca.leaf(f.t, r.Msg.GetName(), request.PublicKey))),
		CaCertificatePem: string(toPEM("CERTIFICATE", f.ca.cert.Raw)),
		Servers:          []string{"10.0.0.1:7440", "[fd00::2]:7440"},
	}), nil
}

// fakeMachines echoes what is typed into its console, at once.
type fakeMachines struct {
	argonv1connect.UnimplementedMachineServiceHandler
}

func (fakeMachines) Console(_ context.Context, s *connect.BidiStream[argonv1.ConsoleRequest, argonv1.ConsoleResponse]) error {
	for {
		req, err := s.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = s.Send(&argonv1.ConsoleResponse{Data: req.GetData()})
		}
		if err != nil {
			return err
		}
	}
}

// serve answers the API until the test ends.
func serve(t *testing.T, l net.Listener, ca *authority, config *tls.Config) {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle(argonv1connect.NewClusterServiceHandler(&fakeCluster{t: t, ca: ca}))
	mux.Handle(argonv1connect.NewMachineServiceHandler(fakeMachines{}))
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	protocols.SetHTTP2(true)
	server := &http.Server{Handler: mux, Protocols: &protocols, TLSConfig: config}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if config != nil {
			_ = server.ServeTLS(l, "", "")
		} else {
			_ = server.Serve(l)
		}
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
}

func dial(t *testing.T, o client.Options) *client.Client {
	t.Helper()
	c, err := client.Dial(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func onSocket(t *testing.T) (*client.Client, *authority) {
	t.Helper()
	dir, err := os.MkdirTemp("", "argon") // short enough for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "admin.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t)
	serve(t, l, ca, nil)
	return dial(t, client.Options{Socket: path}), ca
}

func TestSocketCarriesCallsAndStreams(t *testing.T) {
	c, _ := onSocket(t)
	status, err := client.Call(t.Context(), c.Cluster.Status, &argonv1.StatusRequest{})
	if err != nil || status.GetState() != "ready" {
		t.Fatalf("status: %v, %v", status, err)
	}
	stream := c.Machines.Console(t.Context())
	for _, word := range []string{"first", "second"} {
		if err := stream.Send(&argonv1.ConsoleRequest{Data: []byte(word)}); err != nil {
			t.Fatal(err)
		}
		// The answer comes before the next word is sent: both ways at once.
		res, err := stream.Receive()
		if err != nil || string(res.GetData()) != word {
			t.Fatalf("console: %q, %v; want %q", res.GetData(), err, word)
		}
	}
	if err := errors.Join(stream.CloseRequest(), stream.CloseResponse()); err != nil {
		t.Fatal(err)
	}
}

func TestRemoteClientWithRequestedCredentials(t *testing.T) {
	local, ca := onSocket(t)
	credentials, err := local.RequestCredentials(t.Context(), "alice", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "alice")
	if err := credentials.Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := credentials.Save(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("saving twice: %v, want fs.ErrExist", err)
	}
	if info, err := os.Stat(filepath.Join(dir, "client.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key: %v, %v; want mode 0600", info, err)
	}
	if credentials, err = client.LoadCredentials(dir); err != nil {
		t.Fatal(err)
	}
	remote := dial(t, client.Options{Address: serveTLS(t, ca), Credentials: credentials})
	status, err := client.Call(t.Context(), remote.Cluster.Status, &argonv1.StatusRequest{})
	if err != nil || status.GetState() != "ready" {
		t.Fatalf("status: %v, %v", status, err)
	}
}

// serveTLS demands client certificates of this authority.
func serveTLS(t *testing.T, ca *authority) (address string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		Certificates: []tls.Certificate{{Certificate: [][]byte{ca.leaf(t, "s1", &key.PublicKey)}, PrivateKey: key}},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, ca, config)
	return l.Addr().String()
}

func TestRemoteClientRefusesAnotherAuthority(t *testing.T) {
	local, _ := onSocket(t)
	credentials, err := local.RequestCredentials(t.Context(), "alice", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	stranger := serveTLS(t, newAuthority(t))
	remote := dial(t, client.Options{Address: stranger, Credentials: credentials})
	if _, err := client.Call(t.Context(), remote.Cluster.Status, &argonv1.StatusRequest{}); err == nil {
		t.Fatal("a server with another cluster's certificate was believed")
	}
}

func TestUnreachableServer(t *testing.T) {
	dead := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Skip("temporary directory too long for a socket:", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	for _, path := range []string{filepath.Join(t.TempDir(), "none"), dead} {
		c := dial(t, client.Options{Socket: path})
		_, err := client.Call(t.Context(), c.Cluster.Status, &argonv1.StatusRequest{})
		var unreachable *client.UnreachableError
		if !errors.As(err, &unreachable) {
			t.Fatalf("%s: %v, want an UnreachableError", path, err)
		}
		if want := "no argon server answers at " + path + ": start it with `argon server`"; unreachable.Error() != want {
			t.Errorf("got  %s\nwant %s", unreachable, want)
		}
	}
}

func TestDialRefusesNonsense(t *testing.T) {
	for name, o := range map[string]client.Options{
		"nothing":                 {},
		"both":                    {Socket: "/x", Address: "y"},
		"no certificate":          {Address: "y"},
		"certificate is not one":  {Address: "y", Credentials: &client.Credentials{Certificate: []byte("x")}},
		"certificate without key": {Address: "y", Credentials: &client.Credentials{}},
	} {
		if _, err := client.Dial(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := client.LoadCredentials(t.TempDir()); err == nil || !strings.Contains(err.Error(), "argon client create") {
		t.Errorf("an empty directory: %v", err)
	}
}

func TestSocketPath(t *testing.T) {
	for dir, want := range map[string]string{
		"/var/lib/argon":  "/run/argon/admin.sock",
		"/var/lib/argon/": "/run/argon/admin.sock",
		"/srv/s1":         "/srv/s1/run/admin.sock",
	} {
		if got := client.SocketPath(dir); got != want {
			t.Errorf("%s: %s, want %s", dir, got, want)
		}
	}
}
