package qemu

import (
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
// looks finds out that it was not a crash.
func commandLine(s hypervisor.Spec) ([]string, error) {
	args := []string{
		"-name", "guest=" + escape(s.Name),
		"-nodefaults", "-no-user-config",
		"-machine", "pc,hpet=off,usb=off,vmport=off",
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
	args = append(args, accelerate(s.Acceleration)...)
	args = append(args,
		"-chardev", "socket,id=monitor,server=on,wait=off,path="+escape(monitorSocket(s.Dir)),
		"-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=console,server=on,wait=off,path="+escape(consoleSocket(s.Dir))+
			",logappend=on,logfile="+escape(consoleLog(s.Dir)),
		"-serial", "chardev:console",
		"-object", "rng-builtin,id=random", "-device", "virtio-rng-pci,rng=random",
	)
	for i, d := range s.Disks {
		disk, err := diskArgs(i, d)
		if err != nil {
			return nil, err
		}
		args = append(args, disk...)
	}
	return append(args, networkArgs(s.Ports)...), nil
}

func accelerate(a hypervisor.Acceleration) []string {
	if a == hypervisor.KVM {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	// Five-level page tables only make emulation slower.
	return []string{"-accel", "tcg,thread=multi", "-cpu", "max,la57=off"}
}

// diskArgs attaches a volume. QEMU connects again by itself when the volume's
// socket was away, and repeats what was under way; a full volume stops the
// guest instead of showing it an error.
func diskArgs(i int, d hypervisor.Disk) ([]string, error) {
	node := fmt.Sprintf("disk%d", i)
	backend, err := json.Marshal(map[string]any{
		"driver": "nbd", "node-name": node,
		"server": map[string]string{"type": "unix", "path": d.Socket},
		"export": d.Export, "discard": "unmap",
		"cache":           map[string]bool{"direct": true},
		"reconnect-delay": int64(reconnectFor / time.Second),
		"open-timeout":    int64(openFor / time.Second),
	})
	if err != nil {
		return nil, fmt.Errorf("disk %d: %w", i, err)
	}
	return []string{
		"-blockdev", string(backend),
		"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s,bootindex=%d,write-cache=on,werror=stop,rerror=stop", node, escape(d.Serial), i+1),
	}, nil
}

func networkArgs(ports []hypervisor.Port) []string {
	var user strings.Builder
	user.WriteString("user,id=net0")
	for _, p := range ports {
		fmt.Fprintf(&user, ",hostfwd=tcp:%s:%d-:%d", p.HostAddress, p.HostPort, p.GuestPort)
	}
	// No boot from the network: no ROM for it.
	return []string{"-netdev", user.String(), "-device", "virtio-net-pci,netdev=net0,romfile="}
}

// escape makes a value of an option: a comma would end it.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
