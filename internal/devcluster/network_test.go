package devcluster

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"
)

// pair is a network of two servers without processes.
func pair(t *testing.T) (*Cluster, *Server, *Server) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("the program ip is missing (package iproute2)")
	}
	dir, err := os.MkdirTemp("", "argon-")
	if err != nil {
		t.Fatal(err)
	}
	c, err := plan(Options{Dir: dir, Servers: 2, Netns: true, Binary: "argon"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Down(context.Background(), KeepNothing); err != nil {
			t.Error(err)
		}
		left, _ := os.ReadDir("/run/netns")
		for _, e := range left {
			if len(e.Name()) > len(c.network.namespace("")) && e.Name()[:len(c.network.namespace(""))] == c.network.namespace("") {
				t.Errorf("namespace %s is left", e.Name())
			}
		}
	})
	if err := c.save(func() {}); err != nil {
		t.Fatal(err)
	}
	if err := c.network.up(t.Context(), c.state.Servers); err != nil {
		t.Fatal(err)
	}
	return c, c.servers[0], c.servers[1]
}

const testPort = 7440

// listen accepts one connection in a server's namespace and hands over what
// arrives on it.
func listen(t *testing.T, n *network, server serverState) <-chan string {
	t.Helper()
	arrived := make(chan string, 16)
	l := listenIn(t, n, server)
	done := make(chan struct{})
	t.Cleanup(func() { <-done })
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
			buf := make([]byte, 64)
			if k, err := conn.Read(buf); err == nil {
				arrived <- string(buf[:k])
			}
			_ = conn.Close()
		}
	}()
	return arrived
}

func listenIn(t *testing.T, n *network, s serverState) net.Listener {
	t.Helper()
	var l net.Listener
	err := n.in(n.namespace(s.Name), func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(s.Address, strconv.Itoa(testPort)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// reach tells whether one server can talk to the other. A broken path is
// silent, so that only time can tell.
func reach(t *testing.T, from, to *Server, within time.Duration) bool {
	t.Helper()
	n := from.cluster.network
	err := n.in(n.namespace(from.Name), func() error {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(to.Address, strconv.Itoa(testPort)), within)
		if err == nil {
			_, err = conn.Write([]byte("hello"))
			_ = conn.Close()
		}
		return err
	})
	return err == nil
}

const (
	surely = 30 * time.Second        // for what must work
	cutFor = 1500 * time.Millisecond // for what must not; longer than a lost packet's repetition
)

func TestCutAndHeal(t *testing.T) {
	c, s1, s2 := pair(t)
	arrived := listen(t, c.network, *s2.serverState)
	if !reach(t, s1, s2, surely) {
		t.Fatal("no way from s1 to s2")
	}
	if got := <-arrived; got != "hello" {
		t.Fatalf("s2 got %q", got)
	}
	conn, err := c.DialContext(t.Context(), "tcp", net.JoinHostPort(s2.Address, strconv.Itoa(testPort)))
	if err != nil {
		t.Fatal("no way from outside to s2:", err)
	}
	_ = conn.Close()

	if err := s2.Cut(t.Context()); err != nil {
		t.Fatal(err)
	}
	if reach(t, s1, s2, cutFor) {
		t.Error("s1 reaches s2 over a cut link")
	}
	again, err := Open(c.Dir())
	if err != nil || !again.servers[1].IsCut {
		t.Errorf("another process does not see the cut: %v", err)
	}
	if err := s2.Heal(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !reach(t, s1, s2, surely) {
		t.Error("s1 does not reach s2 after healing")
	}
}

func TestMuteOneWay(t *testing.T) {
	c, s1, s2 := pair(t)
	listen(t, c.network, *s1.serverState)
	listen(t, c.network, *s2.serverState)
	if err := s1.Mute(t.Context(), s2); err != nil {
		t.Fatal(err)
	}
	if reach(t, s1, s2, cutFor) {
		t.Error("s1 reaches s2 although it is mute")
	}
	conn, err := c.DialContext(t.Context(), "tcp", net.JoinHostPort(s1.Address, strconv.Itoa(testPort)))
	if err != nil {
		t.Fatal("s1 is cut off from others, too:", err)
	}
	_ = conn.Close()
	if err := s1.Unmute(t.Context(), s2); err != nil {
		t.Fatal(err)
	}
	if !reach(t, s1, s2, surely) || !reach(t, s2, s1, surely) {
		t.Error("s1 and s2 don't reach each other after healing")
	}
}

func TestLinksNeedNamespaces(t *testing.T) {
	c := newCluster(state{Servers: []serverState{{Name: "s1"}}}, nil)
	if err := c.servers[0].Cut(t.Context()); err == nil {
		t.Error("a link was cut that does not exist")
	}
}
