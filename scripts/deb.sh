#!/bin/bash
# Makes a Debian package of bin/argon: the same bytes for the same commit.
#
#   scripts/deb.sh VERSION FILE.deb
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1 file=$2
case $version in
v[0-9]*) version=${version#v} ;;
[0-9]*.*) ;;
*) version=0~git$(git log -1 --format=%cd --date=format:%Y%m%d 2>/dev/null || echo 0).${version:-unknown} ;;
esac
version=${version//-/+}
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 0)
export SOURCE_DATE_EPOCH

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
umask 022
install -D -m 755 bin/argon "$root/usr/bin/argon"
mkdir -p "$root/lib/systemd/system" "$root/usr/share/bash-completion/completions"
sed 's|/usr/local/bin/argon|/usr/bin/argon|' internal/install/argon.service >"$root/lib/systemd/system/argon.service"
bin/argon completion bash >"$root/usr/share/bash-completion/completions/argon"
install -D -m 644 internal/install/argon.sysctl.conf "$root/usr/lib/sysctl.d/60-argon.conf"
install -D -m 644 LICENSE "$root/usr/share/doc/argon/copyright"
mkdir "$root/DEBIAN"
cat >"$root/DEBIAN/control" <<-CONTROL
	Package: argon
	Version: $version
	Architecture: $(dpkg --print-architecture)
	Maintainer: The Argon authors <argon@localhost>
	Section: admin
	Priority: optional
	Depends: iproute2
	Recommends: qemu-system-x86, qemu-utils
	Installed-Size: $(du -sk --apparent-size "$root" | cut -f1)
	Description: makes a set of Linux servers one machine
	 Their disks form one replicated store, and virtual machines run on any server
	 and start again elsewhere when theirs is lost. A server that only votes needs
	 no QEMU: install with --no-install-recommends there.
CONTROL
cat >"$root/DEBIAN/postinst" <<-'SCRIPT'
	#!/bin/sh
	set -e
	if [ "$1" = configure ] && command -v systemctl >/dev/null && [ ! -d /run/systemd/system ]; then
		systemctl enable argon >/dev/null
	fi
	if [ "$1" = configure ] && [ -d /run/systemd/system ]; then
		if command -v sysctl >/dev/null; then sysctl --quiet --load /usr/lib/sysctl.d/60-argon.conf || true; fi
		systemctl daemon-reload
		systemctl enable argon >/dev/null
		# An upgrade: another daemon, while machines run on.
		if [ -n "$2" ]; then systemctl reload-or-restart argon; else systemctl start argon; fi
	fi
SCRIPT
cat >"$root/DEBIAN/prerm" <<-'SCRIPT'
	#!/bin/sh
	set -e
	if [ "$1" = remove ] && command -v systemctl >/dev/null; then
		if [ -d /run/systemd/system ]; then systemctl stop argon; fi
		systemctl disable argon
	fi
SCRIPT
chmod 755 "$root/DEBIAN/postinst" "$root/DEBIAN/prerm"
dpkg-deb --root-owner-group --build "$root" "$file" >/dev/null
echo "$file"
