package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// This file: `argon volume export|import`.

// exportFormats are what volume export can write.
var exportFormats = []string{"raw", "qcow2", "stream"}

func (a *app) volumeExportCommand() *cobra.Command {
	req := &argonv1.ExportVolumeRequest{}
	var force bool
	cmd := &cobra.Command{
		Use:   "export NAME[/SNAPSHOT] FILE|-",
		Short: "Write a volume, or a snapshot of it, to a file",
		Long: `Writes a volume, or a snapshot of it, to a file on this host ("-" is standard
output). Without a snapshot it is the volume as it is at this instant, whatever
uses it. A stream holds everything that another cluster needs, checksummed; with
--since it holds only what differs from an earlier snapshot.`,
		Example: `  argon volume export db db.qcow2
  argon volume export db/monday monday.stream
  argon volume export db/tuesday tuesday.stream --since monday
  argon volume export db/monday - --format stream | ssh other argon volume import db -`,
		Args:              takes("NAME[/SNAPSHOT]", "FILE|-"),
		ValidArgsFunction: a.completeThenFiles(volumesAndSnapshots),
	}
	f := addFormatOf(cmd, exportFormats, "raw, qcow2 or stream (default: by the file's name, else raw)")
	cmd.Flags().StringVar(&req.Since, "since", "", "only what differs from this `SNAPSHOT` of the volume; a stream")
	cmd.Flags().BoolVar(&force, "force", false, "overwrite the file")
	_ = cmd.RegisterFlagCompletionFunc("since", func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) == 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		volume, _, _ := strings.Cut(args[0], "/")
		return a.completeSnapshot(&ofMachine{})(cmd, []string{volume}, typed)
	})
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		var ok bool
		if req.Volume, req.Snapshot, ok = splitSnapshot(args[0]); !ok {
			req.Volume, req.Snapshot = args[0], ""
			if strings.Contains(args[0], "/") {
				return usage(cmd, "%q is not NAME or NAME/SNAPSHOT", args[0])
			}
		}
		req.Format = firstOf(string(*f), formatOfFile(args[1], req.GetSince() != ""))
		if req.GetSince() != "" && req.GetFormat() != "stream" {
			return usage(cmd, "--since makes a stream, and --format is %s", req.GetFormat())
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		out, err := a.openExport(args[1], force)
		if err != nil {
			return err
		}
		err = a.exportVolume(ctx, c, req, out)
		if err = errors.Join(err, out.end(err == nil)); err == nil && out.name != "" {
			a.sayWritten(out.name, uint64(out.size))
		}
		return err
	})
	return cmd
}

// addFormatOf gives a command the flag --format.
func addFormatOf(cmd *cobra.Command, formats []string, help string) *chosen {
	f := &choice{of: formats}
	cmd.Flags().Var(f, "format", help)
	completeWords(cmd, "format", formats...)
	return &f.chosen
}

// choice is a flag's value: one of some words.
type choice struct {
	of []string
	chosen
}

type chosen string

func (c *choice) String() string { return string(c.chosen) }
func (c *choice) Type() string   { return "FORMAT" }

func (c *choice) Set(s string) error {
	if !slices.Contains(c.of, s) {
		return fmt.Errorf("%q is none of %s", s, strings.Join(c.of, ", "))
	}
	c.chosen = chosen(s)
	return nil
}

// formatOfFile guesses by the file's name.
func formatOfFile(name string, since bool) string {
	switch ext := filepath.Ext(name); {
	case since || ext == ".stream":
		return "stream"
	case ext == ".qcow2":
		return "qcow2"
	}
	return "raw"
}

// exportFile is where an export goes to. A regular file has its name only once
// it is whole.
type exportFile struct {
	io.Writer
	file *os.File // nil for standard output
	name string   // its name in the end
	// seeks: holes can be left.
	seeks bool
	size  int64
}

func (a *app) openExport(name string, force bool) (*exportFile, error) {
	if name == "-" {
		if isTerminal(a.out) {
			return nil, errors.New("volume export: standard output is a terminal: name a file, or send it on")
		}
		return &exportFile{Writer: a.out}, nil
	}
	if info, err := os.Stat(name); err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(name, os.O_WRONLY, 0) // a device or a pipe
		if err != nil {
			return nil, fmt.Errorf("volume export: %w", err)
		}
		return &exportFile{Writer: f, file: f}, nil
	}
	if err := mayOverwrite(name, force); err != nil {
		return nil, fmt.Errorf("volume export: %w", err)
	}
	f, err := os.OpenFile(name+".part", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("volume export: %w", err)
	}
	return &exportFile{Writer: f, file: f, name: name, seeks: true}, nil
}

// mayOverwrite refuses to overwrite a file unless that is forced.
func mayOverwrite(name string, force bool) error {
	if _, err := os.Stat(name); err == nil && !force {
		return fmt.Errorf("%s exists already: choose another name, or overwrite it with --force", name)
	}
	return nil
}

// sayWritten tells of a file that is whole now.
func (a *app) sayWritten(name string, size uint64) {
	fmt.Fprintf(a.err, "%s: %s\n", name, formatBytes(size))
}

// zeros leaves a hole where it can.
func (e *exportFile) zeros(n int64) error {
	if e.seeks {
		e.size += n
		_, err := e.file.Seek(n, io.SeekCurrent)
		return err
	}
	buf := make([]byte, min(n, 1<<20))
	for n > 0 {
		part := buf[:min(n, int64(len(buf)))]
		if _, err := e.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
	}
	return nil
}

func (e *exportFile) data(p []byte) error {
	e.size += int64(len(p))
	_, err := e.Write(p)
	return err
}

// end gives a whole file its name, and deletes another.
func (e *exportFile) end(whole bool) error {
	switch {
	case e.file == nil:
		return nil
	case e.name == "":
		return e.file.Close()
	case !whole:
		return errors.Join(e.file.Close(), os.Remove(e.file.Name()))
	}
	err := errors.Join(e.file.Truncate(e.size), e.file.Sync(), e.file.Close())
	if err == nil {
		err = os.Rename(e.file.Name(), e.name)
	}
	if err != nil {
		return fmt.Errorf("volume export: %w", err)
	}
	return nil
}

func (a *app) exportVolume(ctx context.Context, c *client.Client, req *argonv1.ExportVolumeRequest, out *exportFile) error {
	stream, err := c.Volumes.ExportVolume(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	bar := &phaseBar{app: a}
	defer bar.finish()
	var total, done uint64
	for stream.Receive() {
		switch m := stream.Msg(); {
		case m.GetHeader() != nil:
			total = m.GetHeader().GetSizeBytes()
		case m.GetProgress() != nil:
			bar.show(m.GetProgress().GetPhase(), m.GetProgress().GetDoneBytes(), m.GetProgress().GetTotalBytes())
		case m.GetZeros() > 0:
			done += m.GetZeros()
			err = out.zeros(int64(m.GetZeros()))
		default:
			done += uint64(len(m.GetData()))
			err = out.data(m.GetData())
		}
		if err != nil {
			return fmt.Errorf("volume export: writing: %w", err)
		}
		if req.GetFormat() == "raw" {
			bar.show("exporting", done, total)
		}
	}
	return stream.Err()
}

func (a *app) volumeImportCommand() *cobra.Command {
	header := &argonv1.ImportVolumeRequest_Header{}
	cmd := &cobra.Command{
		Use:   "import NAME FILE|-",
		Short: "Make a volume of a file, or bring one up to date with a stream",
		Long: `Makes a volume of a disk image or of a stream that volume export wrote, from a
file on this host ("-" is standard input). A stream of what differs from a
snapshot is imported into the volume that has this snapshot as its newest. All
of it is received and checked first: a file that is damaged changes nothing.`,
		Example: `  argon volume import db ./db.qcow2
  argon volume import db monday.stream
  argon volume import db tuesday.stream   # what differs from monday`,
		Args:              takes("NAME", "FILE|-"),
		ValidArgsFunction: a.completeThenFiles(volumeNames),
	}
	f := addFormat(cmd)
	cmd.Flags().StringVar(&header.Format, "format", "", "stream, raw, qcow2, or another that images can have (default: found by looking)")
	cmd.Flags().Uint32Var(&header.Replicas, "replicas", 2, "how many servers keep a copy of a new volume: 1, 2 or 3")
	completeWords(cmd, "format", append([]string{"stream"}, imageFormats...)...)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error { return checkReplicas(cmd, header.GetReplicas()) }
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		header.Name = args[0]
		data, err := a.openSource(args[1])
		if err != nil {
			return fmt.Errorf("volume import: %w", err)
		}
		defer data.Close()
		header.SizeBytes = data.size
		bar := &phaseBar{app: a}
		res, err := importVolume(ctx, c, header, data, bar.show)
		bar.finish()
		if err != nil {
			return err
		}
		a.warn(res.GetWarnings())
		return a.printVolume(*f, res.GetVolume())
	})
	return cmd
}

// importVolume sends the data while it shows what the server says of it.
func importVolume(ctx context.Context, c *client.Client, header *argonv1.ImportVolumeRequest_Header, data io.Reader, show showPhase) (*argonv1.ImportVolumeResponse, error) {
	send := func(stream importStream[argonv1.ImportVolumeRequest, argonv1.ImportVolumeResponse]) error {
		if err := stream.Send(&argonv1.ImportVolumeRequest{Part: &argonv1.ImportVolumeRequest_Header_{Header: header}}); err != nil {
			return err
		}
		return sendData(data, func(piece []byte) error {
			return stream.Send(&argonv1.ImportVolumeRequest{Part: &argonv1.ImportVolumeRequest_Data{Data: piece}})
		})
	}
	return upload(ctx, "volume import", c.Volumes.ImportVolume, send, func(res *argonv1.ImportVolumeResponse) bool {
		if res.GetVolume() != nil {
			return true
		}
		p := res.GetProgress()
		show(p.GetPhase(), p.GetDoneBytes(), p.GetTotalBytes())
		return false
	})
}

// volumesAndSnapshots are NAME and NAME/SNAPSHOT.
func volumesAndSnapshots(ctx context.Context, c *client.Client) ([]string, error) {
	volumes, err := volumeNames(ctx, c)
	if err != nil {
		return nil, err
	}
	paths, err := snapshotPaths(ctx, c)
	return append(volumes, paths...), err
}
