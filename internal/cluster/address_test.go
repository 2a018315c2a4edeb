package cluster

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestPickAddress(t *testing.T) {
	at := func(iface, ip string) hostAddress {
		return hostAddress{ip: netip.MustParseAddr(ip), iface: iface, up: true}
	}
	down := func(a hostAddress) hostAddress { a.up = false; return a }
	lo := []hostAddress{at("lo", "127.0.0.1"), at("lo", "::1")}
	from := func(ips ...string) (all []netip.Addr) {
		for _, ip := range ips {
			a, _ := netip.ParseAddr(ip) // "": no way
			all = append(all, a)
		}
		return all
	}
	for _, tt := range []struct {
		name   string
		all    []hostAddress
		routed []netip.Addr
		want   string // an address, or what the error says
	}{
		{"a default route", append(lo, at("eth0", "10.0.0.1"), at("eth1", "10.9.0.1")), from("10.9.0.1", "fd00::1"), "10.9.0.1"},
		{"of IPv6 only", append(lo, at("eth0", "fd00::1"), at("eth0", "fd00::2")), from("", "fd00::2"), "fd00::2"},
		{"the way to whom it joins first", append(lo, at("eth0", "10.0.0.1"), at("eth1", "10.9.0.1")), from("10.0.0.1", "10.9.0.1"), "10.0.0.1"},
		{"the way leads through a tunnel on this host", append(lo, at("eth0", "10.0.0.1")), from("127.0.0.1", "10.0.0.1"), "10.0.0.1"},
		{"no default route", append(lo, at("eth0", "10.61.0.1")), from("", ""), "10.61.0.1"},
		{"no default route, IPv6 only", append(lo, at("eth0", "fe80::1"), at("eth0", "fd00::1")), from("", ""), "fd00::1"},
		{"IPv4 and IPv6 without a route", append(lo, at("eth0", "10.61.0.1"), at("eth0", "fd00::1"), at("eth0", "fd00::2")), from(), "10.61.0.1"},
		{"an interface that is down", append(lo, at("eth0", "10.61.0.1"), down(at("docker0", "172.17.0.1"))), from(), "10.61.0.1"},
		{"IPv4 in IPv6", append(lo, at("eth0", "::ffff:10.61.0.1")), from(), "10.61.0.1"},
		{"nothing", lo, from("", ""), "no address that other servers could reach it at"},
		{"loopback by a route", lo, from("127.0.0.1", "::1"), "no address that other servers could reach it at"},
		{"link-local only", append(lo, at("eth0", "169.254.7.7"), at("eth0", "fe80::1")), from("169.254.7.7", "fe80::1%eth0"), "no address"},
		{"two of a kind", append(lo, at("eth1", "10.9.0.1"), at("eth0", "10.0.0.1")), from("", ""), "10.0.0.1 (eth0), 10.9.0.1 (eth1): say with --address"},
		{"two of IPv6", append(lo, at("eth0", "fd00::1"), at("eth0", "fd00::2")), from("", ""), "--address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := pickAddress(tt.all, tt.routed)
			if err != nil {
				if !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				return
			}
			if got.String() != tt.want {
				t.Errorf("got %s, want %q", got, tt.want)
			}
		})
	}
}

func TestWithPort(t *testing.T) {
	for given, want := range map[string]string{
		"10.0.0.1": "10.0.0.1:7440", "10.0.0.1:1": "10.0.0.1:1", "s1": "s1:7440", "s1:1": "s1:1",
		"fd00::1": "[fd00::1]:7440", "[fd00::1]": "[fd00::1]:7440", "[fd00::1]:1": "[fd00::1]:1",
	} {
		if got := withPort(given, 7440); got != want {
			t.Errorf("%s: got %s, want %s", given, got, want)
		}
	}
}

// A member whose address is not there waits for it, and takes another one only
// after a while, and if it is clear which.
func TestAwaitAddress(t *testing.T) {
	has := func(ips ...string) (all []hostAddress) {
		for _, ip := range ips {
			all = append(all, hostAddress{ip: netip.MustParseAddr(ip), up: true})
		}
		return all
	}
	for _, tt := range []struct {
		name     string
		own      string
		looks    [][]hostAddress
		patience time.Duration
		found    []string // "": nothing clear
		want     string
	}{
		{"it is there", "10.0.0.1", [][]hostAddress{has("10.0.0.1", "10.0.0.2")}, 0, nil, "10.0.0.1"},
		{"it comes", "10.0.0.1", [][]hostAddress{has(), has("10.0.0.2"), has("10.0.0.2", "10.0.0.1")}, time.Hour, nil, "10.0.0.1"},
		{"given, and it comes late", "10.0.0.1", [][]hostAddress{has("10.0.0.2"), has("10.0.0.2"), has("10.0.0.1")}, 0, nil, "10.0.0.1"},
		{"it is another", "10.0.0.1", [][]hostAddress{has("10.0.0.2")}, 0, []string{"10.0.0.2"}, "10.0.0.2"},
		{"not clear at once", "fd00::1", [][]hostAddress{has("fd00::2")}, 0, []string{"", "", "fd00::2"}, "fd00::2"},
		{"not clear, and it comes", "fd00::1", [][]hostAddress{has("fd00::2"), has("fd00::1")}, 0, []string{""}, "fd00::1"},
		{"loopback", "127.73.0.1", nil, 0, nil, "127.73.0.1"},
		{"a name", "s1.example.org", nil, 0, nil, "s1.example.org"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := addressWait{
				look: func() ([]hostAddress, error) {
					now := tt.looks[0]
					tt.looks = tt.looks[min(1, len(tt.looks)-1):]
					return now, nil
				},
				find: func(context.Context) (string, error) {
					now := tt.found[0]
					if tt.found = tt.found[1:]; now == "" {
						return "", errNotYet
					}
					return now, nil
				},
				patience: tt.patience, log: slog.New(slog.DiscardHandler),
			}
			if tt.found == nil {
				w.find = nil // as for an address that was given
			}
			if got, err := w.await(t.Context(), tt.own); err != nil || got != tt.want {
				t.Errorf("got %s, %v, want %s", got, err, tt.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w := addressWait{look: func() ([]hostAddress, error) { return nil, nil }, patience: time.Hour, pause: time.Hour, log: slog.New(slog.DiscardHandler)}
	if _, err := w.await(ctx, "10.0.0.1"); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: %v", err)
	}
}
