package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// confirmFlag lets a command go on without asking.
type confirmFlag struct{ yes bool }

func (c *confirmFlag) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&c.yes, "yes", false, "do not ask")
}

// confirm says what is about to happen and has a person type the word. Where
// nobody can be asked, --yes has to be given.
func (a *app) confirm(ctx context.Context, c confirmFlag, lines []string, word string) error {
	for _, line := range lines {
		fmt.Fprintln(a.err, line)
	}
	if c.yes {
		return nil
	}
	if _, file := a.in.(*os.File); file && !isTerminal(a.in) {
		return fmt.Errorf("not confirmed: give --yes, or run this where %q can be typed", word)
	}
	fmt.Fprintf(a.err, "type %q to go on: ", word)
	switch typed, err := readLine(ctx, a.in); {
	case err != nil:
		fmt.Fprintln(a.err) // the question's line is over
		return err
	case typed != word:
		return fmt.Errorf("not confirmed: %q is not %q", typed, word)
	}
	return nil
}

// longestLine bounds what is read as one line, in bytes.
const longestLine = 4096

// readLine reads one line, without the blanks around it. A person who is asked
// can interrupt; the read itself then ends with the process.
func readLine(ctx context.Context, r io.Reader) (string, error) {
	type answer struct {
		line string
		err  error
	}
	read := make(chan answer, 1)
	go func() {
		var line []byte
		var err error
		// Byte by byte: what comes after the line is somebody else's.
		for b := make([]byte, 1); err == nil && len(line) < longestLine && !bytes.HasSuffix(line, []byte("\n")); {
			var n int
			n, err = r.Read(b)
			line = append(line, b[:n]...)
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		read <- answer{strings.TrimSpace(string(line)), err}
	}()
	select {
	case a := <-read:
		return a.line, a.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}
