package devcluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// With Options.Disk each server's directory is a file system of its own, in a
// file beside it, so that its disk can be full and its power can be cut.

func (s *Server) diskPath() string { return s.Dir + ".disk" }

// bootPath is the file that the server's processes see in place of the
// kernel's boot id: after a power cut it has another.
func (s *Server) bootPath() string { return s.Dir + ".boot" }

// fillerPath takes the room that Fill takes away.
func (s *Server) fillerPath() string { return filepath.Join(s.Dir, "filler") }

// makeDisk makes the server's file system and mounts it.
func (s *Server) makeDisk(ctx context.Context, size int64) error {
	f, err := os.OpenFile(s.diskPath(), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	if err := command(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", s.diskPath()); err != nil {
		return err
	}
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return err
	}
	if err := s.mount(ctx); err != nil {
		return err
	}
	return s.reboot()
}

// reboot makes a new boot id.
func (s *Server) reboot() error {
	// Written over, as the old one is mounted where processes still live.
	return os.WriteFile(s.bootPath(), []byte(uuid.NewString()+"\n"), 0o600)
}

func (s *Server) mount(ctx context.Context) error {
	return command(ctx, "mount", "-o", "loop", s.diskPath(), s.Dir)
}

// unmount returns once nothing uses the disk's file any more: until then a
// mount would find the old file system, not what is in the file.
func (s *Server) unmount(ctx context.Context) error {
	if !s.mounted() {
		return nil
	}
	if err := command(ctx, "umount", s.Dir); err != nil {
		return err
	}
	for {
		out, err := exec.CommandContext(ctx, "losetup", "-j", s.diskPath()).Output()
		if err != nil {
			return fmt.Errorf("losetup -j %s: %w", s.diskPath(), err)
		}
		if len(out) == 0 {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("waiting until the disk of %s is not used: %w", s.Name, err)
		}
	}
}

// mounted tells whether the server's directory is a file system of its own.
func (s *Server) mounted() bool {
	var dir, parent unix.Stat_t
	return unix.Stat(s.Dir, &dir) == nil && unix.Stat(filepath.Dir(s.Dir), &parent) == nil && dir.Dev != parent.Dev
}

// ownDisk is the shell's part of starting a server with a disk of its own, in
// a mount namespace of its own. What others mounted must not be held there:
// they could never unmount it.
const ownDisk = `
boot=$1 dir=$2
shift 2
while read -r device at type rest; do
	case $device in
	/dev/loop*) [ "$at" = "$dir" ] || umount -l "$at" ;;
	esac
done < /proc/self/mounts
mount --bind "$boot" /proc/sys/kernel/random/boot_id && exec "$@"`

// onOwnDisk is the command that runs another one so.
func (s *Server) onOwnDisk(args []string) []string {
	return append([]string{"sh", "-c", ownDisk, "sh", s.bootPath(), s.Dir}, args...)
}

// PowerCut ends all processes of servers at once, and all that they have
// not synced is lost: what a power cut leaves. They can be started again.
func (c *Cluster) PowerCut(ctx context.Context, servers ...*Server) error {
	if c.state.Disk == 0 {
		return errors.New("dev cluster: power can't be cut: the servers have no disks of their own")
	}
	// One step after the other for all of them: none sees another one die.
	for _, step := range []struct {
		what string
		do   func(*Server) error
	}{
		{"stopping it", func(s *Server) error {
			_, err := freeze(ctx, s.Dir, Parts)
			return err
		}},
		{"dropping what is not synced", func(s *Server) error { return dropUnsynced(s.Dir) }},
		{"ending it", func(s *Server) error { return s.Kill(ctx) }},
		{"unmounting", func(s *Server) error { return s.unmount(ctx) }},
		{"mounting", func(s *Server) error { return s.mount(ctx) }},
		{"making a boot id", (*Server).reboot},
	} {
		for _, s := range servers {
			if err := step.do(s); err != nil {
				return fmt.Errorf("dev server %s: power cut: %s: %w", s.Name, step.what, err)
			}
		}
	}
	return nil
}

// Ext4's ioctl that ends a file system as a power cut does.
const (
	ext4Shutdown = 0x8004587d // _IOR('X', 125, __u32)
	noLogFlush   = 2
)

// dropUnsynced makes the file system forget what is not on its disk, even of
// its journal. Nothing can be read or written there until it is mounted again.
func dropUnsynced(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	how := uint32(noLogFlush)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ext4Shutdown, uintptr(unsafe.Pointer(&how)))
	if errno != 0 {
		return fmt.Errorf("shutting down the file system: %w", errno)
	}
	return nil
}

// Fill takes room on the server's disk away until so many bytes are free.
func (s *Server) Fill(leave int64) error {
	if s.cluster.state.Disk == 0 {
		return fmt.Errorf("dev server %s: it has no disk of its own to be filled", s.Name)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.Dir, &st); err != nil {
		return fmt.Errorf("dev server %s: its disk: %w", s.Name, err)
	}
	take := int64(st.Bavail)*st.Bsize - leave
	if take <= 0 {
		return nil
	}
	f, err := os.OpenFile(s.fillerPath(), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("dev server %s: filling its disk: %w", s.Name, err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, take); err != nil {
		return fmt.Errorf("dev server %s: filling its disk: %w", s.Name, err)
	}
	return nil
}

// Empty undoes Fill.
func (s *Server) Empty() error {
	if err := os.Remove(s.fillerPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("dev server %s: emptying its disk: %w", s.Name, err)
	}
	return nil
}

// command runs a program.
func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
