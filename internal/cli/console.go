package cli

import (
	"bytes"
	"context"
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
now, and sends it what is typed. That of a machine that is being started opens
when it runs; of one that is stopped, what it printed last is shown. ctrl-]
leaves. Without a terminal it copies standard input to the console and goes on
until interrupted.`,
		Example:           "  argon machine console web\n  argon machine console web </dev/null | grep login:",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
		RunE: a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
			err := a.console(ctx, c, args[0])
			if connect.CodeOf(err) != connect.CodeFailedPrecondition || !a.lastWords(ctx, c, args[0]) {
				return err
			}
			return nil
		}),
	}
}

// console shows a machine's console until it is left or the machine is to stop. A
// connection that ends earlier, because a daemon is restarted or the machine runs
// on another server now, is made again, from where it ended.
func (a *app) console(ctx context.Context, c *client.Client, name string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	k := &consoleLink{client: c, name: name, out: a.out}
	why, waits := k.waits(ctx)
	if waits {
		fmt.Fprintf(a.err, "machine %s does not run yet (%s): its console opens when it does; ctrl-] leaves\n", name, why)
	} else if err := k.open(ctx); err != nil {
		return err
	}
	restore, err := a.rawTerminal(!waits)
	if err != nil {
		return err
	}
	defer restore()
	// Typing ends by itself when the process does: a read of the terminal
	// can't be interrupted.
	go typeInto(k, a.in, cancel)
	if waits {
		if err := k.await(ctx); err != nil {
			return ifNotLeft(ctx, err)
		}
	}
	for {
		err = k.show()
		if ctx.Err() != nil || !k.again(ctx) {
			break
		}
	}
	return ifNotLeft(ctx, err)
}

// lastWords shows what a machine that does not run printed last, and reports whether
// there is something.
func (a *app) lastWords(ctx context.Context, c *client.Client, name string) bool {
	log, err := client.Call(ctx, c.Machines.ReadConsoleLog, &argonv1.ReadConsoleLogRequest{Name: name})
	if err != nil {
		return false // that it does not run says more
	}
	_, err = a.out.Write(log.GetData())
	fmt.Fprintf(a.err, "\nmachine %s does not run; this is what it printed last\n", name)
	return err == nil
}

// ifNotLeft is err unless whoever had the console has left it.
func ifNotLeft(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// rawTerminal hands every key to the machine, if a person is typing.
func (a *app) rawTerminal(connected bool) (restore func(), err error) {
	f, ok := a.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func() {}, nil
	}
	if connected {
		fmt.Fprintln(a.err, "connected; ctrl-] leaves")
	}
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("machine console: setting up the terminal: %w", err)
	}
	return func() {
		_ = term.Restore(int(f.Fd()), old)
		fmt.Fprintln(a.err)
	}, nil
}

// typeInto sends what is typed, until the detach key.
func typeInto(k *consoleLink, in io.Reader, detach func()) {
	buf := make([]byte, 1024)
	for {
		n, err := in.Read(buf)
		typed, _, left := bytes.Cut(buf[:n], []byte{detachKey})
		if len(typed) > 0 {
			k.send(typed)
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
