// Package qemu runs guests with QEMU.
//
// What lives here: QEMU's command line, its monitor (qmp/), the guests' serial
// consoles, screens and agents (qga/), and finding out what accelerates them. What must not: which guests
// should run (agent/), and being their parent process: that is the guard's, so
// that guests go on when the daemon ends.
//
// A guest's directory has
//
//	qmp.sock      QEMU's monitor; one client at a time
//	console.sock  the serial port; one client at a time, which serves many
//	console.log   what the guest printed last
//	agent.sock    the guest agent's channel; one client at a time
//	vnc.sock      the screen, as VNC
//	vars.fd       what UEFI firmware keeps; new at each start
//	qemu.log      what QEMU itself says
package qemu

import (
	"context"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/cgroup"
)

// Launcher starts processes that outlive this one. Safe for concurrent use.
type Launcher interface {
	// Start runs a program, whose output is appended to logPath, under an id
	// of its own.
	Start(ctx context.Context, p Process) (pid int, err error)
	// Kill ends it and returns when it is gone; one that is not there is gone.
	Kill(ctx context.Context, id string) error
	List(ctx context.Context) ([]Running, error)
	// Limit changes a process's limits of processors; those of memory stay.
	// hypervisor.ErrCannotLimit when this host can't.
	Limit(ctx context.Context, id string, l cgroup.Limits) error
	// Done is closed when it is gone, or is not known.
	Done(id string) <-chan struct{}
}

// Process is what to run.
type Process struct {
	ID, Path string
	Args     []string
	Dir      string
	LogPath  string
	Limits   cgroup.Limits
}

// Running is what runs.
type Running struct {
	ID  string
	PID int
}

func monitorSocket(dir string) string { return filepath.Join(dir, "qmp.sock") }
func consoleSocket(dir string) string { return filepath.Join(dir, "console.sock") }

// ConsoleLog reads what the guest with this directory printed last, which whoever
// runs as its user may have put there.
func ConsoleLog(dir string) ([]byte, error) { return readOwn(consoleLog(dir)) }

func consoleLog(dir string) string    { return filepath.Join(dir, "console.log") }
func agentSocket(dir string) string   { return filepath.Join(dir, "agent.sock") }
func displaySocket(dir string) string { return filepath.Join(dir, "vnc.sock") }
func screenFile(dir string) string    { return filepath.Join(dir, "screen") }
func varsFile(dir string) string      { return filepath.Join(dir, "vars.fd") }
func ownLog(dir string) string        { return filepath.Join(dir, "qemu.log") }

// openOwn opens a file in a guest's directory, which the guest may have tampered
// with: not what a link leads to, and without waiting for a pipe's other end.
func openOwn(path string, flags int) (*os.File, error) {
	return os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

// mostRead bounds what is read of a file in a guest's directory, in bytes.
const mostRead = 16 << 20

func readOwn(path string) ([]byte, error) {
	f, err := openOwn(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, mostRead))
}
