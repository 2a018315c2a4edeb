package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// detachKey is ctrl-], as in telnet.
const detachKey = 0x1d

func (a *app) machineConsoleCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "console NAME",
		Short: "Use a machine's serial console; ctrl-] leaves it",
		Long: `Shows what the machine printed last on its serial console and what it prints
now, and sends it what is typed. ctrl-] leaves. Without a terminal it copies
standard input to the console and goes on until interrupted.`,
		Example:           "  argon machine console web\n  argon machine console web </dev/null | grep login:",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
		RunE: a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
			return a.console(ctx, c, args[0])
		}),
	}
}

func (a *app) console(ctx context.Context, c *client.Client, name string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := c.Machines.Console(ctx)
	if err := stream.Send(&argonv1.ConsoleRequest{Name: name}); err != nil {
		// The reason is in what the server answered.
		_, err = stream.Receive()
		return err
	}
	restore, err := a.rawTerminal()
	if err != nil {
		return err
	}
	// Typing ends by itself when the process does: a read of the terminal
	// can't be interrupted.
	go typeInto(stream, a.in, cancel)
	err = a.showConsole(stream)
	restore()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// rawTerminal hands every key to the machine, if a person is typing.
func (a *app) rawTerminal() (restore func(), err error) {
	f, ok := a.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func() {}, nil
	}
	fmt.Fprintln(a.err, "connected; ctrl-] leaves")
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("machine console: setting up the terminal: %w", err)
	}
	return func() {
		_ = term.Restore(int(f.Fd()), old)
		fmt.Fprintln(a.err)
	}, nil
}

// consoleStream is what a console needs of the API's stream.
type consoleStream = *connect.BidiStreamForClient[argonv1.ConsoleRequest, argonv1.ConsoleResponse]

// typeInto sends what is typed, until the detach key.
func typeInto(stream consoleStream, in io.Reader, detach func()) {
	buf := make([]byte, 1024)
	for {
		n, err := in.Read(buf)
		typed, _, left := bytes.Cut(buf[:n], []byte{detachKey})
		if len(typed) > 0 {
			if stream.Send(&argonv1.ConsoleRequest{Data: typed}) != nil {
				return
			}
		}
		if left {
			detach()
			return
		}
		if err != nil {
			return // no more input; the output goes on
		}
	}
}

func (a *app) showConsole(stream consoleStream) error {
	for {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := a.out.Write(res.GetData()); err != nil {
			return err
		}
	}
}
