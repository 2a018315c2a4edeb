#!/bin/bash
# Starts systemd of a root in namespaces of its own. It becomes the container's
# first process: who ends it ends the whole server, as a power cut does.
#
#   boot.sh ROOT
#
# /proc/sys and /sys are read-only, so that it leaves this host's kernel alone.
set -euo pipefail
root=$1
name=argon-install-$$
for hierarchy in systemd unified; do
	mkdir -p /sys/fs/cgroup/$hierarchy/$name 2>/dev/null && echo $$ >/sys/fs/cgroup/$hierarchy/$name/cgroup.procs || true
done
exec unshare --mount --pid --fork --kill-child --uts --ipc --net --cgroup bash -euc '
	root=$1
	mount --make-rprivate /
	mount --bind "$root" "$root"
	cd "$root"
	mount -t proc proc proc
	mount --bind proc/sys proc/sys
	mount -o remount,bind,ro proc/sys
	mount -t sysfs -o ro sysfs sys
	if [[ $(stat -f -c %T /sys/fs/cgroup) == cgroup2fs ]]; then
		mount -t cgroup2 cgroup2 sys/fs/cgroup
	else
		mount -t tmpfs tmpfs sys/fs/cgroup
		mkdir sys/fs/cgroup/{unified,systemd}
		mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
		mount -t cgroup -o none,name=systemd systemd sys/fs/cgroup/systemd
	fi
	mount -t tmpfs -o mode=755 tmpfs dev
	for device in null zero full random urandom tty net/tun kvm; do
		[[ -e /dev/$device ]] || continue
		mkdir -p "$(dirname "dev/$device")"
		touch "dev/$device"
		mount --bind "/dev/$device" "dev/$device"
	done
	mkdir dev/{pts,shm}
	mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
	ln -s pts/ptmx dev/ptmx
	mount -t tmpfs tmpfs dev/shm
	mount -t tmpfs -o mode=755 tmpfs run
	mount -t tmpfs tmpfs tmp
	pivot_root . mnt
	umount -l mnt
	exec env -i container=argon PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /sbin/init
' - "$root"
