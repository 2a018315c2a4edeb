package cli

import (
	"context"
	"fmt"
	"path"
	"strings"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// This file: `machine create --image` with a file or a URL in the place of a name.

// isImageSource reports whether what --image says is a file or a URL: names have
// no slash.
func isImageSource(image string) bool { return strings.Contains(image, "/") }

// imageSuffixes are what names of image files end with, the outer one first.
var imageSuffixes = []string{".gz", ".xz", ".zst", ".bz2", ".qcow2", ".raw", ".img", ".vmdk", ".vdi", ".vhdx", ".ova"}

// imageNameOf makes a record's name of that of a file.
func imageNameOf(source string) string {
	source, _, _ = strings.Cut(source, "?")
	name := strings.ToLower(path.Base(source))
	for _, suffix := range imageSuffixes {
		name = strings.TrimSuffix(name, suffix)
	}
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, name)
	name = strings.Trim(name[:min(len(name), 63)], "-")
	return firstOf(name, "image")
}

// namedImage is the name of the image that --image says: a file or a URL is
// imported first, unless an image came from that URL before.
func (a *app) namedImage(ctx context.Context, c *client.Client, image string) (string, error) {
	if !isImageSource(image) {
		return image, nil
	}
	res, err := client.Call(ctx, c.Images.ListImages, &argonv1.ListImagesRequest{})
	if err != nil {
		return "", err
	}
	name, isURL := imageNameOf(image), strings.Contains(image, "://")
	for _, i := range res.GetImages() {
		has := i.GetMeta().GetName()
		if isURL && i.GetSource() == image {
			return has, nil
		}
		if has == name {
			return "", fmt.Errorf("machine create: there is an image %s, which came from %s: use it with --image %s, or import this one under another name with `argon image import`", name, i.GetSource(), name)
		}
	}
	header := &argonv1.ImportImageRequest_Header{Name: name}
	data, err := a.openImage(image, header)
	if err != nil {
		return "", fmt.Errorf("machine create: %w", err)
	}
	defer data.Close()
	bar := &phaseBar{app: a}
	imported, err := importImage(ctx, c, header, data, bar.show)
	bar.finish()
	if err != nil {
		return "", err
	}
	fmt.Fprintf(a.err, "image %s imported\n", imported.GetMeta().GetName())
	return imported.GetMeta().GetName(), nil
}
