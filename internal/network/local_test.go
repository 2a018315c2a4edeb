package network

import (
	"fmt"
	"net/netip"
	"testing"
)

func TestLocalAddress(t *testing.T) {
	seen := map[netip.AddrPort]bool{}
	inside := netip.MustParsePrefix("127.64.0.0/10")
	for guest := range 500 {
		for port := range uint16(64) {
			a := LocalAddress("S", fmt.Sprint(guest), port)
			if a != LocalAddress("S", fmt.Sprint(guest), port) {
				t.Fatal("not the same twice")
			}
			if !inside.Contains(a.Addr()) || a.Port() < 10000 || a.Port() >= 60000 {
				t.Fatalf("%v is outside", a)
			}
			if seen[a] {
				t.Fatalf("%v twice", a)
			}
			seen[a] = true
		}
	}
}
