#!/bin/bash
# Makes the root of a plain Debian 12 server: what the installer puts on every
# host, and nothing else.
#
#   root.sh DIRECTORY
set -euo pipefail
root=$1
[[ -e $root/etc/debian_version && $root -nt $0 ]] && exit 0
rm -rf "$root"
mkdir -p "$(dirname "$root")"
mmdebstrap --quiet --variant=important --dpkgopt=force-unsafe-io \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	bookworm "$root" >/dev/null
touch "$root"
