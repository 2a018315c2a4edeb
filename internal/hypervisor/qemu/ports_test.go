package qemu

import (
	"net"
	"strconv"
	"testing"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// Ports of a guest that runs are forwarded, and no more, by the real QEMU: it
// listens where it should, whatever was known before.
func TestSetPorts(t *testing.T) {
	w := newWorld(t)
	port := func(guest int) hypervisor.Port {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return hypervisor.Port{HostAddress: "127.0.0.1", HostPort: ln.Addr().(*net.TCPAddr).Port, GuestPort: guest}
	}
	http, ssh := port(80), port(22)
	w.spec.Ports = []hypervisor.Port{http}
	g := w.start()
	check := func(p hypervisor.Port, open bool) {
		t.Helper()
		conn, err := net.Dial("tcp", net.JoinHostPort(p.HostAddress, strconv.Itoa(p.HostPort)))
		if err == nil {
			_ = conn.Close()
		}
		if (err == nil) != open {
			t.Errorf("port %d: %v, want it open: %v", p.GuestPort, err, open)
		}
	}
	for _, step := range []struct{ stale, wanted []hypervisor.Port }{
		{nil, []hypervisor.Port{http, ssh}}, // as after a restart of the daemon
		{[]hypervisor.Port{http, ssh}, []hypervisor.Port{ssh}},
		{[]hypervisor.Port{ssh}, nil},
		{nil, []hypervisor.Port{http}},
	} {
		if err := g.SetPorts(t.Context(), step.stale, step.wanted); err != nil {
			t.Fatal(err)
		}
		for _, p := range []hypervisor.Port{http, ssh} {
			wanted := false
			for _, q := range step.wanted {
				wanted = wanted || p == q
			}
			check(p, wanted)
		}
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if err := g.SetPorts(t.Context(), nil, []hypervisor.Port{{HostAddress: "127.0.0.1", HostPort: taken.Addr().(*net.TCPAddr).Port, GuestPort: 25}}); err == nil {
		t.Error("a port that is in use was forwarded, it says")
	}
}
