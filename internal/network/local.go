package network

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
)

// LocalAddress is where on this host a guest's port is forwarded from: a loopback
// address and a port that follow from the names and the port, so that nobody has to
// remember them and any daemon of the server finds them again, whatever else is
// published since. Several servers may share a host; that two guests' ports get the
// same is as likely as one in 200 thousand million.
func LocalAddress(serverID, guestID string, guestPort uint16) netip.AddrPort {
	const firstPort, ports = 10000, 50000
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%d", serverID, guestID, guestPort))
	host, port := binary.BigEndian.Uint32(sum[:4]), binary.BigEndian.Uint32(sum[4:8])%ports
	// 127.64.0.0/10: all of 127.0.0.0/8 is this host, and others use its
	// beginning.
	address := netip.AddrFrom4([4]byte{127, 64 | byte(host>>16)&63, byte(host >> 8), byte(host)})
	return netip.AddrPortFrom(address, firstPort+uint16(port))
}
