#!/bin/bash
# Builds the disk image of an ordinary Debian: its kernel, systemd, PostgreSQL.
# PostgreSQL is as Debian ships it, fsync on, but for who may connect: user and
# database argon, from outside, without a password.
#
#   debian.sh OUTPUT
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

output=$1
here=$(cd "$(dirname "$0")" && pwd)
# One that is newer than what it is made by stays.
if [[ -e $output && -z $(find "$here" -newer "$output") ]]; then
	exit 0
fi
"$here/../../scripts/need.sh" mmdebstrap=mmdebstrap mkfs.ext4=e2fsprogs sfdisk=fdisk fakeroot=fakeroot \
	grub-mkimage=grub-common /usr/lib/grub/i386-pc/boot.img=grub-pc-bin

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# shellcheck source=/dev/null
suite=$(. /etc/os-release && [[ $ID == debian ]] && echo "$VERSION_CODENAME" || echo stable)

# Before any package is there: an initial file system with only what a guest of
# this kind needs, and no services started meanwhile.
cat >"$work/setup.sh" <<'EOF'
set -eu
root=$1
mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/sbin"
echo MODULES=list >"$root/etc/initramfs-tools/conf.d/argon"
echo COMPRESS=gzip >>"$root/etc/initramfs-tools/conf.d/argon"
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 >"$root/etc/initramfs-tools/modules"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
EOF

# When all packages are there.
cat >"$work/customize.sh" <<'EOF'
set -eu
root=$1
rm "$root/usr/sbin/policy-rc.d"
echo guest >"$root/etc/hostname"
echo '/dev/vda1 / ext4 defaults 0 1' >"$root/etc/fstab"
mkdir -p "$root/etc/systemd/network"
printf '[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n' >"$root/etc/systemd/network/all.network"
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	e2scrub_reap.service systemd-networkd-wait-online.service systemd-timesyncd.service; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
chroot "$root" systemctl enable --quiet systemd-networkd.service serial-getty@ttyS0.service
version=$(ls "$root/etc/postgresql")
config=$root/etc/postgresql/$version/main
echo "listen_addresses = '*'" >"$config/conf.d/argon.conf"
echo 'host argon argon 10.0.2.0/24 trust' >>"$config/pg_hba.conf"
chroot "$root" su postgres -c "pg_ctlcluster $version main start -- -o '-c listen_addresses='"
chroot "$root" su postgres -c 'createuser argon && createdb -O argon argon'
chroot "$root" su postgres -c "pg_ctlcluster $version main stop"
EOF

mmdebstrap --quiet --variant=minbase \
	--include=linux-image-cloud-amd64,initramfs-tools,systemd-sysv,udev,kmod,iproute2,postgresql \
	--setup-hook="sh $work/setup.sh \"\$1\"" \
	--customize-hook="sh $work/customize.sh \"\$1\"" \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='path-exclude=/usr/share/man/*' \
	"$suite" "$work/root.tar" >/dev/null

# Files keep their owners, whoever builds this.
fakeroot -- bash -euc '
	mkdir "$1/root"
	tar -C "$1/root" -xf "$1/root.tar" --exclude="./dev/*"
	rm "$1/root.tar"
	"$2/disk.sh" "$3" "$1/root" 1400 vmlinuz initrd.img "root=/dev/vda1 console=ttyS0 quiet mitigations=off no_timer_check"
' - "$work" "$here" "$output"
