package qemu

import (
	"bytes"
	"maps"
	"slices"
	"testing"
)

// A disk grows while the guest uses it, more than once, and goes on being what
// it was; so it does in another run of the daemon, and when told twice.
func TestGrowDisk(t *testing.T) {
	w := newWorld(t)
	g := w.start().(*guest)
	c := listen(t, g)
	c.hear("booted")
	for _, bytes := range []int64{2 << 20, 2 << 20, 5 << 20} {
		w.disk.Grow(bytes)
		if err := g.GrowDisk(t.Context(), w.spec.Disks[0], bytes); err != nil {
			t.Fatal(err)
		}
		sizes, err := g.nodes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if sizes["disk0"] != bytes || len(sizes) != 2 {
			t.Errorf("QEMU has %v of disk0 with %d bytes, and one connection", slices.Sorted(maps.Keys(sizes)), bytes)
		}
		c.say("w")
		c.hear("W")
	}
	// A size that the volume does not have is refused, and harms nothing.
	if err := g.GrowDisk(t.Context(), w.spec.Disks[0], 9<<20); err == nil {
		t.Error("the disk was told to have more than there is")
	}
	_ = w.nbd.Close()
	c.say("w")
	w.serveDisk()
	c.hear("W")
	if got := w.disk.Bytes()[512:1024]; !bytes.Equal(got, talker()) {
		t.Error("what the guest wrote is not on the disk")
	}
	w.disk.Grow(9 << 20)
	if err := g.GrowDisk(t.Context(), w.spec.Disks[0], 9<<20); err != nil {
		t.Error(err)
	}
}
