package client_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// frozen takes connections and says nothing.
func frozen(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}

// closed refuses connections.
func closed(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestOneOfSeveralServers(t *testing.T) {
	local, ca := onSocket(t)
	credentials, err := local.RequestCredentials(t.Context(), "alice", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	down, hung, stranger, good := closed(t), frozen(t), serveTLS(t, newAuthority(t)), serveTLS(t, ca)
	c := dial(t, client.Options{Address: strings.Join([]string{down, hung, " " + stranger, good}, ","), Credentials: credentials})
	if at := c.Answered(); at != "" {
		t.Errorf("before the first call, %s answered", at)
	}
	for range 2 {
		if _, err := client.Call(t.Context(), c.Cluster.Status, &argonv1.StatusRequest{}); err != nil {
			t.Fatal(err)
		}
		if at := c.Answered(); at != good {
			t.Errorf("%s answered, want %s", at, good)
		}
		c.Close() // the next call connects anew
	}
	none := dial(t, client.Options{Address: down + "," + stranger, Credentials: credentials})
	_, err = client.Call(t.Context(), none.Cluster.Status, &argonv1.StatusRequest{})
	var unreachable *client.UnreachableError
	if !errors.As(err, &unreachable) || !strings.Contains(err.Error(), down+", "+stranger) || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}

func TestServersOfCredentials(t *testing.T) {
	local, _ := onSocket(t)
	credentials, err := local.RequestCredentials(t.Context(), "alice", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "alice")
	if err := credentials.Save(dir); err != nil {
		t.Fatal(err)
	}
	for _, servers := range [][]string{{"10.0.0.1:7440", "[fd00::2]:7440"}, {"10.0.0.3:7440"}, nil} {
		if servers == nil || servers[0] != "10.0.0.1:7440" {
			if err := client.SaveServers(dir, servers); err != nil {
				t.Fatal(err)
			}
		}
		if c, err := client.LoadCredentials(dir); err != nil || !slices.Equal(c.Servers, servers) {
			t.Errorf("got %v, %v, want %v", c, err, servers)
		}
	}
	// Those from before there was a list.
	if err := os.Remove(filepath.Join(dir, "servers")); err != nil {
		t.Fatal(err)
	}
	if c, err := client.LoadCredentials(dir); err != nil || len(c.Servers) > 0 {
		t.Errorf("got %v, %v", c, err)
	}
}
