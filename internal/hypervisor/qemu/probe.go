package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

const (
	kvmDevice = "/dev/kvm"
	// bootTime is how long a boot sector may take; it needs a tenth of a
	// second even when it is emulated.
	bootTime = 5 * time.Second
	// kernelTime is the same for a kernel's first message.
	kernelTime = 15 * time.Second
)

// Probe implements hypervisor.Monitor. It takes /dev/kvm for good only when it
// has run a guest: there are hosts where it makes machines and processors that
// then never get anywhere.
func (m *Monitor) Probe(ctx context.Context) (hypervisor.Probe, error) {
	path, err := m.binary()
	if err != nil {
		return hypervisor.Probe{}, err
	}
	p := hypervisor.Probe{Acceleration: hypervisor.KVM}
	if p.Version, err = version(ctx, path); err != nil {
		return p, err
	}
	if err := m.tryKVM(ctx, path); err != nil {
		if ctx.Err() != nil {
			return p, ctx.Err()
		}
		p.Acceleration, p.Reason = hypervisor.TCG, err.Error()
	}
	return p, nil
}

func version(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("asking %s for its version: %w", path, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(strings.TrimSpace(line), "QEMU emulator version "), nil
}

// tryKVM runs guests with KVM, from the simplest to an ordinary kernel if the
// host has one that may be read.
func (m *Monitor) tryKVM(ctx context.Context, path string) error {
	f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("%s can't be used: %w", kvmDevice, errors.Unwrap(err))
	}
	_ = f.Close()
	if err := bootSector(ctx, path, hypervisor.KVM, m.opts.Credential); err != nil {
		return fmt.Errorf("%s is there, but %w", kvmDevice, err)
	}
	if kernel := hostKernel(m.opts.Credential != nil); kernel != "" {
		if err := bootKernel(ctx, path, kernel, m.opts.Credential); err != nil {
			return fmt.Errorf("%s is there, but %w", kvmDevice, err)
		}
	}
	return nil
}

// probeArgs are what all probes share.
func probeArgs(a hypervisor.Acceleration) []string {
	return append([]string{"-nodefaults", "-no-user-config", "-machine", "pc", "-m", "256", "-display", "none", "-no-reboot"}, accelerate(a)...)
}

// exitCode is QEMU's when the boot sector writes exitValue to isa-debug-exit.
const exitCode = exitValue<<1 | 1

// bootSector runs a guest that needs a BIOS, interrupts of the timer, the switch
// to long mode and page tables: what an ordinary kernel needs first.
func bootSector(ctx context.Context, path string, a hypervisor.Acceleration, as *syscall.Credential) error {
	disk, err := os.CreateTemp("", "argon-probe-*.img")
	if err != nil {
		return fmt.Errorf("no guest could be tried: %w", err)
	}
	defer os.Remove(disk.Name())
	_, err = disk.Write(bootBlock())
	if as != nil {
		err = errors.Join(err, disk.Chown(int(as.Uid), int(as.Gid)))
	}
	if err = errors.Join(err, disk.Close()); err != nil {
		return fmt.Errorf("no guest could be tried: %w", err)
	}
	short, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	out, err := run(short, as, path, append(probeArgs(a),
		"-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-drive", "format=raw,if=ide,file="+escape(disk.Name())), "")
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == exitCode:
		return nil
	case short.Err() != nil:
		return fmt.Errorf("a guest got nowhere within %v", bootTime)
	}
	return fmt.Errorf("no guest runs: %w", lastLine(out, err))
}

// bootKernel runs a kernel without anything else, until its first message.
func bootKernel(ctx context.Context, path, kernel string, as *syscall.Credential) error {
	short, cancel := context.WithTimeout(ctx, kernelTime)
	defer cancel()
	const hello = "Linux version"
	out, err := run(short, as, path, append(probeArgs(hypervisor.KVM), "-serial", "stdio",
		"-kernel", kernel, "-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"), hello)
	switch {
	case bytes.Contains(out, []byte(hello)):
		return nil
	case short.Err() != nil:
		return fmt.Errorf("an ordinary kernel says nothing within %v", kernelTime)
	}
	return fmt.Errorf("an ordinary kernel does not run: %w", lastLine(out, err))
}

// hostKernel is the newest kernel that lies here and may be read, by all users if
// anyone is to; empty if there is none.
func hostKernel(anyone bool) string {
	found, _ := filepath.Glob("/boot/vmlinuz*")
	slices.Sort(found)
	for _, name := range slices.Backward(found) {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		st, err := f.Stat()
		_ = f.Close()
		if err == nil && (!anyone || st.Mode().Perm()&0o004 != 0) {
			return name
		}
	}
	return ""
}

// run runs QEMU until it ends, ctx does, or it has printed what it should.
func run(ctx context.Context, as *syscall.Credential, path string, args []string, until string) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: as}
	out := &watched{until: []byte(until), seen: cancel}
	cmd.Stdout, cmd.Stderr = out, out
	err := cmd.Run()
	return out.text, err
}

// watched keeps what is printed, and tells when it has what was waited for.
// Only one goroutine writes, as it is standard output and error at once.
type watched struct {
	text, until []byte
	seen        func()
}

// mostPrinted bounds what is kept, in bytes.
const mostPrinted = 64 << 10

func (w *watched) Write(p []byte) (int, error) {
	if len(w.text) < mostPrinted {
		w.text = append(w.text, p...)
	}
	if len(w.until) > 0 && bytes.Contains(w.text, w.until) {
		w.seen()
	}
	return len(p), nil
}

// lastLine is what QEMU said last, or how it ended.
func lastLine(out []byte, err error) error {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		return errors.New(last)
	}
	if err == nil {
		return errors.New("QEMU ended at once")
	}
	return err
}
