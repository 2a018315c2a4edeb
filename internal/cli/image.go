package cli

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	"github.com/dustin/go-humanize/english"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) imageCommand() *cobra.Command {
	return group("image", "What machines' disks are made from",
		`  argon image import debian ./debian-12.qcow2
  argon image ls`,
		a.imageImportCommand(), a.imageListCommand(), a.imageShowCommand(), a.imageRemoveCommand())
}

func (a *app) imageImportCommand() *cobra.Command {
	header := &argonv1.ImportImageRequest_Header{}
	cmd := &cobra.Command{
		Use:   "import NAME FILE|URL|-",
		Short: "Import a disk image from a file, a URL or standard input",
		Long: `Imports a disk image: qcow2, raw, vmdk, vdi, vhdx, or an OVA with one disk,
each as it is or compressed with gzip, xz, zstd or bzip2. It comes from a file
on this host ("-" is standard input) or from a URL, which the server downloads:
https, or http if its --sha256 is given. What an OVA says of its machine's
memory and processors is the default for machines that are made from it.`,
		Example: `  argon image import debian ./debian-12.qcow2
  argon image import debian https://example.org/debian-12.qcow2 --sha256 9f86d0...
  argon image import appliance ./appliance.ova
  ssh old cat /dev/sda | argon image import old - --format raw`,
		Args:              takes("NAME", "FILE|URL|-"),
		ValidArgsFunction: a.completeThenFiles(nil),
	}
	f := addFormat(cmd)
	cmd.Flags().StringVar(&header.Format, "format", "", strings.Join(imageFormats, ", ")+" (default: found by looking)")
	completeWords(cmd, "format", imageFormats...)
	cmd.Flags().StringVar(&header.Sha256, "sha256", "", "refuse the image unless the file has this checksum")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		return checkImageFormat(cmd, header.Format)
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		header.Name = args[0]
		data, err := a.openImage(args[1], header)
		if err != nil {
			return fmt.Errorf("image import: %w", err)
		}
		defer data.Close()
		bar := &phaseBar{app: a}
		image, err := importImage(ctx, c, header, data, bar.show)
		bar.finish()
		if err != nil {
			return err
		}
		return printOne(a, *f, image, a.imageColumns())
	})
	return cmd
}

// imageFormats are those that can be imported.
var imageFormats = []string{"qcow2", "raw", "vmdk", "vdi", "vhdx", "ova"}

func checkImageFormat(cmd *cobra.Command, format string) error {
	if format != "" && !slices.Contains(imageFormats, format) {
		return usage(cmd, "--format %q is not one of %s", format, strings.Join(imageFormats, ", "))
	}
	return nil
}

// openImage opens what an image is made of, and fills in where it comes from. A
// URL has no data here: the server downloads it.
func (a *app) openImage(path string, header *argonv1.ImportImageRequest_Header) (io.ReadCloser, error) {
	if u, err := url.Parse(path); err == nil && strings.Contains(path, "://") {
		switch {
		case u.Scheme == "http" && header.GetSha256() == "":
			return nil, fmt.Errorf("%s: anybody on the way could change what comes over http: give --sha256, or an https URL", path)
		case u.Scheme != "https" && u.Scheme != "http":
			return nil, fmt.Errorf("%s: only https and http URLs and files can be imported", path)
		}
		header.Url, header.Source = path, path
		return io.NopCloser(strings.NewReader("")), nil
	}
	data, err := a.openSource(path)
	if err != nil {
		return nil, err
	}
	header.Source, header.SizeBytes = data.name, data.size
	return data, nil
}

// showPhase is told how far the server is.
type showPhase func(phase string, done, total uint64)

// importImage sends the data while it shows what the server says of it.
func importImage(ctx context.Context, c *client.Client, header *argonv1.ImportImageRequest_Header, data io.Reader, show showPhase) (*argonv1.Image, error) {
	send := func(stream importStream[argonv1.ImportImageRequest, argonv1.ImportImageResponse]) error {
		if err := stream.Send(&argonv1.ImportImageRequest{Part: &argonv1.ImportImageRequest_Header_{Header: header}}); err != nil {
			return err
		}
		return sendData(data, func(piece []byte) error {
			return stream.Send(&argonv1.ImportImageRequest{Part: &argonv1.ImportImageRequest_Data{Data: piece}})
		})
	}
	res, err := upload(ctx, "image import", c.Images.ImportImage, send, func(res *argonv1.ImportImageResponse) bool {
		if res.GetImage() != nil {
			return true
		}
		show(res.GetPhase(), res.GetDoneBytes(), res.GetTotalBytes())
		return false
	})
	return res.GetImage(), err
}

// phaseBar is a progress bar that starts anew with each phase of the work.
type phaseBar struct {
	app   *app
	phase string
	bar   *progressbar.ProgressBar
}

func (b *phaseBar) show(phase string, done, total uint64) {
	if !redraws(b.app.err) {
		return
	}
	size := int64(total)
	if total == 0 {
		size = -1
	}
	if b.bar == nil || b.phase != phase {
		b.finish()
		b.phase = phase
		b.bar = progressbar.NewOptions64(size,
			progressbar.OptionSetWriter(b.app.err),
			progressbar.OptionSetDescription(phase),
			progressbar.OptionShowBytes(true),
			progressbar.OptionFullWidth(),
			progressbar.OptionClearOnFinish())
	}
	if size > 0 {
		b.bar.ChangeMax64(size)
	}
	_ = b.bar.Set64(int64(done))
}

func (b *phaseBar) finish() {
	if b.bar != nil {
		_ = b.bar.Finish()
	}
}

func (a *app) imageListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the images",
		Example: "  argon image ls",
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Images.ListImages, &argonv1.ListImagesRequest{})
		if err != nil {
			return err
		}
		return printList(a, *f, res.GetImages(), a.imageColumns())
	})
	return cmd
}

func (a *app) imageShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one image, and where it is kept",
		Example:           "  argon image show debian",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(imageNames),
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Images.GetImage, &argonv1.GetImageRequest{Name: args[0]})
		if err != nil {
			return err
		}
		servers, err := serversByID(ctx, c)
		if err != nil {
			return err
		}
		return showOne(a, *f, res.GetImage(), a.imageColumns(), imageDetails(servers))
	})
	return cmd
}

// imageDetails are shown of a single image only.
func imageDetails(servers map[string]string) []column[*argonv1.Image] {
	type image = *argonv1.Image
	return []column[image]{
		{"on servers", func(i image) cell {
			var on []string
			for _, c := range i.GetCopies() {
				name := firstOf(servers[c.GetServerId()], c.GetServerId())
				if !c.GetReady() {
					name += " (on its way)"
				}
				on = append(on, name)
			}
			return plain(strings.Join(on, ", "))
		}},
		{"machine", func(i image) cell { return plain(formatHints(i.GetHints())) }},
		{"sha256 of the disk", func(i image) cell { return plain(i.GetSha256()) }},
		{"created", func(i image) cell { return plain(formatTime(i.GetMeta().GetCreated())) }},
		{"id", func(i image) cell { return plain(i.GetMeta().GetId()) }},
	}
}

// formatHints says what machines of an image get unless told otherwise.
func formatHints(h *argonv1.MachineHints) string {
	var words []string
	if n := h.GetCpus(); n > 0 {
		words = append(words, english.Plural(int(n), "cpu", ""))
	}
	if n := h.GetMemoryBytes(); n > 0 {
		words = append(words, formatBytes(n)+" of memory")
	}
	if h.GetFirmware() != "" {
		words = append(words, h.GetFirmware())
	}
	if n := h.GetNetworks(); n > 1 {
		words = append(words, fmt.Sprintf("%d networks", n))
	}
	return strings.Join(words, ", ")
}

func (a *app) imageColumns() []column[*argonv1.Image] {
	type image = *argonv1.Image
	return []column[image]{
		{"name", func(i image) cell { return plain(i.GetMeta().GetName()) }},
		{"size", func(i image) cell { return plain(formatBytes(i.GetSizeBytes())) }},
		{"format", func(i image) cell { return plain(i.GetSourceFormat()) }},
		{"copies", func(i image) cell {
			ready := 0
			for _, c := range i.GetCopies() {
				if c.GetReady() {
					ready++
				}
			}
			return number(ready)
		}},
		{"sha256", func(i image) cell { return plain(i.GetSha256()[:min(len(i.GetSha256()), 12)]) }},
		{"source", func(i image) cell { return plain(i.GetSource()) }},
		{"age", func(i image) cell { return plain(formatAge(a.now(), i.GetMeta().GetCreated())) }},
	}
}

func (a *app) imageRemoveCommand() *cobra.Command {
	var detach, noWait bool
	cmd := &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove images",
		Long: `Removes images. Refused while volumes are based on one, unless --detach has them
copy what they need of it first: that goes on in the background if this command
is interrupted.`,
		Example:           "  argon image rm debian\n  argon image rm debian --detach",
		Args:              takesSome("NAME"),
		ValidArgsFunction: a.completeEach(imageNames),
	}
	cmd.Flags().BoolVar(&detach, "detach", false, "first have volumes that are based on it copy what they need of it")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait for them")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		for _, name := range args {
			err := a.removeBase(ctx, c, "image "+name, noWait, func() ([]string, error) {
				res, err := client.Call(ctx, c.Images.RemoveImage, &argonv1.RemoveImageRequest{Name: name, Detach: detach})
				return res.GetWaitsFor(), err
			}, func() (bool, error) {
				_, err := client.Call(ctx, c.Images.GetImage, &argonv1.GetImageRequest{Name: name})
				return isGone(err)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return cmd
}
