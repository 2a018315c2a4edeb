package rpc

import (
	"crypto/sha256"
	"fmt"
	"slices"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// maxNetworks is what the places on a guest's PCI bus leave.
const maxNetworks = hypervisor.MaxNetworks

// networks are a new machine's interfaces, with the hardware addresses that
// were asked for. The others are its own, and the same whenever they are made.
func networks(machineID string, n uint32, macs []string) []*argonv1.NetworkInterface {
	var list []*argonv1.NetworkInterface
	for i := range int(max(n, 1)) {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", machineID, i))
		// 52:54:00 is what QEMU's guests have.
		mac := fmt.Sprintf("52:54:00:%02x:%02x:%02x", sum[0], sum[1], sum[2])
		if i < len(macs) && macs[i] != "" {
			mac = macs[i]
		}
		list = append(list, &argonv1.NetworkInterface{Mac: mac})
	}
	return list
}

// checkNetworks checks what a new machine's interfaces are to be, and writes the
// addresses as the catalog does.
func checkNetworks(req *argonv1.CreateMachineRequest) error {
	name, macs := req.GetName(), req.GetMacs()
	if req.GetNetworks() == 0 {
		req.Networks = uint32(len(macs))
	}
	switch n := req.GetNetworks(); {
	case n > maxNetworks:
		return invalid("machine %s: %d networks: at most %d", name, n, maxNetworks)
	case len(macs) > int(n):
		return invalid("machine %s: %d hardware addresses for %s", name, len(macs), plural(uint64(n), "network"))
	}
	for i, text := range macs {
		if text == "" {
			continue
		}
		mac, err := hypervisor.ParseMAC(text)
		if err != nil {
			return invalid("machine %s: %w", name, err)
		}
		if macs[i] = mac; slices.Contains(macs[:i], macs[i]) {
			return invalid("machine %s: the hardware address %s is given twice", name, macs[i])
		}
	}
	return nil
}

// macUsers are the machines by their hardware addresses.
func macUsers(st *catalog.State) map[string]*argonv1.Machine {
	users := map[string]*argonv1.Machine{}
	for _, m := range st.Machines {
		for _, n := range m.GetNetworks() {
			if n.GetMac() != "" {
				users[n.GetMac()] = m
			}
		}
	}
	return users
}

// freeMACs refuses hardware addresses that another machine has.
func freeMACs(st *catalog.State, machine string, macs []string) error {
	if len(macs) == 0 {
		return nil
	}
	users := macUsers(st)
	for _, mac := range macs {
		if user := users[mac]; user != nil {
			return precondition("machine %s: machine %s has the hardware address %s: choose another", machine, user.GetMeta().GetName(), mac)
		}
	}
	return nil
}

// keepFreeMACs leaves out the addresses that machines have already, such as the
// one that a copy was made of, and says so.
func keepFreeMACs(st *catalog.State, macs []string) (free, warnings []string) {
	users := macUsers(st)
	for _, mac := range macs {
		if user := users[mac]; user != nil {
			warnings = append(warnings, fmt.Sprintf("machine %s has the hardware address %s: a network card gets another one", user.GetMeta().GetName(), mac))
			mac = ""
		}
		free = append(free, mac)
	}
	return free, warnings
}
