package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/dustin/go-humanize"

	"github.com/argon-cluster/argon/internal/volume"
)

// Format is what a file given for import is.
type Format string

// The formats that can be imported.
const (
	QCOW2 Format = "qcow2"
	Raw   Format = "raw"
	// VMDK in one file: monolithicSparse or streamOptimized.
	VMDK Format = "vmdk"
	VDI  Format = "vdi"
	VHDX Format = "vhdx"
	// OVA is a tar archive of a machine's description and its disks.
	OVA Format = "ova"
)

// formats are all of them, for those who are asked for one.
var formats = []Format{QCOW2, Raw, VMDK, VDI, VHDX, OVA}

// ParseFormat checks a user's word for a format; "" is to be found by looking.
func ParseFormat(word string) (Format, error) {
	if f := Format(word); word == "" || slices.Contains(formats, f) {
		return f, nil
	}
	return "", refuse("format %q is not known: use qcow2, raw, vmdk, vdi, vhdx or ova", word)
}

// ErrNotImage: the file can not be used as an image: it is something else, is
// truncated, or refers to other files. The error says which.
var ErrNotImage = errors.New("not a usable image")

// MaxSize is the largest disk an image may hold, in bytes: volumes are made of it.
const MaxSize = volume.MaxSize

// sector is what disks are made of, in bytes.
const sector = volume.SectorSize

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
	if _, err := ParseFormat(string(want)); err != nil {
		return "", err
	}
	if len(head) == 0 {
		return "", refuse("the file is empty")
	}
	found, known := foreign(head)
	switch {
	case known != "" && (want == "" || want == known):
		return known, nil
	case known != "" && want == Raw:
		return "", refuse("the file is %s, not raw: leave the format to be found", found)
	case want != "" && want != Raw:
		return "", refuse("the file is not %s: its first bytes say %s", want, orUnknown(found))
	case found != "":
		return "", refuse("the file is %s, not a disk that can be imported: give qcow2, raw, vmdk, vdi, vhdx or ova", found)
	case want == Raw || isDisk(head):
		return Raw, nil
	}
	return "", refuse("the file is neither qcow2, vmdk, vdi, vhdx or ova, nor a raw disk with a partition table or file system: if it is raw all the same, say so with the format")
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

// foreign names what a file is by its mark; "" when there is none. format is
// set for what can be imported.
func foreign(head []byte) (name string, format Format) {
	for _, f := range []struct {
		mark
		format Format
	}{
		{mark{"qcow2", 0, "QFI\xfb"}, QCOW2},
		{mark{"vmdk", 0, "KDMV"}, VMDK},
		{mark{"vhdx", 0, "vhdxfile"}, VHDX},
		{mark{"vdi", 0x40, "\x7f\x10\xda\xbe"}, VDI},
		{mark{"ova", 257, "ustar"}, OVA},
		{mark{"the description of a VMDK whose data is in other files", 0, "# Disk DescriptorFile"}, ""},
		{mark{"a VMDK of an old kind", 0, "COWD"}, ""},
		{mark{"a VHD image", 0, "conectix"}, ""},
		{mark{"a QED image", 0, "QED\x00"}, ""},
		{mark{"compressed with gzip", 0, "\x1f\x8b"}, ""},
		{mark{"compressed with xz", 0, "\xfd7zXZ\x00"}, ""},
		{mark{"compressed with zstd", 0, "\x28\xb5\x2f\xfd"}, ""},
		{mark{"compressed with bzip2", 0, "BZh"}, ""},
		{mark{"a zip archive", 0, "PK\x03\x04"}, ""},
		{mark{"an OVF description: import the OVA that holds it", 0, "<?xml"}, ""},
		{mark{"an ELF program", 0, "\x7fELF"}, ""},
	} {
		if f.in(head) {
			return f.name, f.format
		}
	}
	return "", ""
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

func checkSize(n uint64) error {
	switch {
	case n == 0:
		return refuse("the disk inside is empty")
	case n%512 != 0:
		return refuse("the disk inside has %d bytes, not a multiple of 512: the file is probably truncated; if it is whole all the same, say that the format is raw", n)
	case n > MaxSize:
		return refuse("the disk inside would have %s: at most %s can be imported", humanize.IBytes(n), humanize.IBytes(MaxSize))
	}
	return nil
}

// checkRaw finds raw disks that end before their partition table says. One is
// trusted of which the user has said that it is raw: where partitions were
// made by cylinders, the last one may end beyond the disk.
func checkRaw(r io.ReaderAt, size int64, trusted bool) error {
	if err := checkSize(uint64(size)); err != nil || trusted {
		return err
	}
	head := make([]byte, min(size, peekSize))
	if _, err := r.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the image's first bytes: %w", err)
	}
	end := partitionsEnd(head)
	if end > uint64(size) {
		return refuse("the raw disk is truncated: its partition table speaks of %s, the file has %s; if it is whole all the same, say that the format is raw", humanize.IBytes(end), humanize.IBytes(uint64(size)))
	}
	return nil
}

// partitionsEnd returns how many bytes a disk must have by its partition
// table; 0 when nothing can be said.
func partitionsEnd(head []byte) uint64 {
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
