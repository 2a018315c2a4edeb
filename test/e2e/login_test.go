package e2e_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/test/harness"
)

// login is a user of a guest, who comes through a published port of its SSH
// server with a key.
type login struct {
	c       *harness.Cluster
	user    string
	key     ssh.Signer
	address string
}

// newLogin makes a key for a user.
func newLogin(c *harness.Cluster, user string) *login {
	c.T.Helper()
	_, secret, err := ed25519.GenerateKey(rand.Reader)
	must(c.T, err)
	key, err := ssh.NewSignerFromKey(secret)
	must(c.T, err)
	return &login{c: c, user: user, key: key}
}

// public is the key as authorized_keys has it.
func (l *login) public() string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(l.key.PublicKey())))
}

// through says where the port is open.
func (l *login) through(s *devcluster.Server, port string) {
	l.address = net.JoinHostPort(s.Address, port)
}

// runs is what a command prints; an error if it ends with one, or nobody can log
// in.
func (l *login) runs(command string) (string, error) {
	nc, err := l.c.DialContext(l.c.T.Context(), "tcp", l.address)
	if err != nil {
		return "", err
	}
	defer nc.Close()
	if err := nc.SetDeadline(time.Now().Add(harness.Patience)); err != nil {
		return "", err
	}
	conn, channels, requests, err := ssh.NewClientConn(nc, l.address, &ssh.ClientConfig{
		User: l.user, Auth: []ssh.AuthMethod{ssh.PublicKeys(l.key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return "", err
	}
	client := ssh.NewClient(conn, channels, requests)
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return "", err
	}
	defer session.Close()
	out, err := session.CombinedOutput(command)
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// prints is runs where it has to succeed.
func (l *login) prints(t *testing.T, command string) string {
	t.Helper()
	out, err := l.runs(command)
	must(t, err)
	return out
}

// eventually tries again until the command prints what is wanted. A first boot
// with emulated processors has many times as much to do as other waits are for.
func (l *login) eventually(t *testing.T, command, want string) {
	t.Helper()
	var out string
	var err error
	for deadline := time.Now().Add(3 * harness.Patience); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if out, err = l.runs(command); err == nil && out == want {
			return
		}
	}
	t.Fatalf("%s still prints %q, not %q: %v", command, out, want, err)
}
