package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// consoleStream is what a console needs of the API's stream.
type consoleStream = *connect.BidiStreamForClient[argonv1.ConsoleRequest, argonv1.ConsoleResponse]

// consoleLink is a connection to a machine's console that is made again when it
// breaks. One goroutine shows, another types.
type consoleLink struct {
	client *client.Client
	name   string
	out    io.Writer
	// shown is the end of what was shown.
	shown []byte

	mu     sync.Mutex
	stream consoleStream
	// early is what was typed before there was a connection, up to shownSize.
	early []byte
}

const (
	// shownSize is how much is kept to know by where a connection broke, in
	// bytes.
	shownSize = 4 << 10
	// againFor bounds how long a connection is tried to be made again: a machine
	// whose server is lost starts within that time on another.
	againFor = time.Minute
)

// open makes the connection. The error is the server's.
func (k *consoleLink) open(ctx context.Context) error {
	stream := k.client.Machines.Console(ctx)
	if err := stream.Send(&argonv1.ConsoleRequest{Name: k.name, Shown: k.shown}); err != nil {
		// The reason is in what the server answered.
		_, err = stream.Receive()
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.stream = stream
	if len(k.early) > 0 {
		_ = stream.Send(&argonv1.ConsoleRequest{Data: k.early}) // Receive tells why
		k.early = nil
	}
	return nil
}

// waits reports whether the machine is about to run, and how far that is.
func (k *consoleLink) waits(ctx context.Context) (why string, waits bool) {
	res, err := client.Call(ctx, k.client.Machines.GetMachine, &argonv1.GetMachineRequest{Name: k.name})
	m := res.GetMachine().GetMachine()
	if err != nil || m.GetWanted() != argonv1.Wanted_WANTED_RUNNING || hasGuest(m) {
		return "", false
	}
	return cmp.Or(m.GetStatus().GetReason(), enumWord(m.GetStatus().GetState(), "MACHINE_STATE_")), true
}

// hasGuest reports whether there is a guest, and with it a console, even if it
// stands still.
func hasGuest(m *argonv1.Machine) bool {
	switch m.GetStatus().GetState() {
	case argonv1.MachineState_MACHINE_STATE_RUNNING, argonv1.MachineState_MACHINE_STATE_PAUSED,
		argonv1.MachineState_MACHINE_STATE_STOPPING, argonv1.MachineState_MACHINE_STATE_SUSPENDING:
		return m.GetStatus().GetPlacement() == m.GetPlacement()
	}
	return false
}

// await makes the connection once the machine runs. One that is not to run any more
// has none: the error says so.
func (k *consoleLink) await(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollEvery):
		}
		if _, waits := k.waits(ctx); waits {
			continue
		}
		if err := k.open(ctx); !transient(err) {
			return err
		}
	}
}

// send types; what is typed while there is no connection is lost, as on a line
// that was pulled out.
func (k *consoleLink) send(typed []byte) {
	k.mu.Lock()
	stream := k.stream
	if stream == nil {
		k.early = append(k.early, typed...)
		k.early = k.early[:min(len(k.early), shownSize)]
	}
	k.mu.Unlock()
	if stream == nil {
		return
	}
	_ = stream.Send(&argonv1.ConsoleRequest{Data: typed}) // Receive tells why
}

// show shows what is printed until the connection ends; nil if that was in
// order.
func (k *consoleLink) show() error {
	for {
		res, err := k.stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := k.out.Write(res.GetData()); err != nil {
			return fmt.Errorf("machine console: %w", err)
		}
		k.shown = append(k.shown, res.GetData()...)
		k.shown = k.shown[max(0, len(k.shown)-shownSize):]
	}
}

// again makes the connection again after it ended, and tells whether it
// could. It does not when nothing was ever shown, or the machine is not to run.
func (k *consoleLink) again(ctx context.Context) bool {
	if len(k.shown) == 0 {
		return false
	}
	limit := time.After(againFor)
	for {
		select {
		case <-ctx.Done():
			return false
		case <-limit:
			return false
		case <-time.After(pollEvery):
		}
		res, err := client.Call(ctx, k.client.Machines.GetMachine, &argonv1.GetMachineRequest{Name: k.name})
		m := res.GetMachine().GetMachine()
		switch {
		case err != nil && !transient(err):
			return false
		case err == nil && m.GetWanted() != argonv1.Wanted_WANTED_RUNNING:
			return false
		case err == nil && isRunning(m) && k.open(ctx) == nil:
			return true
		}
	}
}

// transient tells whether a call may work in a moment.
func transient(err error) bool {
	var unreachable *client.UnreachableError
	code := connect.CodeOf(err)
	return errors.As(err, &unreachable) || code == connect.CodeUnavailable || code == connect.CodeDeadlineExceeded
}
