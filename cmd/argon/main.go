// Command argon is the server and its command line in one binary: see
// internal/cli.
package main

import (
	"os"

	"github.com/argon-cluster/argon/internal/cli"
)

// version is set by the linker (see the Makefile); otherwise the build's own
// information is shown.
var version string

func main() {
	os.Exit(cli.Main(os.Args[1:], version, os.Stdin, os.Stdout, os.Stderr))
}
