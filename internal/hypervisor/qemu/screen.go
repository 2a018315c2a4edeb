package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

const (
	// screenTimeout bounds how long a screenshot may take.
	screenTimeout = 10 * time.Second
	// maxScreen bounds a screenshot's file, in bytes; the largest screen that
	// the guest's graphics memory holds has 16 MiB.
	maxScreen = 64 << 20
	// maxPixels bounds one side of a screen.
	maxPixels = 16384
)

// Display implements hypervisor.Guest.
func (g *guest) Display(ctx context.Context) (io.ReadWriteCloser, error) {
	conn, err := dial(ctx, displaySocket(g.dir), g.pid)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("the screen of guest %s: %w", g.id, hypervisor.ErrOldGuest)
	}
	if err != nil {
		return nil, fmt.Errorf("the screen of guest %s: %w", g.id, err)
	}
	return conn, nil
}

// Screenshot implements hypervisor.Guest. QEMU writes PNG from 7.1 on.
func (g *guest) Screenshot(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, screenTimeout)
	defer cancel()
	select {
	case g.screen <- struct{}{}:
		defer func() { <-g.screen }()
	case <-ctx.Done():
		return nil, fmt.Errorf("the screen of guest %s: %w", g.id, ctx.Err())
	}
	path := screenFile(g.dir)
	defer os.Remove(path)
	err := g.executeWith(ctx, "screendump", map[string]string{"filename": path, "format": "png"}, nil)
	if err != nil {
		err = g.executeWith(ctx, "screendump", map[string]string{"filename": path}, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("the screen of guest %s: %w", g.id, err)
	}
	f, err := openOwn(path, os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("the screen of guest %s: %w", g.id, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxScreen))
	if err != nil {
		return nil, fmt.Errorf("the screen of guest %s: %w", g.id, err)
	}
	return asPNG(data)
}

// asPNG also takes the format that QEMU wrote before.
func asPNG(data []byte) ([]byte, error) {
	if bytes.HasPrefix(data, []byte("\x89PNG")) {
		return data, nil
	}
	picture, err := readPPM(data)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := png.Encode(&out, picture); err != nil {
		return nil, fmt.Errorf("making a PNG: %w", err)
	}
	return out.Bytes(), nil
}

// readPPM reads a binary portable pixmap as QEMU writes it.
func readPPM(data []byte) (image.Image, error) {
	var width, height, most int
	if _, err := fmt.Fscanf(bytes.NewReader(data[:min(len(data), 64)]), "P6\n%d %d\n%d\n", &width, &height, &most); err != nil {
		return nil, errors.New("QEMU's screenshot is neither PNG nor PPM")
	}
	head := len(fmt.Sprintf("P6\n%d %d\n%d\n", width, height, most))
	if width < 1 || height < 1 || width > maxPixels || height > maxPixels || most != 255 || head+width*height*3 > len(data) {
		return nil, fmt.Errorf("QEMU's screenshot is not whole: %d by %d in %d bytes", width, height, len(data))
	}
	pixels := data[head:]
	picture := image.NewNRGBA(image.Rect(0, 0, width, height))
	for i := range width * height {
		p := pixels[3*i:]
		picture.SetNRGBA(i%width, i/width, color.NRGBA{p[0], p[1], p[2], 255})
	}
	return picture, nil
}
