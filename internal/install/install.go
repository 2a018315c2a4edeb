// Package install makes a host one that runs a server: the program at its place,
// systemd's unit, QEMU, kernel settings. A Debian package does the same (scripts/deb.sh).
//
// What lives here: files that are written, packages that are added, units that are
// started. What must not: anything about clusters (internal/cli makes or joins one
// once the server runs).
package install

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Unit has systemd run the server. It names the program as [Program].
//
//go:embed argon.service
var Unit string

// Sysctl are the kernel settings.
//
//go:embed argon.sysctl.conf
var Sysctl string

// Where things go.
const (
	Program        = "/usr/local/bin/argon"
	unitFile       = "/etc/systemd/system/argon.service"
	sysctlFile     = "/etc/sysctl.d/60-argon.conf"
	completionFile = "/usr/local/share/bash-completion/completions/argon"
)

// Files are all that Run writes, and what systemd does.
var Files = []string{Program, unitFile, sysctlFile, completionFile, "/etc/systemd/system/multi-user.target.wants/argon.service"}

// packaged is where a Debian package has the unit; it comes with all the rest.
var packaged = []string{"/usr/lib/systemd/system/argon.service", "/lib/systemd/system/argon.service"}

// need is a program, and the Debian package that has it.
type need struct{ program, debian string }

var (
	needed    = []need{{"ip", "iproute2"}}
	forGuests = []need{{"qemu-system-x86_64", "qemu-system-x86"}, {"qemu-img", "qemu-utils"}}
)

// Options say what to install.
type Options struct {
	// Witness: the server runs no machines, and needs no QEMU.
	Witness bool
	// Completion is a script for bash.
	Completion string
	// Say is told each thing that is done, in a line.
	Say func(line string)
	// Output gets what package managers print.
	Output io.Writer
}

// Run installs the program that runs, as root, and starts it as a service. What is
// there already stays, so it can be run again: after a failure, or with a newer
// program, which takes over while machines run on. started tells whether the
// service runs: where systemd does not, as in a chroot, it starts with the host.
func Run(ctx context.Context, o Options) (started bool, err error) {
	if os.Geteuid() != 0 {
		return false, errors.New("install: only root can: use sudo")
	}
	if _, err := exec.LookPath("systemctl"); err != nil {
		return false, errors.New("install: this host has no systemd: have what starts its services run `argon server`")
	}
	if err := o.addPrograms(ctx); err != nil {
		return false, err
	}
	changed, err := o.putFiles(ctx)
	if err != nil {
		return false, err
	}
	return o.start(ctx, changed)
}

// addPrograms installs what the server runs, if it is missing.
func (o Options) addPrograms(ctx context.Context) error {
	needs := needed
	if !o.Witness {
		needs = append(needs[:len(needs):len(needs)], forGuests...)
	}
	var missing []string
	for _, n := range needs {
		if _, err := exec.LookPath(n.program); err != nil {
			missing = append(missing, n.debian)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	list := strings.Join(missing, " ")
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("install: these Debian packages are missing, and there is no apt-get: install what holds the same: %s", list)
	}
	o.Say("installing " + list)
	for _, args := range [][]string{{"update"}, append([]string{"install", "--yes", "--no-install-recommends"}, missing...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if err := o.run(cmd); err != nil {
			return fmt.Errorf("install: adding %s: %w", list, err)
		}
	}
	return nil
}

// putFiles writes program and unit, unless a package has brought them.
func (o Options) putFiles(ctx context.Context) (changed bool, err error) {
	for _, unit := range packaged {
		if _, err := os.Stat(unit); err == nil {
			o.Say("argon is installed as a package: its program and unit stay")
			return false, nil
		}
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return false, fmt.Errorf("install: reading this program: %w", err)
	}
	for _, f := range []struct {
		path    string
		content []byte
		mode    os.FileMode
	}{
		{Program, program, 0o755},
		{unitFile, []byte(Unit), 0o644},
		{sysctlFile, []byte(Sysctl), 0o644},
		{completionFile, []byte(o.Completion), 0o644},
	} {
		wrote, err := put(f.path, f.content, f.mode)
		if err != nil {
			return false, fmt.Errorf("install: %w", err)
		}
		if wrote {
			o.Say("wrote " + f.path)
		}
		changed = changed || wrote
	}
	return changed, nil
}

// put writes a file as a whole, if it holds something else.
func put(path string, content []byte, mode os.FileMode) (wrote bool, err error) {
	if has, err := os.ReadFile(path); err == nil && bytes.Equal(has, content) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return false, err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return false, err
	}
	return true, os.Rename(f.Name(), path)
}

// start has systemd start the server now and with the host. One that runs gives
// way to the new program, while its machines run on.
func (o Options) start(ctx context.Context, changed bool) (started bool, err error) {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		if err := o.systemctl(ctx, "enable", "argon"); err != nil {
			return false, err
		}
		o.Say("the server starts with the host: systemd does not run now")
		return false, nil
	}
	if changed {
		if err := o.systemctl(ctx, "daemon-reload"); err != nil {
			return false, err
		}
		if sysctl, err := exec.LookPath("sysctl"); err == nil {
			// In a container they may not be set: the host's hold there.
			_ = exec.CommandContext(ctx, sysctl, "--quiet", "--load", sysctlFile).Run()
		}
	}
	if err := o.systemctl(ctx, "enable", "argon"); err != nil {
		return false, err
	}
	verb := "start"
	if changed {
		verb = "reload-or-restart"
	}
	if err := o.systemctl(ctx, verb, "argon"); err != nil {
		return false, fmt.Errorf("%w; `journalctl -u argon` tells more", err)
	}
	return true, nil
}

func (o Options) systemctl(ctx context.Context, args ...string) error {
	if err := o.run(exec.CommandContext(ctx, "systemctl", args...)); err != nil {
		return fmt.Errorf("install: systemctl %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// run runs a program; what it printed is shown if it fails.
func (o Options) run(cmd *exec.Cmd) error {
	var printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &printed, &printed
	err := cmd.Run()
	if err != nil {
		_, _ = printed.WriteTo(o.Output)
	}
	return err
}
