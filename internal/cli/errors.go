package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/daemon"
)

// usageError: the command line was not understood.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

// toldError: a process that this one started has said what is wrong; only its
// exit code is left to hand on.
type toldError struct{ code int }

func (e *toldError) Error() string { return fmt.Sprintf("ended with code %d", e.code) }

// usage makes an error that ends in where to find help.
func usage(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...) + ": see `" + cmd.CommandPath() + " --help`"}
}

// flagError says what is wrong with a flag, and how it is written.
func flagError(cmd *cobra.Command, err error) error {
	if rest := cmd.Flags().Args(); len(rest) > 0 && cmd.Annotations[onlyGroup] != "" {
		return noArgs(cmd, rest) // the flag is of a command that there is not
	}
	if unknown := (*pflag.NotExistError)(nil); errors.As(err, &unknown) {
		if near := flagHintFor(cmd, unknown.GetSpecifiedName()); near != "" {
			return usage(cmd, "%v, %s", err, near)
		}
	}
	var bad *pflag.InvalidValueError
	if !errors.As(err, &bad) {
		return usage(cmd, "%v", err)
	}
	name, value := bad.GetFlag().Name, bad.GetValue()
	switch bad.GetFlag().Value.Type() {
	case "duration":
		return usage(cmd, "--%s %q: write a time such as 90s, 10m or 24h", name, value)
	case "int", "uint32", "uint64":
		return usage(cmd, "--%s %q: write a whole number that is not negative and not too large", name, value)
	case "bool":
		return usage(cmd, "--%s %q: write true or false", name, value)
	}
	return usage(cmd, "--%s %v", name, bad.Unwrap())
}

// exit prints the error, if any, as one line and chooses the exit code.
func (a *app) exit(err error) int {
	if err == nil {
		return exitOK
	}
	if told := (*toldError)(nil); errors.As(err, &told) {
		return told.code
	}
	fmt.Fprintln(a.err, "argon: "+describe(err))
	var wrong *usageError
	if errors.As(err, &wrong) || !a.runs {
		return exitUsage
	}
	if daemon.Final(err) {
		return exitFinal
	}
	return exitFailed
}

// describe makes one line of an error: what, on what, what to do.
func describe(err error) string {
	var unreachable *client.UnreachableError
	var api *connect.Error
	text := err.Error()
	switch {
	case errors.As(err, &unreachable):
		text = unreachable.Error()
	case errors.Is(err, context.Canceled):
		text = "interrupted"
	case errors.As(err, &api):
		text = describeAPI(api)
	}
	return strings.Join(strings.Fields(text), " ")
}

// describeAPI leaves the wire's code out: the server's message says it all.
func describeAPI(err *connect.Error) string {
	remote := connect.IsWireError(err)
	switch {
	case err.Code() == connect.CodeCanceled:
		return "interrupted"
	case err.Code() == connect.CodeUnimplemented:
		return "the server does not know this command: its version is older than this one (see `argon status`)"
	case remote && err.Message() != "":
		return err.Message()
	case !remote && certificateError(err) != "":
		return certificateError(err)
	case remote:
		return "the server answered " + err.Code().String() + " and gave no reason: see its log"
	case err.Code() == connect.CodeUnavailable:
		return "lost the connection to the server (" + err.Message() + "): check that it runs, then try again"
	}
	return "talking to the server: " + err.Message()
}

// certificateError says what is wrong when one side does not believe the other's
// certificate; "" if that is not what the error is about.
func certificateError(err error) string {
	const (
		other = "this client's certificate and the server are not of the same cluster: check the address, and --certs"
		clock = "a certificate is not valid at this time: check the clocks of this host and of the server, then make a new certificate with `argon client create`"
	)
	var refused *net.OpError // told by the other side
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return clock
	case errors.As(err, new(x509.UnknownAuthorityError)), errors.As(err, &invalid):
		return other
	case errors.As(err, &refused) && refused.Op == "remote error":
		if strings.Contains(refused.Error(), "expired") {
			return clock
		}
		return other + " (" + refused.Err.Error() + ")"
	}
	return ""
}

// noArgs refuses arguments, and names what may stand there instead.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if !cmd.HasAvailableSubCommands() {
		return usage(cmd, "%q is one argument too many", args[0])
	}
	if near := hintFor(cmd, args[0]); near != "" {
		return usage(cmd, "no command %q, %s", args[0], near)
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return usage(cmd, "no command %q, did you mean `%s %s`?", args[0], cmd.CommandPath(), near[0])
	}
	return usage(cmd, "no command %q", args[0])
}

// needsCommand is the body of a command that only holds others.
func needsCommand(cmd *cobra.Command, _ []string) error {
	cmd.SetOut(cmd.ErrOrStderr())
	_ = cmd.Help()
	return &usageError{"a command is needed: choose one of those above"}
}

// takes demands exactly these arguments, by name.
func takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usage(cmd, "%s is missing", names[len(args)])
		}
		if len(args) > len(names) {
			return usage(cmd, "%q is one argument too many", args[len(names)])
		}
		for i, arg := range args {
			if arg == "" {
				return usage(cmd, "%s is empty", names[i])
			}
		}
		return nil
	}
}

// takesSome demands at least one argument.
func takesSome(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usage(cmd, "%s is missing", name)
		}
		return nil
	}
}

// exclusive refuses flags that mean different things when given together.
func exclusive(cmd *cobra.Command, one, other string) error {
	if cmd.Flags().Changed(one) && cmd.Flags().Changed(other) {
		return usage(cmd, "--%s and --%s given: choose one", one, other)
	}
	return nil
}
