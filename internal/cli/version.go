package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func (a *app) versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the version of this program",
		Example: "  argon version\n  argon version -o json",
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		if *f == formatTable {
			_, err := fmt.Fprintf(a.out, "argon %s %s %s/%s\n", a.version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		}
		return writeData(a.out, *f, map[string]string{
			"version": a.version, "go": runtime.Version(), "os": runtime.GOOS, "arch": runtime.GOARCH,
		})
	}
	return cmd
}

// buildVersion is what the linker was told, else the module's version, else
// the commit, as far as the build knows them.
func buildVersion(linked string) string {
	info, ok := debug.ReadBuildInfo()
	if linked != "" || !ok {
		return firstOf(linked, "unknown")
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "devel-" + s.Value[:min(len(s.Value), 12)]
		}
	}
	return "devel"
}
