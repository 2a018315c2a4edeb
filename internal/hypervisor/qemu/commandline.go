package qemu

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// reconnectFor is how long a guest's disk waits for its volume: longer than
// anybody does. After that QEMU would answer with errors.
const reconnectFor = 365 * 24 * time.Hour

// openFor is how long QEMU waits for the volume's socket when it starts.
const openFor = 20 * time.Second

// commandLine is QEMU's arguments for a guest. It stands still until told to go
// on, and stays, standing still, after it has powered itself off: then whoever
// looks finds out that it was not a crash. noWayOut is Options.NoWayOut.
func commandLine(s hypervisor.Spec, noWayOut bool) ([]string, error) {
	args := []string{
		"-name", "guest=" + escape(s.Name),
		"-nodefaults", "-no-user-config",
		"-machine", escape(cmp.Or(s.Machine, "pc")) + ",hpet=off,usb=off,vmport=off" + pflash(s.Firmware),
		"-smp", strconv.Itoa(s.CPUs),
		"-m", strconv.FormatInt(s.MemoryBytes>>10, 10) + "k",
		"-display", "none",
		"-rtc", "base=utc",
		"-global", "PIIX4_PM.disable_s3=1",
		"-global", "PIIX4_PM.disable_s4=1",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-msg", "timestamp=on",
		"-action", "shutdown=pause",
		"-S",
	}
	if s.Incoming {
		args = append(args, "-incoming", "defer")
	}
	args = append(args, accelerate(s.Acceleration)...)
	args = append(args,
		"-chardev", "socket,id=monitor,server=on,wait=off,path="+escape(monitorSocket(s.Dir)),
		"-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=console,server=on,wait=off,path="+escape(consoleSocket(s.Dir))+
			",logappend=on,logfile="+escape(consoleLog(s.Dir)),
		"-serial", "chardev:console",
		"-object", "rng-builtin,id=random", "-device", "virtio-rng-pci,rng=random,"+addr(slotRandom).String(),
	)
	if s.Generation != "" {
		args = append(args, "-device", "vmgenid,guid="+escape(s.Generation))
	}
	args = append(args, screenArgs(s.Dir)...)
	args = append(args, agentArgs(s.Dir)...)
	if s.Firmware == hypervisor.UEFI {
		firmware, err := firmwareArgs(s.Dir)
		if err != nil {
			return nil, err
		}
		args = append(args, firmware...)
	}
	disks, err := json.Marshal(map[string]any{"qom-type": "throttle-group", "id": throttleID, "limits": throttleLimits(s.Shares)})
	if err != nil {
		return nil, fmt.Errorf("limits of disks: %w", err)
	}
	args = append(args, "-object", string(disks))
	for _, d := range s.Disks {
		disk, err := diskArgs(d)
		if err != nil {
			return nil, err
		}
		args = append(args, disk...)
	}
	if s.Seed != "" {
		args = append(args, seedArgs(s.Seed)...)
	}
	return append(args, networkArgs(s.Networks, s.Ports, noWayOut)...), nil
}

// The places on the PCI bus: the same for a device whatever else there is, so
// that a guest that gets one more disk finds its network where it was. Disks and
// networks have ranges.
const (
	slotScreen  = 0x02
	slotDisk    = 0x03
	slotNetwork = 0x14
	slotRandom  = 0x1c
	slotAgent   = 0x1d
	slotPointer = 0x1e
	slotSeed    = 0x1f
)

func addr(slot int) property { return property{"addr", fmt.Sprintf("%#x", slot)} }

// property is one of a device's. A value is text or a number.
type property struct {
	name  string
	value any
}

func (p property) String() string { return fmt.Sprintf("%s=%s", p.name, escape(fmt.Sprint(p.value))) }

// properties are a device's, its driver first.
type properties []property

// text is the command line's way to write them.
func (p properties) text() string {
	parts := []string{fmt.Sprint(p[0].value)}
	for _, one := range p[1:] {
		parts = append(parts, one.String())
	}
	return strings.Join(parts, ",")
}

// args are they as the arguments of device_add.
func (p properties) args() map[string]any {
	args := map[string]any{}
	for _, one := range p {
		args[one.name] = one.value
	}
	return args
}

// screenArgs: a screen that only shows itself on a socket, and a pointer whose
// place is the viewer's.
func screenArgs(dir string) []string {
	return []string{
		"-vnc", "unix:" + escape(displaySocket(dir)),
		"-device", "VGA," + addr(slotScreen).String(),
		"-device", "virtio-tablet-pci," + addr(slotPointer).String(),
	}
}

// agentArgs: the channel that qemu-guest-agent looks for.
func agentArgs(dir string) []string {
	return []string{
		"-chardev", "socket,id=" + agentID + ",server=on,wait=off,path=" + escape(agentSocket(dir)),
		"-device", "virtio-serial-pci,id=channels," + addr(slotAgent).String(),
		"-device", "virtserialport,bus=channels.0,chardev=" + agentID + ",name=org.qemu.guest_agent.0",
	}
}

// agentID names the agent's channel to QEMU's monitor.
const agentID = "agent"

// seedArgs attaches the first boot's data behind the disks: guests whose kernel
// has no drivers for CD drives find it, too.
func seedArgs(path string) []string {
	return []string{
		"-blockdev", "driver=file,node-name=seed,read-only=on,filename=" + escape(path),
		"-device", "virtio-blk-pci,drive=seed,serial=seed," + addr(slotSeed).String(),
	}
}

func accelerate(a hypervisor.Acceleration) []string {
	if a == hypervisor.KVM {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	// Five-level page tables only make emulation slower.
	return []string{"-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", hypervisor.TranslationBytes>>20), "-cpu", "max,la57=off"}
}

// networkArgs gives each interface a network of its own: QEMU's, which leads
// outside, unless there is to be no way out.
func networkArgs(networks []hypervisor.Network, ports []hypervisor.Port, noWayOut bool) []string {
	if len(networks) == 0 {
		networks = []hypervisor.Network{{}}
	}
	var args []string
	for _, n := range networks {
		var user strings.Builder
		fmt.Fprintf(&user, "user,id=%s", networkID(n.Slot))
		if noWayOut {
			user.WriteString(",restrict=on")
		}
		if n.Slot == 0 {
			for _, p := range ports {
				fmt.Fprintf(&user, ",hostfwd=tcp:%s:%d-:%d", p.HostAddress, p.HostPort, p.GuestPort)
			}
		} else {
			user.WriteString(",net=" + subnet(n.Slot))
		}
		args = append(args, "-netdev", user.String(), "-device", networkDevice(n).text())
	}
	return args
}

// networkID names what is behind a network card.
func networkID(slot int) string { return fmt.Sprintf("net%d", slot) }

// subnet is that of a card that is not the first one, which has QEMU's own,
// 10.0.2.0/24.
func subnet(slot int) string { return fmt.Sprintf("10.0.%d.0/24", 2+slot) }

// networkDevice does not boot from the network: it has no ROM for that.
func networkDevice(n hypervisor.Network) properties {
	p := properties{
		{"driver", "virtio-net-pci"}, {"id", cardID(n.Slot)}, {"netdev", networkID(n.Slot)}, addr(slotNetwork + n.Slot), {"romfile", ""},
	}
	if n.MAC != "" {
		p = append(p, property{"mac", n.MAC})
	}
	return p
}

func cardID(slot int) string { return fmt.Sprintf("card%d", slot) }

// escape makes a value of an option: a comma would end it.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
