#!/bin/bash
# Unpacks Debian packages into a folder, without installing them.
#
#   packages.sh FOLDER PACKAGE...
#
# A package that only depends on one of a newer name (linux-image-cloud-amd64)
# is followed to that one.
set -euo pipefail

folder=$1
shift

download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT

known() { apt-cache show "$1" >/dev/null 2>&1; }

real() {
	local next
	case $1 in
	linux-image-*)
		next=$(apt-cache depends --important "$1" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
		echo "${next:-$1}"
		;;
	*) echo "$1" ;;
	esac
}

for package in "$@"; do
	if ! known "$package" && [[ $(id -u) -eq 0 ]]; then
		apt-get update >/dev/null
	fi
	if ! known "$package"; then
		echo "packages.sh: apt-get knows no package $package: run apt-get update" >&2
		exit 1
	fi
	(cd "$download" && apt-get -o APT::Sandbox::User="$(id -un)" download "$(real "$package")" >/dev/null)
done
mkdir -p "$folder"
for deb in "$download"/*.deb; do
	dpkg-deb -x "$deb" "$folder"
done
