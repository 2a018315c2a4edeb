package network

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
)

// portsPerGuest is how many local ports each guest has to itself.
const portsPerGuest = 64

// LocalAddress is where on this host a guest's published port number index (of
// at most 64) is forwarded from: a loopback address and a port that follow from
// the names, so that nobody has to remember them and any daemon of the server
// finds them again. Several servers may share a host; that two guests get the
// same is as likely as one in 3 thousand million.
func LocalAddress(serverID, guestID string, index int) netip.AddrPort {
	const firstPort, blocks = 10000, 780 // up to port 59919
	sum := sha256.Sum256([]byte(serverID + "/" + guestID))
	host := binary.BigEndian.Uint32(sum[:4])
	block := binary.BigEndian.Uint16(sum[4:6]) % blocks
	// 127.64.0.0/10: all of 127.0.0.0/8 is this host, and others use its
	// beginning.
	address := netip.AddrFrom4([4]byte{127, 64 | byte(host>>16)&63, byte(host >> 8), byte(host)})
	return netip.AddrPortFrom(address, firstPort+block*portsPerGuest+uint16(index%portsPerGuest))
}
