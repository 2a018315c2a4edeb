#!/bin/bash
# Builds the disk image of a tiny Linux that counts: Debian's cloud kernel and
# busybox. Each number is on its disk, fsynced, before it is told, on the serial
# console and over HTTP on port 80.
#
#   tiny.sh OUTPUT
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

output=$1
here=$(cd "$(dirname "$0")" && pwd)
# One that is newer than what it is made by stays.
if [[ -e $output && -z $(find "$here" -newer "$output") ]]; then
	exit 0
fi
"$here/../../scripts/need.sh" cpio=cpio mkfs.ext4=e2fsprogs sfdisk=fdisk grub-mkimage=grub-common \
	/usr/lib/grub/i386-pc/boot.img=grub-pc-bin xz=xz-utils

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$here/packages.sh" "$work/debian" linux-image-cloud-amd64 busybox-static

# The initial file system is all that there is.
init=$work/init
mkdir -p "$init"/{bin,dev,modules,proc,run,sys,www}
busybox=$work/debian/bin/busybox
[[ -e $busybox ]] || busybox=$work/debian/usr/bin/busybox
cp "$busybox" "$init/bin/busybox"
cp "$here/tiny-init" "$init/init"
ln -s ../bin/busybox "$init/bin/sh"

# Modules, each after those that it needs. What the kernel has built in is no
# module.
unpack() { # unpack FILE: a module as the kernel wants it
	case $1 in
	*.xz) xz -dc "$1" ;;
	*) cat "$1" ;;
	esac
}
n=10
add() {
	local module=$1 file needs
	file=$(find "$work/debian" -name "$module.ko*" | head -n 1)
	if [[ -z $file ]] || compgen -G "$init/modules/*-$module.ko" >/dev/null; then
		return
	fi
	needs=$(unpack "$file" | grep -aoz '^depends=[^[:cntrl:]]*' | tr -d '\0' | sed 's/^depends=//; s/,/ /g')
	for need in $needs; do
		add "$need"
	done
	unpack "$file" >"$init/modules/$n-$module.ko"
	n=$((n + 1))
}
for module in virtio_pci virtio_blk virtio_net button evdev; do
	add $module
done

boot=$work/boot
mkdir "$boot"
(cd "$init" && find . | cpio --quiet -o -H newc -R 0:0 | gzip -1) >"$boot/initrd.img"
cp "$work"/debian/boot/vmlinuz-* "$boot/vmlinuz"

"$here/disk.sh" "$output" "$boot" 24 vmlinuz initrd.img \
	"console=ttyS0 quiet panic=1 mitigations=off random.trust_cpu=on no_timer_check" 1
