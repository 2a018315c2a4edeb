#!/bin/bash
# Builds the disk image of an ordinary Debian: its kernel, systemd, cloud-init, the
# guest agent, an SSH server, PostgreSQL. PostgreSQL is as Debian ships it, fsync on,
# but for its compiler, and who may connect: user and database argon, over the
# network, without a password.
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
# Of cloud-init only what is used: its parts are Python, and slow where processors
# are emulated. RSA keys take such a guest minutes.
cat >"$root/etc/cloud/cloud.cfg.d/90-guest.cfg" <<'CFG'
datasource_list: [NoCloud]
ssh_genkeytypes: [ed25519]
cloud_init_modules: [write-files, set_hostname, users-groups, ssh]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user]
CFG
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	e2scrub_reap.service systemd-networkd-wait-online.service systemd-timesyncd.service; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
chroot "$root" systemctl enable --quiet systemd-networkd.service serial-getty@ttyS0.service
version=$(ls "$root/etc/postgresql")
config=$root/etc/postgresql/$version/main
printf '%s\n' "listen_addresses = '*'" 'jit = off' >"$config/conf.d/argon.conf"
echo 'host argon argon 10.0.2.0/24 trust' >>"$config/pg_hba.conf"
chroot "$root" su postgres -c "pg_ctlcluster $version main start -- -o '-c listen_addresses='"
chroot "$root" su postgres -c 'createuser argon && createdb -O argon argon'
chroot "$root" su postgres -c "pg_ctlcluster $version main stop"
EOF

# What no guest of this kind needs: each byte is written many times on its way to
# the guest's disk. The power may fail while this is built, too.
options=(--dpkgopt=force-unsafe-io)
for path in /usr/share/{doc,locale,man,i18n} /usr/lib/udev/hwdb.d \
	'/usr/lib/postgresql/*/lib/bitcode' '/usr/lib/*/lib'{LLVM,z3} \
	'/lib/modules/*/kernel/drivers/'{comedi,hid,infiniband,md,net/ethernet,scsi,target} \
	'/lib/modules/*/kernel/fs/'{btrfs,ceph,f2fs,gfs2,nfs,nfsd,ocfs2,smb,xfs} \
	'/lib/modules/*/kernel/net/'{bridge,netfilter,sched,sctp,sunrpc}; do
	options+=(--dpkgopt="path-exclude=$path*")
done

mmdebstrap --quiet --variant=minbase \
	--include=linux-image-cloud-amd64,initramfs-tools,systemd-sysv,udev,kmod,iproute2 \
	--include=cloud-init,qemu-guest-agent,openssh-server,postgresql \
	--setup-hook="sh $work/setup.sh \"\$1\"" \
	--customize-hook="sh $work/customize.sh \"\$1\"" \
	"${options[@]}" "$suite" "$work/root.tar" >/dev/null

# Files keep their owners, whoever builds this.
owners=(fakeroot --)
((EUID)) || owners=()
"${owners[@]}" bash -euc '
	mkdir "$1/root"
	tar -C "$1/root" -xf "$1/root.tar" --exclude="./dev/*"
	rm "$1/root.tar"
	"$2/disk.sh" "$3" "$1/root" 1000 vmlinuz initrd.img "root=/dev/vda1 console=ttyS0 quiet net.ifnames=0 mitigations=off no_timer_check"
' - "$work" "$here" "$output"
