package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// confirmFlag lets a command go on without asking.
type confirmFlag struct{ yes bool }

func (c *confirmFlag) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&c.yes, "yes", false, "do not ask")
}

// confirm says what is about to happen and has a person type the word. Where
// nobody can be asked, --yes has to be given.
func (a *app) confirm(c confirmFlag, lines []string, word string) error {
	for _, line := range lines {
		fmt.Fprintln(a.err, line)
	}
	if c.yes {
		return nil
	}
	if f, ok := a.in.(*os.File); ok && !term.IsTerminal(int(f.Fd())) {
		return fmt.Errorf("not confirmed: give --yes, or run this where %q can be typed", word)
	}
	fmt.Fprintf(a.err, "type %q to go on: ", word)
	typed, err := readLine(a.in)
	if err != nil {
		return fmt.Errorf("not confirmed: %w", err)
	}
	if strings.TrimSpace(typed) != word {
		return fmt.Errorf("not confirmed: %q is not %q", strings.TrimSpace(typed), word)
	}
	return nil
}
