package layer_test

import (
	"bytes"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/volume/layer"
)

// mounted is a directory on a file system of its own.
func mounted(t *testing.T, mkfs string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a file system")
	}
	if _, err := exec.LookPath(mkfs); err != nil {
		t.Skipf("needs %s", mkfs)
	}
	dir := t.TempDir()
	image, at := filepath.Join(dir, "image"), filepath.Join(dir, "mounted")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 1<<30); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, image).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", mkfs, err, out)
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-o", "loop", image, at).CombinedOutput(); err != nil {
		t.Skipf("this kernel does not mount it: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount %s: %v", at, err)
		}
	})
	return at
}

// Where the file system can share blocks, copy-up copies none: what is brought up
// reads right, in the volume and in the snapshot, also when the rest of a shared
// block is written later, and takes no space of its own.
func TestReflinkCopyUp(t *testing.T) {
	for _, mkfs := range []string{"mkfs.xfs", "mkfs.btrfs"} {
		t.Run(mkfs, func(t *testing.T) {
			const size, region = 32 << 20, layer.RegionSize
			fs, dir := layer.OS{}, filepath.Join(mounted(t, mkfs), "volume")
			must := orFatal(t)
			must(layer.Create(fs, dir, layer.Superblock{Sequence: 1, RegionSize: region, Size: size, Generation: 1, Health: layer.Good}))
			f, err := layer.Open(fs, dir, "b", nil)
			must(err)
			defer func() { must(f.Close()) }()
			before := make([]byte, size)
			_, _ = rand.Read(before[:size-5*region]) // and a hole
			must(f.Write(before[:size-5*region], 0, 1))
			must(f.SyncData())
			must(f.Snapshot(1, 2))
			room, err := f.Free()
			must(err)

			// The second write to a region brings up the rest of it.
			after := bytes.Clone(before)
			for off := int64(512); off < size; off += region {
				for _, at := range []int64{off, off + 300<<10, off + 300<<10 + 4096} {
					p := bytes.Repeat([]byte{byte(at >> 12)}, 512)
					must(f.Write(p, at, 2))
					copy(after[at:], p)
				}
			}
			must(f.Zero(7*region, 64<<10, 2))
			clear(after[7*region : 7*region+64<<10])
			must(f.SyncData())
			left, err := f.Free()
			must(err)
			if took := int64(room) - int64(left); took > size/4 {
				t.Errorf("%d KiB were taken for %d KiB that were written: blocks were copied", took>>10, size/region*3/2)
			}
			got := make([]byte, size)
			must(f.ReadAt(got, 0))
			if !bytes.Equal(got, after) {
				t.Error("the volume is not what was written")
			}
			v, err := f.View(1)
			must(err)
			must(v.ReadAt(got, 0))
			if !bytes.Equal(got, before) {
				t.Error("the snapshot is not what it was")
			}
		})
	}
}
