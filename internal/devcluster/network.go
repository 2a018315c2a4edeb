package devcluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// netnsPrefix begins every server's address in its namespace; outsideAddress
// is where clients stand, in the bridge's namespace. No cluster sees another's.
const (
	netnsPrefix    = "10.90.0."
	outsideAddress = "10.90.0.254"
	// nowhere is a hardware address that nobody has: packets for it are lost
	// without an error, as on a broken path.
	nowhere = "02:00:00:00:00:00"
)

// network is the namespaces of a cluster: one for each server with its end of
// a veth pair (eth0), and one with the bridge and the other ends, called as
// the servers are. Nothing of it is in the host's own namespace.
type network struct{ id string }

// outside is the namespace with the bridge.
func (n *network) outside() string { return n.namespace("net") }

func (n *network) namespace(server string) string { return "argon-" + n.id + "-" + server }

func (n *network) up(ctx context.Context, servers []serverState) error {
	out := n.outside()
	commands := [][]string{
		{"netns", "add", out},
		{"-n", out, "link", "set", "lo", "up"},
		{"-n", out, "link", "add", "name", "bridge0", "type", "bridge", "forward_delay", "0"},
		{"-n", out, "addr", "add", outsideAddress + "/24", "dev", "bridge0"},
		{"-n", out, "link", "set", "bridge0", "up"},
	}
	for _, s := range servers {
		ns := n.namespace(s.Name)
		commands = append(commands,
			[]string{"netns", "add", ns},
			[]string{"-n", out, "link", "add", s.Name, "type", "veth", "peer", "name", "eth0", "netns", ns},
			[]string{"-n", out, "link", "set", s.Name, "master", "bridge0", "up"},
			[]string{"-n", ns, "addr", "add", s.Address + "/24", "dev", "eth0"},
			[]string{"-n", ns, "link", "set", "lo", "up"},
			[]string{"-n", ns, "link", "set", "eth0", "up"},
		)
	}
	for _, c := range commands {
		if err := ip(ctx, c...); err != nil {
			return err
		}
	}
	return nil
}

// down removes every namespace of this cluster, whoever made it.
func (n *network) down(ctx context.Context) error {
	entries, err := os.ReadDir("/run/netns")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("listing network namespaces: %w", err)
	}
	err = nil
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), n.namespace("")) {
			err = errors.Join(err, ip(ctx, "netns", "del", e.Name()))
		}
	}
	return err
}

// setLink takes a server's cable out or puts it in again.
func (n *network) setLink(ctx context.Context, server string, up bool) error {
	word := "down"
	if up {
		word = "up"
	}
	return ip(ctx, "-n", n.outside(), "link", "set", server, word)
}

// lose makes everything vanish that one server sends to an address.
func (n *network) lose(ctx context.Context, server, address string) error {
	return ip(ctx, "-n", n.namespace(server), "neigh", "replace", address, "lladdr", nowhere, "dev", "eth0", "nud", "permanent")
}

// find lets the server look for the address anew.
func (n *network) find(ctx context.Context, server, address string) error {
	return ip(ctx, "-n", n.namespace(server), "neigh", "del", address, "dev", "eth0")
}

// received tells how many bytes a server has got from others.
func (n *network) received(ctx context.Context, server string) (uint64, error) {
	out, err := exec.CommandContext(ctx, "ip", "-j", "-s", "-n", n.namespace(server), "link", "show", "dev", "eth0").Output()
	if err != nil {
		return 0, fmt.Errorf("ip link show: %w", err)
	}
	var links []struct {
		Stats struct {
			RX struct {
				Bytes uint64 `json:"bytes"`
			} `json:"rx"`
		} `json:"stats64"`
	}
	if err := json.Unmarshal(out, &links); err != nil || len(links) != 1 {
		return 0, fmt.Errorf("ip link show told of %d links: %w", len(links), err)
	}
	return links[0].Stats.RX.Bytes, nil
}

// in runs f on a thread inside a namespace; sockets and processes that f makes
// belong to it.
func (n *network) in(namespace string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so that no other
		// one finds itself in there.
		runtime.LockOSThread()
		done <- func() error {
			ns, err := os.Open(filepath.Join("/run/netns", namespace))
			if err != nil {
				return fmt.Errorf("network namespace: %w", err)
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("entering network namespace %s: %w", namespace, err)
			}
			return f()
		}()
	}()
	return <-done
}

// DialContext connects from where clients of the cluster stand: this host, or
// with namespaces the one beside the servers. The address must be numeric.
func (c *Cluster) DialContext(ctx context.Context, protocol, address string) (net.Conn, error) {
	var d net.Dialer
	if c.network == nil {
		return d.DialContext(ctx, protocol, address)
	}
	var conn net.Conn
	err := c.network.in(c.network.outside(), func() (err error) {
		conn, err = d.DialContext(ctx, protocol, address)
		return err
	})
	return conn, err
}

// ip runs the command of that name.
func ip(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return errors.New("network namespaces: the program `ip` is missing: install the package iproute2")
	}
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
