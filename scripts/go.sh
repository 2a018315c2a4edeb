#!/bin/bash
# Prints the directory of a program go that reads go.mod, and fetches it if there
# is none.
#
# Looked at are PATH, /usr/local/go and Debian's /usr/lib/go-*. Go 1.21 and newer
# fetch by themselves what go.mod names. An older one, such as Debian 12's, can't
# even read go.mod; but it can fetch that Go as the module golang.org/toolchain,
# and check it against scripts/go.sum.
set -euo pipefail
cd "$(dirname "$0")/.."

# version prints which Go a program is, without "go".
version() { (cd / && GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null | sed 's/^go//'); }

old=""
for go in "$(command -v go || true)" /usr/local/go/bin/go $(printf '%s\n' /usr/lib/go-*/bin/go | sort -rV); do
	[[ -x $go ]] || continue
	has=$(version "$go") || continue
	if [[ $(printf '1.21\n%s\n' "$has" | sort -V | head -n 1) == 1.21 ]]; then
		dirname "$go"
		exit 0
	fi
	old=$go
done
if [[ -z $old ]]; then
	echo "go: there is no Go here: install it with: sudo apt-get install golang-go" >&2
	exit 1
fi

want=$(sed -n 's/^go //p' go.mod)
module=golang.org/toolchain@v0.0.1-go$want.linux-$(cd / && "$old" env GOARCH)
dir=$(cd / && "$old" env GOMODCACHE)/$module
if [[ ! -x $dir/bin/go ]]; then
	if ! grep -q "^${module/@/ } " scripts/go.sum; then
		echo "go: $old is too old for go.mod, and scripts/go.sum does not have $module: install Go 1.21 or newer" >&2
		exit 1
	fi
	echo "go: $old is too old for go.mod: fetching Go $want from the module proxy" >&2
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	printf 'module fetch\n' >"$work/go.mod"
	cp scripts/go.sum "$work/"
	if ! (cd "$work" && "$old" mod download "$module") >&2; then
		echo "go: fetching $module failed: see above; or install Go 1.21 or newer" >&2
		exit 1
	fi
	# Modules have no programs: what is one must be said.
	chmod -R u+w "$dir"
	chmod -R a+x "$dir/bin" "$dir/pkg/tool"
fi
echo "$dir/bin"
