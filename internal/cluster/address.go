package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// This file finds the address that others reach this server at, where nobody
// has said it.

// hostAddress is an address of one of this host's interfaces.
type hostAddress struct {
	ip    netip.Addr
	iface string
	// up: the interface is, and has a link.
	up bool
}

// FindAddress is the address that other servers reach this one at, as far as can
// be told: the one that this host sends from on its way to them. towards is the
// API of one of them, "host" or "host:port"; empty: none is known yet. It is never
// loopback.
func FindAddress(ctx context.Context, towards string) (string, error) {
	all, err := hostAddresses()
	if err != nil {
		return "", err
	}
	var routed []netip.Addr
	if towards != "" {
		routed = append(routed, sourceTowards(ctx, withPort(towards, DefaultAPIPort)))
	}
	// Addresses for documentation (RFC 5737, RFC 3849) are nowhere in
	// particular: the way to them is the default route.
	routed = append(routed, sourceTowards(ctx, "192.0.2.1:9"), sourceTowards(ctx, "[2001:db8::1]:9"))
	ip, err := pickAddress(all, routed)
	if err != nil {
		return "", err
	}
	return ip.String(), nil
}

// pickAddress takes the first address of routed that others can use: where the
// kernel would send from, invalid where it knows no way. Without any it takes the
// only one that there is on an interface that is up, of IPv4 before IPv6.
func pickAddress(all []hostAddress, routed []netip.Addr) (netip.Addr, error) {
	for _, ip := range routed {
		if ip = plain(ip); usable(ip) {
			return ip, nil
		}
	}
	var four, six []hostAddress
	for _, a := range all {
		a.ip = plain(a.ip)
		switch {
		case !a.up || !usable(a.ip):
		case a.ip.Is4():
			four = append(four, a)
		default:
			six = append(six, a)
		}
	}
	candidates := four
	if len(four) == 0 {
		candidates = six
	}
	switch len(candidates) {
	case 0:
		return netip.Addr{}, errors.New("this host has no address that other servers could reach it at, only loopback and link-local ones: give it one, or say which with --address")
	case 1:
		return candidates[0].ip, nil
	}
	var names []string
	for _, a := range candidates {
		names = append(names, fmt.Sprintf("%s (%s)", a.ip, a.iface))
	}
	slices.Sort(names)
	return netip.Addr{}, fmt.Errorf("this host has no default route and several addresses, %s: say with --address which one other servers shall use", strings.Join(names, ", "))
}

// plain is an address without the interface that it is of.
func plain(ip netip.Addr) netip.Addr { return ip.Unmap().WithZone("") }

// usable tells whether an address can be one that other hosts reach.
func usable(ip netip.Addr) bool { return ip.IsValid() && ip.IsGlobalUnicast() }

func hostAddresses() ([]hostAddress, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("look at this host's network interfaces: %w", err)
	}
	var all []hostAddress
	for _, i := range interfaces {
		addresses, err := i.Addrs()
		if err != nil {
			continue // it has gone in between
		}
		for _, a := range addresses {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				all = append(all, hostAddress{ip: p.Addr(), iface: i.Name, up: i.Flags&net.FlagUp != 0 && i.Flags&net.FlagRunning != 0})
			}
		}
	}
	return all, nil
}

// sourceTowards is what this host would send from; invalid if it knows no way.
// Nothing is sent: the kernel only looks for the way.
func sourceTowards(ctx context.Context, hostPort string) netip.Addr {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", hostPort)
	if err != nil {
		return netip.Addr{}
	}
	defer conn.Close()
	at, _ := netip.ParseAddrPort(conn.LocalAddr().String())
	return at.Addr()
}

const (
	// addressPatience is how long a member's address may be missing before another
	// one of the host is taken: a network comes up after the server does.
	addressPatience = 30 * time.Second
	addressPause    = time.Second
)

// addressWait is how a member finds that its address has changed.
type addressWait struct {
	look func() ([]hostAddress, error)
	// find finds another one; nil: none will do.
	find            func(ctx context.Context) (string, error)
	patience, pause time.Duration
	log             *slog.Logger
}

// AwaitAddress waits until a member's address is one of this host. Where it stays
// away, while the host has another one that can be told, the host was given that:
// it returns the new one. Of a name the name server knows.
func AwaitAddress(ctx context.Context, own string, log *slog.Logger) (string, error) {
	w := newAddressWait(log)
	w.find = func(ctx context.Context) (string, error) { return FindAddress(ctx, "") }
	return w.await(ctx, own)
}

// AwaitGivenAddress waits until the address that a member was told to use is one
// of this host. It takes no other one.
func AwaitGivenAddress(ctx context.Context, given string, log *slog.Logger) error {
	_, err := newAddressWait(log).await(ctx, given)
	return err
}

func newAddressWait(log *slog.Logger) addressWait {
	return addressWait{look: hostAddresses, patience: addressPatience, pause: addressPause, log: log}
}

func (w addressWait) await(ctx context.Context, own string) (string, error) {
	ip, err := netip.ParseAddr(own)
	if err != nil || ip.IsLoopback() { // of which a host has more than its interface says
		return own, nil
	}
	trouble := complaint{log: w.log, about: "waiting for this server's address"}
	for began := time.Now(); ; {
		all, err := w.look()
		if err != nil {
			return "", err
		}
		if slices.ContainsFunc(all, func(a hostAddress) bool { return plain(a.ip) == plain(ip) }) {
			return own, nil
		}
		missing := fmt.Errorf("%s is not an address of this host", own)
		if w.find != nil && time.Since(began) >= w.patience {
			now, err := w.find(ctx)
			if err == nil {
				w.log.Info("this server's address is gone; it takes the one that the host has now", "was", own, "address", now)
				return now, nil
			}
			missing = fmt.Errorf("%w: %w", missing, err)
		}
		trouble.tell(ctx, missing)
		if err := sleep(ctx, w.pause); err != nil {
			return "", err
		}
	}
}
