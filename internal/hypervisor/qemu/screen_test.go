package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"image/color"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// A screen is there from the start, for several at once, and can be
// photographed.
func TestScreen(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	listen(t, g).hear("booted")
	for range 2 {
		d, err := g.Display(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		hello := make([]byte, 12)
		if _, err := io.ReadFull(d, hello); err != nil || string(hello) != "RFB 003.008\n" {
			t.Errorf("it says %q, %v", hello, err)
		}
	}
	shot, err := g.Screenshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	picture, err := png.Decode(bytes.NewReader(shot))
	if err != nil || picture.Bounds().Dx() < 320 || picture.Bounds().Dy() < 200 {
		t.Errorf("got %v, %v", picture.Bounds(), err)
	}
	if _, err := os.Stat(screenFile(w.spec.Dir)); !errors.Is(err, os.ErrNotExist) {
		t.Error("the file is left behind")
	}
}

// A guest of an older daemon has no screen, and says what to do.
func TestNoScreen(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	if err := os.Remove(displaySocket(w.spec.Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Display(t.Context()); !errors.Is(err, hypervisor.ErrOldGuest) {
		t.Errorf("got %v", err)
	}
}

// Nothing in this guest speaks for an agent: nobody waits for it, and its power
// button is pressed.
func TestWithoutAgent(t *testing.T) {
	w := newWorld(t)
	g := w.start()
	listen(t, g).hear("booted")
	if _, err := g.Info(t.Context()); !errors.Is(err, hypervisor.ErrNoAgent) {
		t.Errorf("info: %v", err)
	}
	if err := g.Freeze(t.Context()); !errors.Is(err, hypervisor.ErrNoAgent) {
		t.Errorf("freeze: %v", err)
	}
	if err := g.PowerDown(t.Context()); err != nil {
		t.Errorf("power down: %v", err)
	}
}

// The firmware finds no system on this disk, and says so where UEFI does.
func TestUEFI(t *testing.T) {
	if _, err := os.Stat(ovmf[0].code); err != nil {
		t.Skip("needs OVMF: ", err)
	}
	w := newWorld(t)
	w.spec.Firmware, w.spec.MemoryBytes = hypervisor.UEFI, 128<<20
	listen(t, w.start()).hear("BdsDxe")
	if st, err := os.Stat(varsFile(w.spec.Dir)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("its settings: %v, %v", st, err)
	}
}

// The seed is a disk that can be read only, behind the others.
func TestSeed(t *testing.T) {
	w := newWorld(t)
	w.spec.Seed = filepath.Join(w.spec.Dir, "seed,1")
	if err := os.WriteFile(w.spec.Seed, make([]byte, 1<<20), 0o400); err != nil {
		t.Fatal(err)
	}
	g := w.start()
	var blocks []struct {
		Inserted struct {
			Node string `json:"node-name"`
			RO   bool   `json:"ro"`
		} `json:"inserted"`
	}
	if err := g.(*guest).execute(t.Context(), "query-block", &blocks); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(blocks); got != "[{{disk0 false}} {{seed true}}]" {
		t.Errorf("got %s", got)
	}
}

func TestPPM(t *testing.T) {
	data := []byte("P6\n2 1\n255\n\x01\x02\x03\x04\x05\x06")
	out, err := asPNG(data)
	if err != nil {
		t.Fatal(err)
	}
	picture, err := png.Decode(bytes.NewReader(out))
	if err != nil || picture.Bounds().Dx() != 2 || picture.At(1, 0) != (color.NRGBA{4, 5, 6, 255}) && picture.At(1, 0) != (color.RGBA{4, 5, 6, 255}) {
		t.Errorf("got %v %v, %v", picture.Bounds(), picture.At(1, 0), err)
	}
	for _, bad := range []string{"", "P6\n", "P6\n2 2\n255\n123456", "P6\n-1 -1\n255\n", "P6\n99999999 99999999\n255\n123", "P5\n1 1\n255\n123"} {
		if _, err := asPNG([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a picture", bad)
		}
	}
}

func FuzzPPM(f *testing.F) {
	f.Add([]byte("P6\n2 1\n255\n123456"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = readPPM(b) })
}

func TestWhatAnAgentSays(t *testing.T) {
	if got := word("web\x1b[31m\n" + strings.Repeat("x", 500)); got != "web[31m"+strings.Repeat("x", maxWord-7) {
		t.Errorf("got %q", got)
	}
	var i agentInterface
	for _, a := range []string{"127.0.0.1", "10.0.2.15", "fe80::1%eth0", "fec0::5054:ff:fe12:3456", "::1", "0.0.0.0", "\x1b]0;evil\a", "169.254.1.1", ""} {
		i.Addresses = append(i.Addresses, struct {
			Address string `json:"ip-address"`
		}{a})
	}
	if got := fmt.Sprint(addresses([]agentInterface{i})); got != "[10.0.2.15 fec0::5054:ff:fe12:3456]" {
		t.Errorf("got %s", got)
	}
	many := make([]agentInterface, 1000)
	for n := range many {
		many[n] = i
	}
	if got := len(addresses(many)); got != maxAddresses {
		t.Errorf("%d addresses", got)
	}
}
