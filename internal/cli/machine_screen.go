package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/png"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) machineVNCCommand() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "vnc NAME",
		Short: "Give a VNC viewer the way to a machine's screen",
		Long: `Leads a VNC viewer on this host to a machine's screen, wherever the machine
runs, until interrupted. The viewer connects to a port of 127.0.0.1, which
everybody on this host can do meanwhile; or, if --listen names a path, to a unix
socket, which only you can.`,
		Example: `  argon machine vnc web
  argon machine vnc web --listen 127.0.0.1:5901
  argon machine vnc web --listen /tmp/web.vnc & vncviewer /tmp/web.vnc`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "`ADDRESS` to listen on, with port 0 for a free one; or the path of a unix socket")
	completeFiles(cmd, "listen")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		ln, hint, err := listenForViewer(ctx, listen)
		if err != nil {
			return fmt.Errorf("machine vnc: %w", err)
		}
		defer ln.Close()
		// Now, not when a viewer comes: that it can't be seen is an answer.
		if err := tryDisplay(ctx, c, args[0]); err != nil {
			return err
		}
		fmt.Fprintf(a.err, "the screen of %s is at %s until ctrl-c; see it with: %s\n", args[0], ln.Addr(), hint)
		fmt.Fprintln(a.out, ln.Addr())
		return serveViewers(ctx, ln, func(ctx context.Context, conn net.Conn) {
			if err := carryDisplay(ctx, c, args[0], conn); err != nil && ctx.Err() == nil {
				fmt.Fprintf(a.err, "machine %s: %s\n", args[0], describe(err))
			}
		})
	})
	return cmd
}

// listenForViewer also says what to type.
func listenForViewer(ctx context.Context, at string) (net.Listener, string, error) {
	var l net.ListenConfig
	if !strings.Contains(at, "/") {
		ln, err := l.Listen(ctx, "tcp", at)
		if err != nil {
			return nil, "", err
		}
		host, port, _ := net.SplitHostPort(ln.Addr().String())
		return ln, fmt.Sprintf("vncviewer %s::%s", host, port), nil
	}
	// Made where only the user can reach it, then named as wanted.
	dir, err := os.MkdirTemp(filepath.Dir(at), ".vnc-")
	if err != nil {
		return nil, "", err
	}
	defer os.Remove(dir)
	ln, err := l.Listen(ctx, "unix", filepath.Join(dir, "s"))
	if err != nil {
		return nil, "", err
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	err = os.Chmod(filepath.Join(dir, "s"), 0o600)
	if err == nil {
		err = os.Link(filepath.Join(dir, "s"), at)
	}
	err = errors.Join(err, os.Remove(filepath.Join(dir, "s")))
	if err != nil {
		return nil, "", errors.Join(err, ln.Close())
	}
	return &namedSocket{ln, at}, "vncviewer " + at, nil
}

// namedSocket goes by another name than the one it was made with.
type namedSocket struct {
	net.Listener
	path string
}

// Addr implements net.Listener.
func (s *namedSocket) Addr() net.Addr { return &net.UnixAddr{Name: s.path, Net: "unix"} }

// Close implements net.Listener.
func (s *namedSocket) Close() error {
	err := s.Listener.Close()
	if removed := os.Remove(s.path); !errors.Is(removed, os.ErrNotExist) {
		err = errors.Join(err, removed)
	}
	return err
}

// serveViewers serves each one that connects, until ctx ends.
func serveViewers(ctx context.Context, ln net.Listener, serve func(context.Context, net.Conn)) error {
	var viewers sync.WaitGroup
	defer viewers.Wait()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("machine vnc: %w", err)
		}
		viewers.Go(func() {
			defer conn.Close()
			serve(ctx, conn)
		})
	}
}

type displayStream = *connect.BidiStreamForClient[argonv1.DisplayRequest, argonv1.DisplayResponse]

// tryDisplay waits for the first that a screen says.
func tryDisplay(ctx context.Context, c *client.Client, name string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := c.Machines.Display(ctx)
	_ = stream.Send(&argonv1.DisplayRequest{Name: name}) // Receive tells why
	_, err := stream.Receive()
	return err
}

// carryDisplay copies between a viewer and a machine's screen until either ends.
func carryDisplay(ctx context.Context, c *client.Client, name string, viewer net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := c.Machines.Display(ctx)
	_ = stream.Send(&argonv1.DisplayRequest{Name: name}) // Receive tells why
	var typing sync.WaitGroup
	defer typing.Wait()
	defer viewer.Close() // ends the typing
	typing.Go(func() {
		defer cancel()
		sendTyped(stream, viewer)
	})
	for {
		m, err := stream.Receive()
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := viewer.Write(m.GetData()); err != nil {
			return nil
		}
	}
}

func sendTyped(stream displayStream, viewer io.Reader) {
	buf := make([]byte, 16<<10)
	for {
		n, err := viewer.Read(buf)
		if n > 0 && stream.Send(&argonv1.DisplayRequest{Data: buf[:n]}) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

func (a *app) machineScreenshotCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "screenshot NAME FILE",
		Short: "Save what a machine's screen shows as a PNG",
		Long: `Saves what a machine's screen shows now as a PNG. "-" is standard output. Many
servers' systems show nothing there once they have started: see their console.`,
		Example:           "  argon machine screenshot web web.png",
		Args:              takes("NAME", "FILE"),
		ValidArgsFunction: a.completeThenFiles(machineNames),
		RunE: a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
			picture, err := screenshot(ctx, c, args[0])
			if err != nil {
				return err
			}
			if args[1] == "-" {
				_, err = a.out.Write(picture)
				return err
			}
			size, err := png.DecodeConfig(bytes.NewReader(picture))
			if err != nil {
				return fmt.Errorf("machine screenshot: what came is no picture: %w", err)
			}
			if err := renameio.WriteFile(args[1], picture, 0o600); err != nil {
				return fmt.Errorf("machine screenshot: %w", err)
			}
			fmt.Fprintf(a.err, "%s: %d by %d\n", args[1], size.Width, size.Height)
			return nil
		}),
	}
}

// maxPicture bounds what is taken from a server, in bytes.
const maxPicture = 64 << 20

func screenshot(ctx context.Context, c *client.Client, name string) ([]byte, error) {
	stream, err := c.Machines.Screenshot(ctx, connect.NewRequest(&argonv1.ScreenshotRequest{Name: name}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var picture []byte
	for stream.Receive() {
		if picture = append(picture, stream.Msg().GetData()...); len(picture) > maxPicture {
			return nil, errors.New("machine screenshot: the picture does not end")
		}
	}
	return picture, stream.Err()
}
