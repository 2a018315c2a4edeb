package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/dustin/go-humanize"
)

// Format is what a file given for import is.
type Format string

// The formats that can be imported.
const (
	QCOW2 Format = "qcow2"
	Raw   Format = "raw"
)

// ErrNotImage: the file can not be used as an image: it is something else, is
// truncated, or refers to other files. The error says which.
var ErrNotImage = errors.New("not a usable image")

// MaxSize is the largest disk an image may hold, in bytes.
const MaxSize = 64 << 40

// peekSize covers every mark that look knows.
const peekSize = 128 << 10

// refuse makes an ErrNotImage whose text is only what the user needs.
func refuse(format string, args ...any) error {
	return &notImage{fmt.Sprintf(format, args...)}
}

type notImage struct{ text string }

func (e *notImage) Error() string        { return e.text }
func (e *notImage) Is(target error) bool { return target == ErrNotImage }

// look finds out from a file's first bytes what it is. want is what the user
// said, or "". An ordinary file that could be anything is raw only if the user
// says so.
func look(head []byte, want Format) (Format, error) {
	if want != "" && want != QCOW2 && want != Raw {
		return "", refuse("format %q is not known: use qcow2 or raw", want)
	}
	if len(head) == 0 {
		return "", refuse("the file is empty")
	}
	found := foreign(head)
	switch {
	case found == "qcow2" && want != Raw:
		return QCOW2, nil
	case want == QCOW2:
		return "", refuse("the file is not qcow2: its first bytes say %s", orUnknown(found))
	case want == Raw && found == "qcow2":
		return "", refuse("the file is qcow2, not raw: leave the format to be found")
	case found != "":
		return "", refuse("the file is %s, not a disk: give a qcow2 or raw image", found)
	case want == Raw || isDisk(head):
		return Raw, nil
	}
	return "", refuse("the file is neither qcow2 nor a raw disk with a partition table or file system: if it is raw all the same, say so with the format")
}

func orUnknown(s string) string {
	if s == "" {
		return "nothing known"
	}
	return s
}

type mark struct {
	name  string
	at    int
	bytes string
}

func (m mark) in(head []byte) bool {
	return len(head) >= m.at+len(m.bytes) && string(head[m.at:m.at+len(m.bytes)]) == m.bytes
}

// foreign names a container format by its mark; "" when there is none.
func foreign(head []byte) string {
	for _, m := range []mark{
		{"qcow2", 0, "QFI\xfb"},
		{"a VMDK image", 0, "KDMV"},
		{"a VMDK description", 0, "# Disk DescriptorFile"},
		{"a VHDX image", 0, "vhdxfile"},
		{"a VHD image", 0, "conectix"},
		{"a VDI image", 0x40, "\x7f\x10\xda\xbe"},
		{"a QED image", 0, "QED\x00"},
		{"compressed with gzip", 0, "\x1f\x8b"},
		{"compressed with xz", 0, "\xfd7zXZ\x00"},
		{"compressed with zstd", 0, "\x28\xb5\x2f\xfd"},
		{"compressed with bzip2", 0, "BZh"},
		{"a zip archive", 0, "PK\x03\x04"},
		{"a tar archive", 257, "ustar"},
		{"an ELF program", 0, "\x7fELF"},
	} {
		if m.in(head) {
			return m.name
		}
	}
	return ""
}

// isDisk tells whether the head is that of a disk that something can boot from
// or mount.
func isDisk(head []byte) bool {
	for _, m := range []mark{
		{"boot sector", 510, "\x55\xaa"},
		{"GPT", 512, "EFI PART"},
		{"GPT, 4096-byte sectors", 4096, "EFI PART"},
		{"ext2, ext3, ext4", 1024 + 56, "\x53\xef"},
		{"XFS", 0, "XFSB"},
		{"btrfs", 0x10040, "_BHRfS_M"},
		{"ISO 9660", 0x8001, "CD001"},
		{"squashfs", 0, "hsqs"},
		{"LVM", 512 + 24, "LVM2 001"},
		{"LUKS", 0, "LUKS\xba\xbe"},
		{"swap", 4086, "SWAPSPACE2"},
	} {
		if m.in(head) {
			return true
		}
	}
	return false
}

// qcow2Header is the part of the header that import decides by.
// See QEMU's docs/interop/qcow2.rst.
type qcow2Header struct {
	version     uint32
	size        uint64
	clusterBits uint32
}

// The header's incompatible features.
const (
	featureDirty       = 1 << 0
	featureCorrupt     = 1 << 1
	featureDataFile    = 1 << 2
	featureCompression = 1 << 3
	featureSubclusters = 1 << 4
)

// parseQCOW2 reads a header before QEMU gets to see the file. What would make
// QEMU open other files of this server is refused here.
func parseQCOW2(head []byte) (qcow2Header, error) {
	var h qcow2Header
	if len(head) < 72 {
		return h, refuse("the qcow2 file is truncated: it ends inside its header")
	}
	be := binary.BigEndian
	h.version = be.Uint32(head[4:])
	h.clusterBits = be.Uint32(head[20:])
	h.size = be.Uint64(head[24:])
	if h.version != 2 && h.version != 3 {
		return h, refuse("qcow2 version %d is not known", h.version)
	}
	if be.Uint64(head[8:]) != 0 || be.Uint32(head[16:]) != 0 {
		return h, refuse("the qcow2 file needs a backing file: flatten it first with `qemu-img convert -O qcow2`")
	}
	if be.Uint32(head[32:]) != 0 {
		return h, refuse("the qcow2 file is encrypted: decrypt it first")
	}
	if h.version == 3 {
		if len(head) < 104 {
			return h, refuse("the qcow2 file is truncated: it ends inside its header")
		}
		if err := checkFeatures(be.Uint64(head[72:])); err != nil {
			return h, err
		}
	}
	if h.clusterBits < 9 || h.clusterBits > 21 {
		return h, refuse("the qcow2 file is damaged: clusters of 2^%d bytes", h.clusterBits)
	}
	return h, checkSize(h.size)
}

func checkFeatures(f uint64) error {
	switch {
	case f&featureDataFile != 0:
		return refuse("the qcow2 file keeps its data in another file: flatten it first with `qemu-img convert -O qcow2`")
	case f&featureCorrupt != 0:
		return refuse("the qcow2 file is marked as corrupt: repair it first with `qemu-img check -r all`")
	case f&^(featureDirty|featureCompression|featureSubclusters) != 0:
		return refuse("the qcow2 file uses features that are not known (%#x)", f)
	}
	return nil
}

func checkSize(n uint64) error {
	switch {
	case n == 0:
		return refuse("the disk inside is empty")
	case n%512 != 0:
		return refuse("the disk inside has %d bytes, not a multiple of 512: the file is probably truncated", n)
	case n > MaxSize:
		return refuse("the disk inside would have %s: at most %s can be imported", humanize.IBytes(n), humanize.IBytes(MaxSize))
	}
	return nil
}

// checkRaw finds raw disks that end before their partition table says.
func checkRaw(r io.ReaderAt, size int64) error {
	if err := checkSize(uint64(size)); err != nil {
		return err
	}
	head := make([]byte, min(size, peekSize))
	if _, err := r.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the image's first bytes: %w", err)
	}
	end := partitionsEnd(head)
	if end > uint64(size) {
		return refuse("the raw disk is truncated: its partition table speaks of %s, the file has %s", humanize.IBytes(end), humanize.IBytes(uint64(size)))
	}
	return nil
}

// partitionsEnd returns how many bytes a disk must have by its partition
// table; 0 when nothing can be said.
func partitionsEnd(head []byte) uint64 {
	const sector = 512
	switch {
	case len(head) < 1024, mark{"ISO 9660", 0x8001, "CD001"}.in(head), !bytes.Equal(head[510:512], []byte{0x55, 0xaa}):
		return 0
	case string(head[512:520]) == "EFI PART":
		backup := binary.LittleEndian.Uint64(head[512+32:])
		if backup >= MaxSize/sector {
			return MaxSize + 1
		}
		return (backup + 1) * sector
	}
	var end uint64
	for i := range 4 {
		e := head[446+16*i:][:16]
		switch {
		case e[0] != 0 && e[0] != 0x80:
			return 0 // the boot sector of a file system, not a partition table
		case e[4] == 0 || e[4] == 0xee:
			continue
		}
		start, n := binary.LittleEndian.Uint32(e[8:]), binary.LittleEndian.Uint32(e[12:])
		end = max(end, (uint64(start)+uint64(n))*sector)
	}
	return end
}
