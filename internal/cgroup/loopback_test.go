package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dialsName is the environment variable that makes this program one that only
// dials (TestDials).
const dialsName = "ARGON_TEST_DIALS"

// What is in a group reaches nothing on loopback but DNS, however the address is
// written, and everything else; also when it ran before, and as any user. What is
// outside of the group is not concerned.
func TestCloseLoopback(t *testing.T) {
	tree := open(t, "cgroup")
	if os.Geteuid() != 0 {
		t.Skip("needs root, for programs in the kernel")
	}
	g, err := tree.Make("a")
	if err != nil {
		t.Fatal(err)
	}
	defer g.End()
	open := []string{
		"tcp 127.0.0.1:8000", "tcp 127.1.2.3:8000", "tcp 0.0.0.0:8000", "tcp [::1]:8000", "tcp [::]:8000", "tcp [::ffff:127.0.0.1]:8000",
		"udp 127.0.0.1:8000", "udp [::1]:8000", "sendto 127.0.0.1:8000", "sendto [::1]:8000", "sendto [::ffff:127.0.0.1]:8000",
	}
	always := []string{
		"tcp 127.0.0.1:53", "tcp [::1]:53", "sendto 127.0.0.53:53", "sendto [::1]:53",
		"tcp 192.0.2.1:8000", "udp [2001:db8::1]:8000", "tcp [::ffff:192.0.2.1]:8000", "udp 192.0.2.1:8000", "sendto 192.0.2.1:8000",
		"sendto [2001:db8::1]:8000",
	}
	all := slices.Concat(open, always)
	if got := refused(t, g, all); len(got) > 0 {
		t.Fatalf("refused before it was closed: %q", got)
	}
	for range 2 { // again by the next daemon
		if err := tree.Dirs().CloseLoopback(); err != nil {
			t.Fatal(err)
		}
		if got := refused(t, g, all); !slices.Equal(got, open) {
			t.Errorf("refused: %q\nwant: %q", got, open)
		}
	}
	if got := refused(t, nil, all); len(got) > 0 {
		t.Errorf("refused outside of the group: %q", got)
	}
}

// Where it can't be closed, that is said.
func TestLoopbackStaysOpen(t *testing.T) {
	for _, d := range []Dirs{{}, {V1: map[string]string{memory: t.TempDir()}}, {V2: t.TempDir()}} {
		if d.CloseLoopback() == nil {
			t.Errorf("%+v: closed, it says", d)
		}
	}
}

// refused is what a process in the group, and in a network of its own, is refused.
func refused(t *testing.T, g *Group, dials []string) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestDials$")
	cmd.Env = append(os.Environ(), dialsName+"="+strings.Join(dials, ","))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	run := cmd.Start
	if g != nil {
		run = func() error { return g.Start(cmd.SysProcAttr, cmd.Start) }
	}
	runtime.LockOSThread()
	err := run()
	runtime.UnlockOSThread()
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	var list []string
	for line := range strings.Lines(out.String()) {
		if dial, ok := strings.CutPrefix(line, "refused "); ok {
			list = append(list, strings.TrimSpace(dial))
		}
	}
	return list
}

// TestDials is the process that dials: nothing by itself.
func TestDials(t *testing.T) {
	dials := os.Getenv(dialsName)
	if dials == "" {
		t.Skip("a part of TestCloseLoopback")
	}
	for _, args := range []string{"link set lo up", "addr add 192.0.2.1/32 dev lo", "addr add 2001:db8::1/128 dev lo nodad"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	// The kernel takes up an IPv6 address in its own time.
	for deadline := time.Now().Add(patience); errors.Is(try("udp", "[2001:db8::1]:9"), unix.ENETUNREACH); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the address is not taken up")
		}
	}
	for _, port := range []int{8000, 53} {
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
	}
	for dial := range strings.SplitSeq(dials, ",") {
		kind, address, _ := strings.Cut(dial, " ")
		switch err := try(kind, address); {
		case errors.Is(err, unix.EPERM):
			fmt.Println("refused", dial)
		case err != nil:
			t.Errorf("%s: %v", dial, err)
		}
	}
}

// try connects, or sends from a socket that is not connected, with the system's
// calls: net would write some addresses in another way.
func try(kind, address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	var number int
	if _, err := fmt.Sscan(port, &number); err != nil {
		return err
	}
	var to unix.Sockaddr
	family, ip := unix.AF_INET6, net.ParseIP(host)
	if strings.Contains(host, ":") {
		to = &unix.SockaddrInet6{Port: number, Addr: [16]byte(ip.To16())}
	} else {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Port: number, Addr: [4]byte(ip.To4())}
	}
	how := unix.SOCK_DGRAM
	if kind == "tcp" {
		how = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, how|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if kind == "sendto" {
		return unix.Sendto(fd, []byte("x"), 0, to)
	}
	return unix.Connect(fd, to)
}
