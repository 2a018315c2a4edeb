#!/bin/sh
# Installs Argon on this host, and has it join cluster {{.Cluster}}. What is given
# to this script goes to `argon server install`: --name, --zone, --witness.
set -eu

# All of it is read before any of it runs: a script that was cut off does nothing.
main() {
	fail() {
		echo "argon: $1" >&2
		exit 1
	}
	[ "$(id -u)" -eq 0 ] || fail "run it as root: sudo sh in the place of sh"
	[ "$(uname -s) $(uname -m)" = "Linux {{.Machine}}" ] || fail "the program is for Linux on {{.Machine}}, and this is $(uname -s) on $(uname -m)"
	mkdir -p /usr/local/bin
	# A place that programs can run from, and are renamed to where they stay.
	program=$(mktemp /usr/local/bin/argon.XXXXXX)
	trap 'rm -f "$program"' EXIT
	echo "fetching argon from {{.Address}}" >&2
	{{.Fetch}} >"$program"
	chmod 755 "$program"
	"$program" server install --join {{.Address}} --token - "$@" <<-'TOKEN'
		{{.Token}}
	TOKEN
}
main "$@"
