package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/hypervisor/qemu"
)

// maxSocketPath is what a unix socket's address holds, less one for the end.
const maxSocketPath = 103

// paths are where a server keeps things.
type paths struct {
	dir    string // survives a reboot
	runDir string // sockets
}

// LogDir is where the server with this data directory keeps its log.
func LogDir(dir string) string { return filepath.Join(dir, "log") }

func (p paths) adminSocket() string { return filepath.Join(p.runDir, "admin.sock") }
func (p paths) images() string      { return filepath.Join(p.dir, "images") }
func (p paths) volumes() string     { return filepath.Join(p.dir, "volumes") }
func (p paths) spool() string       { return filepath.Join(p.dir, "spool") }
func (p paths) consoles() string    { return filepath.Join(p.dir, "consoles") }
func (p paths) leftovers() string   { return filepath.Join(p.dir, "leftovers") }
func (p paths) console(machineID string) string {
	return filepath.Join(p.consoles(), filepath.Base(machineID))
}

func (p paths) machine(guestID string) string { return filepath.Join(p.runDir, "machines", guestID) }

func (p paths) nbd(volumeID string) string {
	return filepath.Join(p.runDir, "volumes", volumeID+".nbd")
}

// make makes the directories, readable by their owner only.
func (p paths) make() error {
	longest := filepath.Join(p.machine("01ARZ3NDEKTSV4RRFFQ69G5FAV-999999"), "console.sock")
	if n := len(longest); n > maxSocketPath {
		return fmt.Errorf("the directory %s is too long for the sockets in it: choose one of at most %d characters", p.runDir, len(p.runDir)-(n-maxSocketPath))
	}
	for _, d := range []string{p.dir, p.runDir, p.volumes(), p.spool(), p.leftovers(), filepath.Dir(p.machine("x")), filepath.Dir(p.nbd("x"))} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("making the server's directory: %w", err)
		}
	}
	return nil
}

// errInUse: the directory is locked.
var errInUse = errors.New("another server uses the directory")

// lock keeps a second server away from the same directory. It ends with the
// process, or with Close.
func (p paths) lock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(p.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the server's directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w %s: stop it, or choose another with --dir", errInUse, p.dir)
		}
		return nil, fmt.Errorf("locking the directory %s: %w", p.dir, err)
	}
	return f, nil
}

// guestDirs keeps the directories of guests; see agent.Dirs.
type guestDirs struct{ paths }

func (d guestDirs) Make(guestID string) (string, error) {
	dir := d.machine(guestID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("making the guest's directory: %w", err)
	}
	return dir, nil
}

// keptConsole is how much is kept of what a guest's console printed, in bytes.
const keptConsole = 64 << 10

// Remove keeps the end of the console's log. That it can't, on a disk that is full,
// loses a log and nothing else.
func (d guestDirs) Remove(guestID, machineID string) {
	dir := d.machine(guestID)
	if log, err := qemu.ConsoleLog(dir); err == nil && len(log) > 0 && os.MkdirAll(d.consoles(), 0o700) == nil {
		_ = renameio.WriteFile(d.console(machineID), log[max(0, len(log)-keptConsole):], 0o600)
	}
	_ = os.RemoveAll(dir)
}

// Kept implements agent.Dirs.
func (d guestDirs) Kept() []string {
	entries, _ := os.ReadDir(d.consoles())
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

// Forget implements agent.Dirs.
func (d guestDirs) Forget(machineID string) { _ = os.Remove(d.console(machineID)) }
