#!/bin/bash
# Makes a disk image that a PC's BIOS boots: GRUB in the gap behind the master
# boot record, one ext4 partition with a kernel, and, if wanted, an empty second
# partition. Needs no privileges, no loop device and no mount.
#
#   disk.sh OUTPUT ROOT MIB KERNEL INITRD CMDLINE [EXTRA_MIB]
#
# ROOT is a folder that becomes the first partition, of MIB MiB; KERNEL and
# INITRD are files in it; CMDLINE is the kernel's. EXTRA_MIB is the size of the
# second partition.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

output=$1 root=$2 mib=$3 kernel=$4 initrd=$5 cmdline=$6 extra=${7:-0}
grub=/usr/lib/grub/i386-pc
gap=1 # MiB before the first partition

work=$(mktemp -d)
trap 'rm -rf "$work" "$output.new"' EXIT

# GRUB's own part: what it does is fixed, so that it needs no file system but
# this one and shows no menu.
cat >"$work/grub.cfg" <<EOF
linux (hd0,msdos1)/$kernel $cmdline
initrd (hd0,msdos1)/$initrd
boot
EOF
grub-mkimage -O i386-pc -o "$work/core.img" -p '(hd0,msdos1)/' -c "$work/grub.cfg" \
	biosdisk part_msdos ext2 linux boot
if (($(stat -c %s "$work/core.img") > gap * 1048576 - 512)); then
	echo "disk.sh: GRUB does not fit before the first partition" >&2
	exit 1
fi

# Whole or not at all.
disk=$output.new
truncate -s $(((gap + mib + extra) * 1048576)) "$disk"
{
	echo "label: dos"
	echo "start=${gap}MiB, size=${mib}MiB, type=83, bootable"
	if ((extra)); then
		echo "start=$((gap + mib))MiB, size=${extra}MiB, type=da"
	fi
} | sfdisk --quiet "$disk"
# The record's code loads the core from the sector behind it, which is where
# its own tables say it is.
dd if=$grub/boot.img of="$disk" bs=440 count=1 conv=notrunc status=none
dd if="$work/core.img" of="$disk" bs=512 seek=1 conv=notrunc status=none
mkfs.ext4 -q -d "$root" -E offset=$((gap * 1048576)) -F "$disk" "${mib}M"
mv "$disk" "$output"
