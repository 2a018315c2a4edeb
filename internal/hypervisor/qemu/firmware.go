package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// ovmf is where distributions keep UEFI firmware for guests of this kind: its
// code, and what it begins to keep its settings in.
var ovmf = [...]struct{ code, vars string }{
	{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},                 // Debian, Ubuntu
	{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},             // Fedora
	{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},         // Arch
	{"/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"}, // openSUSE
	{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
}

// errNoFirmware says what to do.
var errNoFirmware = errors.New("this server has no UEFI firmware for guests: install it (Debian: ovmf), or make the machine with --firmware bios")

// firmwareArgs gives the guest its firmware, and settings as new: those of
// before may have been lost with another server, and a guest must start all the
// same. See docs/decisions.
func firmwareArgs(dir string) ([]string, error) {
	for _, f := range ovmf {
		if _, err := os.Stat(f.code); err != nil {
			continue
		}
		if err := copyFile(f.vars, varsFile(dir)); err != nil {
			return nil, fmt.Errorf("making the settings of the guest's firmware: %w", err)
		}
		return []string{
			"-blockdev", "driver=file,node-name=firmware,read-only=on,filename=" + escape(f.code),
			"-blockdev", "driver=file,node-name=vars,filename=" + escape(varsFile(dir)),
		}, nil
	}
	return nil, errNoFirmware
}

// pflash are the options of a machine type that starts with such firmware.
func pflash(f hypervisor.Firmware) string {
	if f == hypervisor.UEFI {
		return ",pflash0=firmware,pflash1=vars"
	}
	return ""
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	// The directory is the guest's, who may have put a link there before.
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
