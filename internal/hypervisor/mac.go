package hypervisor

import (
	"fmt"
	"net"
)

// ParseMAC reads the hardware address of one network card, and writes it as
// 52:54:00:12:34:56. It refuses addresses of other lengths, and those of groups.
func ParseMAC(text string) (string, error) {
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return "", fmt.Errorf("%q is not the hardware address of a network card: write it like 52:54:00:12:34:56", text)
	}
	return mac.String(), nil
}
