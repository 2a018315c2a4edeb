package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Every command line in the help and in the docs is one that argon understands.
func TestExamplesAreUnderstood(t *testing.T) {
	walk(testRoot(), func(cmd *cobra.Command) {
		for line := range strings.Lines(cmd.Example) {
			check(t, cmd.CommandPath(), line, true)
		}
	})
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	quoted := regexp.MustCompile("`argon [^`]+`")
	found := 0
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		joined := strings.ReplaceAll(string(text), "\\\n", " ")
		for line := range strings.Lines(joined) {
			if strings.HasPrefix(line, "    ") {
				found += check(t, page, line, true)
			}
		}
		for _, q := range quoted.FindAllString(joined, -1) {
			found += check(t, page, strings.Trim(q, "`"), false)
		}
	}
	if found < 80 {
		t.Errorf("only %d commands found in the docs", found)
	}
}

// expansion is what the shell makes flags of, or nothing.
var expansion = regexp.MustCompile(`\$\{[^}]*\}`)

// A command ends where the shell or the writer goes on.
var commandLine = regexp.MustCompile(`(?:^|\| |&& |\$\(|do |ssh \S+ )argon ([a-z-][^#&|<>();]*)`)

// check looks at the commands of one line, and returns how many there were. One
// that is not whole is only spoken of.
func check(t *testing.T, where, line string, whole bool) int {
	t.Helper()
	line = strings.TrimSpace(line)
	if strings.HasPrefix(line, "argon: ") || strings.Contains(line, "…") || strings.Contains(line, "|rm") {
		return 0
	}
	found := 0
	for _, m := range commandLine.FindAllStringSubmatch(strings.TrimPrefix(line, "# "), -1) {
		args := strings.Fields(strings.NewReplacer(`"`, "", `'`, "").Replace(expansion.ReplaceAllString(m[1], "")))
		if err := understood(args, whole); err != nil {
			t.Errorf("%s: argon %s: %v", where, m[1], err)
		}
		found++
	}
	return found
}

// understood finds the command and reads its flags and arguments, but does
// nothing.
func understood(args []string, whole bool) error {
	root := testRoot()
	cmd, rest, err := root.Find(args)
	if err != nil {
		return err
	}
	var lacks *pflag.ValueRequiredError
	if err := cmd.ParseFlags(rest); err != nil && (whole || !errors.As(err, &lacks)) {
		return err
	}
	if whole {
		return cmd.ValidateArgs(cmd.Flags().Args())
	}
	if cmd.Annotations[onlyGroup] != "" && len(cmd.Flags().Args()) > 0 {
		return fmt.Errorf("no command %q", cmd.Flags().Args())
	}
	return nil
}
