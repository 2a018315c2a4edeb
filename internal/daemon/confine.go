package daemon

import (
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/argon-cluster/argon/internal/cgroup"
	"github.com/argon-cluster/argon/internal/guard"
)

// confinement says whom guests run as: each machine's as a user of its own, so
// that one that breaks out of QEMU finds neither the others' disks and monitors
// nor anything of the server's.
type confinement struct {
	on bool
	// why says in one line why they don't.
	why string
	// groups are those that may use /dev/kvm.
	groups []uint32
}

const (
	// firstUser and userBits are the range of the users: above what systemd and
	// container runtimes give away (systemd's UIDS-GIDS.md). They need no entry
	// in /etc/passwd.
	firstUser = 0x7000_0000
	userBits  = 24
)

// findConfinement finds out whether guests can be confined, and opens the way to
// their directories to their users: to go through, not to list.
func findConfinement(o Options, g *guard.Client) (confinement, error) {
	switch {
	case os.Geteuid() != 0:
		return confinement{why: "guests run as the user that runs argon: it is not root"}, nil
	case !g.Knows("user"):
		return confinement{why: "guests run as root: " + guard.ErrOlder.Error()}, nil
	}
	p := paths{dir: o.Dir, runDir: o.RunDir}
	open := []string{p.runDir, filepath.Dir(p.machine("x")), filepath.Dir(p.nbd("x"))}
	if rel, err := filepath.Rel(p.dir, p.runDir); err == nil && !strings.HasPrefix(rel, "..") {
		open = append(open, p.dir) // all else in it is private by itself
	}
	for _, dir := range open {
		if err := os.Chmod(dir, 0o711); err != nil {
			return confinement{}, fmt.Errorf("opening the way to guests' directories: %w", err)
		}
	}
	if dir := closedTo(p.runDir); dir != "" {
		return confinement{why: fmt.Sprintf("guests run as root: %s is closed to other users; choose another directory with --run-dir", dir)}, nil
	}
	return confinement{on: true, groups: groupsOf(kvmDevice)}, nil
}

// kvmDevice is what guests' users need the group of.
const kvmDevice = "/dev/kvm"

// closedTo is the first directory on the way that others can't go through; empty
// if there is none.
func closedTo(path string) string {
	for dir := path; ; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil || st.Mode().Perm()&0o001 == 0 {
			return dir
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}

// groupsOf is the group that may use a device, if it takes one.
func groupsOf(device string) []uint32 {
	st, err := os.Stat(device)
	if err != nil || st.Mode().Perm()&0o060 != 0o060 || st.Mode().Perm()&0o006 == 0o006 {
		return nil
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || sys.Gid == 0 {
		return nil
	}
	return []uint32{sys.Gid}
}

// describe says in one line what guests run as.
func (c confinement) describe() string {
	if !c.on {
		return c.why
	}
	return "each machine's guest runs as a user of its own, in a seccomp sandbox"
}

// user is a machine's own; 0: the daemon's. It depends on the machine alone, so
// that it is the same after a restart; two machines of one server have the same
// once in millions.
func (c confinement) user(machineID string) uint32 {
	if !c.on || machineID == "" {
		return 0
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(machineID)) // never fails
	return firstUser + h.Sum32()&(1<<userBits-1)
}

// credential is what the probe runs with: the rights of a machine's user.
func (c confinement) credential() *syscall.Credential {
	if !c.on {
		return nil
	}
	user := c.user("probe")
	return &syscall.Credential{Uid: user, Gid: user, Groups: c.groups}
}

// give makes a guest's directory, with all that was put into it, its user's own.
// A link is given, not what it leads to: the guest may have made it.
func (c confinement) give(dir string, user uint32) error {
	if user == 0 {
		return nil
	}
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := os.Lchown(path, int(user), int(user)); err != nil {
			return fmt.Errorf("giving a guest its directory: %w", err)
		}
		return nil
	})
}

// machineOf is the machine that a guest runs (agent.GuestID).
func machineOf(guestID string) string {
	if i := strings.LastIndexByte(guestID, '-'); i > 0 {
		return guestID[:i]
	}
	return guestID
}

// closeLoopback closes what listens on this host's loopback addresses to guests. If
// that can't be, it says why in one line: their networks must lead nowhere then.
func closeLoopback(groups cgroup.Dirs) string {
	if os.Geteuid() != 0 {
		return "argon is not root"
	}
	if err := groups.CloseLoopback(); err != nil {
		return err.Error()
	}
	return ""
}
