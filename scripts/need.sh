#!/bin/bash
# Installs Debian packages, but only those that are missing, and says so.
#
#   scripts/need.sh PROOF=PACKAGE...
#
# PROOF is a program, or a file with a path: where it is, its package is not
# missing. Without root it only says what to install.
set -euo pipefail

missing=()
for pair in "$@"; do
	proof=${pair%%=*}
	if [[ $proof == /* ]]; then
		[[ -e $proof ]] && continue
	elif PATH=$PATH:/usr/sbin:/sbin command -v "$proof" >/dev/null; then
		continue
	fi
	missing+=("${pair#*=}")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $(id -u) -ne 0 ]]; then
	echo "need: these Debian packages are missing: install them with: sudo apt-get install ${missing[*]}" >&2
	exit 1
fi
if ! command -v apt-get >/dev/null; then
	echo "need: these Debian packages are missing, and there is no apt-get: install what holds the same: ${missing[*]}" >&2
	exit 1
fi
echo "need: installing missing Debian packages: ${missing[*]}" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
	cat "$log" >&2
	echo "need: installing ${missing[*]} failed: see above" >&2
	exit 1
fi
