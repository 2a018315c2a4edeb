#!/bin/bash
# Builds a disk image of the tiny Linux that counts as UEFI boots it: an EFI system
# partition with GRUB, the kernel and its initial file system, and nothing that a
# PC's BIOS finds. Needs no privileges.
#
#   uefi.sh OUTPUT TINY
#
# TINY is the image that tiny.sh has built.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

output=$1 tiny=$2
here=$(cd "$(dirname "$0")" && pwd)
# One that is newer than what it is made of stays.
if [[ -e $output && -z $(find "$here" "$tiny" -newer "$output") ]]; then
	exit 0
fi
"$here/../../scripts/need.sh" debugfs=e2fsprogs sfdisk=fdisk mkfs.vfat=dosfstools mcopy=mtools \
	grub-mkimage=grub-common /usr/lib/grub/x86_64-efi/fat.mod=grub-efi-amd64-bin

gap=1 esp=40 extra=1 # MiB
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

dd if="$tiny" of="$work/part1" bs=1M skip=1 status=none
for file in vmlinuz initrd.img; do
	debugfs -R "dump /$file $work/$file" "$work/part1" 2>/dev/null
done

cat >"$work/grub.cfg" <<'CFG'
search --file /vmlinuz --set root
linux /vmlinuz console=ttyS0 quiet panic=1 mitigations=off random.trust_cpu=on no_timer_check
initrd /initrd.img
boot
CFG
grub-mkimage -O x86_64-efi -o "$work/bootx64.efi" -p / -c "$work/grub.cfg" \
	part_msdos fat search search_fs_file linux boot

truncate -s ${esp}M "$work/esp"
mkfs.vfat -F 32 "$work/esp" >/dev/null
mmd -i "$work/esp" ::/EFI ::/EFI/BOOT
mcopy -i "$work/esp" "$work/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI
mcopy -i "$work/esp" "$work/vmlinuz" "$work/initrd.img" ::/

truncate -s $((gap + esp + extra))M "$work/disk"
printf 'label: dos\nstart=%dMiB, size=%dMiB, type=ef\nstart=%dMiB, size=%dMiB, type=da\n' \
	$gap $esp $((gap + esp)) $extra | sfdisk --quiet "$work/disk"
dd if="$work/esp" of="$work/disk" bs=1M seek=$gap conv=notrunc,sparse status=none

# Whole or not at all.
cp --sparse=always "$work/disk" "$output.new"
mv "$output.new" "$output"
