package cgroup

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// This file: what is in the groups reaches nothing that listens on this host's
// loopback addresses. QEMU's user-mode network leads a guest there by itself
// (10.0.2.2), and what listens there takes its callers for this host's own.

// dnsPort stays open on 127.0.0.0/8 and ::1: the host's resolver may be there,
// and QEMU asks it for the guest.
const dnsPort = 53

// CloseLoopback has the kernel refuse what is in any of the groups to connect or
// to send to a loopback address, from now on, also where it runs already. It lasts
// as long as the groups do; closing again changes nothing. What connects to a port
// that a guest has opened on a loopback address is not concerned.
//
// An error means that all of it may be open: there are no groups of version 2, or
// the kernel does not let this process do so.
func (d Dirs) CloseLoopback() error {
	if d.V2 == "" {
		return errors.New("guests are in no control groups of version 2")
	}
	group, err := os.Open(d.V2)
	if err != nil {
		return fmt.Errorf("opening the control group of all guests: %w", err)
	}
	defer group.Close()
	for _, a := range []struct {
		at   ebpf.AttachType
		code asm.Instructions
	}{
		{ebpf.AttachCGroupInet4Connect, refuseIPv4()},
		{ebpf.AttachCGroupUDP4Sendmsg, refuseIPv4()},
		{ebpf.AttachCGroupInet6Connect, refuseIPv6()},
		{ebpf.AttachCGroupUDP6Sendmsg, refuseIPv6()},
	} {
		if err := attach(group, a.at, a.code); err != nil {
			return fmt.Errorf("closing loopback to guests (%v): %w", a.at, err)
		}
	}
	return nil
}

// attach takes the place of the program that an earlier daemon has attached: a
// group has one of each kind, if it was attached without flags.
func attach(group *os.File, at ebpf.AttachType, code asm.Instructions) error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "argon_loopback", Type: ebpf.CGroupSockAddr, AttachType: at, Instructions: code, License: "Apache-2.0",
	})
	if err != nil {
		return err
	}
	defer program.Close()
	return link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(group.Fd()), Program: program, Attach: at})
}

// Where struct bpf_sock_addr (linux/bpf.h) has what is looked at, in network order.
const (
	atIPv4 = 4
	atIPv6 = 8
	atPort = 24
)

// The registers: R1 is where the kernel hands over the address, R0 the answer.
const refuse, allow = 0, 1

// refuseIPv4 refuses 127.0.0.0/8 but for DNS, and 0.0.0.0/8, which is the same
// place to Linux.
func refuseIPv4() asm.Instructions {
	return append(asm.Instructions{asm.LoadMem(asm.R2, asm.R1, atIPv4, asm.Word)}, judgeIPv4()...)
}

// judgeIPv4 ends a program, with the address in R2.
func judgeIPv4() asm.Instructions {
	return append(asm.Instructions{
		asm.HostTo(asm.BE, asm.R2, asm.Word).WithSymbol("ipv4"),
		asm.RSh.Imm(asm.R2, 24),
		asm.JEq.Imm(asm.R2, 0, "refuse"),
		asm.JNE.Imm(asm.R2, 127, "allow"),
	}, judgePort()...)
}

// refuseIPv6 refuses ::1 but for DNS, the rest of ::/96, of which :: is the same
// place to Linux, and what refuseIPv4 does where it is written as IPv6.
func refuseIPv6() asm.Instructions {
	code := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, atIPv6, asm.Word),
		asm.JNE.Imm(asm.R2, 0, "allow"),
		asm.LoadMem(asm.R2, asm.R1, atIPv6+4, asm.Word),
		asm.JNE.Imm(asm.R2, 0, "allow"),
		asm.LoadMem(asm.R3, asm.R1, atIPv6+8, asm.Word),
		asm.HostTo(asm.BE, asm.R3, asm.Word),
		asm.LoadMem(asm.R2, asm.R1, atIPv6+12, asm.Word),
		asm.JEq.Imm(asm.R3, 0xffff, "ipv4"),
		asm.JNE.Imm(asm.R3, 0, "allow"),
		asm.HostTo(asm.BE, asm.R2, asm.Word),
		asm.JEq.Imm(asm.R2, 1, "port"),
		asm.Ja.Label("refuse"),
	}
	return append(code, judgeIPv4()...)
}

func judgePort() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, atPort, asm.Word).WithSymbol("port"),
		asm.HostTo(asm.BE, asm.R2, asm.Half),
		asm.JEq.Imm(asm.R2, dnsPort, "allow"),
		asm.Mov.Imm(asm.R0, refuse).WithSymbol("refuse"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, allow).WithSymbol("allow"),
		asm.Return(),
	}
}
