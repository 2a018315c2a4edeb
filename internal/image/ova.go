package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
)

// The limits of an OVA: far above what there is, far below what hurts.
const (
	ovaEntries     = 64
	ovaDescription = 4 << 20
	ovaDisks       = 16
)

// Hints are what a file says of the machine that its disk is from. Zero: it
// does not say.
type Hints struct {
	CPUs        int
	MemoryBytes int64
	Firmware    string // "bios" or "uefi"
}

// section is a file in the archive: a part of the archive's own file, so that
// nothing needs to be unpacked, and no name ever becomes a path.
type section struct{ off, size int64 }

// readOVA finds the disks of an OVA, in the order in which its machine has
// them. See DMTF's DSP0243.
func readOVA(ctx context.Context, f io.ReaderAt, size int64) ([]disk, Hints, error) {
	files, err := readTar(f, size)
	if err != nil {
		return nil, Hints{}, err
	}
	var description, manifest string
	for name := range files {
		switch strings.ToLower(path.Ext(name)) {
		case ".ovf":
			if description != "" {
				return nil, Hints{}, refuse("the OVA holds several descriptions: %.60q and %.60q", description, name)
			}
			description = name
		case ".mf":
			manifest = name
		}
	}
	if description == "" {
		return nil, Hints{}, refuse("the tar archive is no OVA: it holds no .ovf file")
	}
	text, err := readSmall(f, files[description], description)
	if err != nil {
		return nil, Hints{}, err
	}
	if manifest != "" {
		if err := checkManifest(ctx, f, files, manifest); err != nil {
			return nil, Hints{}, err
		}
	}
	return parseOVF(text, files, f)
}

// readTar lists the archive. It reads no names but to compare them.
func readTar(f io.ReaderAt, size int64) (map[string]section, error) {
	files := map[string]section{}
	in := io.NewSectionReader(f, 0, size)
	archive := tar.NewReader(in)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, refuse("the OVA is damaged or truncated: %v", err)
		}
		at, err := in.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, fmt.Errorf("reading the OVA: %w", err)
		}
		name := strings.TrimPrefix(h.Name, "./")
		switch {
		case len(files) == ovaEntries:
			return nil, refuse("the OVA holds more than %d files", ovaEntries)
		case h.Typeflag != tar.TypeReg || isSparse(h):
			return nil, refuse("the OVA holds %.60q, which is not an ordinary file", h.Name)
		case name == "" || name != path.Base(name) || name == ".." || strings.ContainsAny(name, "\\\x00"):
			return nil, refuse("the OVA holds %.60q: a file of an OVA has no path", h.Name)
		case h.Size > size-at:
			return nil, refuse("the OVA is truncated: %.60q ends beyond it", name)
		}
		if _, twice := files[name]; twice {
			return nil, refuse("the OVA holds %.60q twice", name)
		}
		files[name] = section{at, h.Size}
	}
}

// isSparse: the file's bytes are not those in the archive.
func isSparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func readSmall(f io.ReaderAt, s section, name string) ([]byte, error) {
	if s.size > ovaDescription {
		return nil, refuse("the OVA's %.60q has %s: that is no description", name, humanize.IBytes(uint64(s.size)))
	}
	text := make([]byte, s.size)
	if err := readAt(f, text, s.off); err != nil {
		return nil, fmt.Errorf("reading the OVA: %w", err)
	}
	return text, nil
}

// checkManifest compares the files with their checksums: lines such as
// "SHA256(disk.vmdk)= 9f86...". Each file has one: to read a large one for each of
// thousands of lines would take days.
func checkManifest(ctx context.Context, f io.ReaderAt, files map[string]section, name string) error {
	text, err := readSmall(f, files[name], name)
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for line := range bytes.Lines(text) {
		head, sum, ok := strings.Cut(strings.TrimSpace(string(line)), "=")
		kind, file, ok2 := strings.Cut(strings.TrimSuffix(strings.TrimSpace(head), ")"), "(")
		if !ok || !ok2 {
			continue
		}
		var h hash.Hash
		switch strings.ToUpper(strings.TrimSpace(kind)) {
		case "SHA256":
			h = sha256.New()
		case "SHA1":
			h = sha1.New() // finds damage, not malice
		default:
			continue
		}
		s, ok := files[file]
		switch {
		case !ok:
			return refuse("the OVA is not whole: its manifest names %.60q, which it does not hold", file)
		case seen[file]:
			return refuse("the OVA is damaged: its manifest names %.60q twice", file)
		}
		seen[file] = true
		if _, err := copyWith(ctx, h, io.NewSectionReader(f, s.off, s.size), s.size); err != nil {
			return fmt.Errorf("reading the OVA: %w", err)
		}
		if got := hex.EncodeToString(h.Sum(nil)); !strings.EqualFold(got, strings.TrimSpace(sum)) {
			return refuse("the OVA is damaged: %.60q does not have the checksum of its manifest", file)
		}
	}
	return nil
}

// envelope is what is read of an OVF description. Names of other namespaces
// with the same end are taken, too.
type envelope struct {
	Files []struct {
		ID          string `xml:"id,attr"`
		Href        string `xml:"href,attr"`
		Compression string `xml:"compression,attr"`
		Chunk       string `xml:"chunkSize,attr"`
	} `xml:"References>File"`
	Disks []struct {
		ID   string `xml:"diskId,attr"`
		File string `xml:"fileRef,attr"`
	} `xml:"DiskSection>Disk"`
	Systems []struct {
		Items []struct {
			Type     int    `xml:"ResourceType"`
			Quantity string `xml:"VirtualQuantity"`
			Units    string `xml:"AllocationUnits"`
			Host     string `xml:"HostResource"`
		} `xml:"VirtualHardwareSection>Item"`
		Config []struct {
			Key   string `xml:"key,attr"`
			Value string `xml:"value,attr"`
		} `xml:"VirtualHardwareSection>Config"`
	} `xml:"VirtualSystem"`
}

// The resource types of CIM that matter here.
const (
	ovfCPU    = 3
	ovfMemory = 4
	ovfDisk   = 17
)

func parseOVF(text []byte, files map[string]section, f io.ReaderAt) ([]disk, Hints, error) {
	var e envelope
	if err := xml.Unmarshal(text, &e); err != nil {
		return nil, Hints{}, refuse("the OVA's description can't be read: %.120s", err)
	}
	if len(e.Systems) != 1 {
		return nil, Hints{}, refuse("the OVA describes %d machines: one that holds a single one can be imported", len(e.Systems))
	}
	system := e.Systems[0]
	var hints Hints
	var order []string
	for _, item := range system.Items {
		quantity, err := strconv.ParseInt(strings.TrimSpace(item.Quantity), 10, 64)
		switch {
		case item.Type == ovfDisk:
			order = append(order, path.Base(item.Host))
		case err != nil || quantity <= 0:
		case item.Type == ovfCPU:
			hints.CPUs = int(min(quantity, 1<<16))
		case item.Type == ovfMemory:
			if unit := ovfUnit(item.Units); quantity <= (1<<62)/unit {
				hints.MemoryBytes = quantity * unit
			}
		}
	}
	for _, c := range system.Config {
		if c.Key == "firmware" {
			hints.Firmware = map[string]string{"efi": "uefi", "bios": "bios"}[c.Value]
		}
	}
	disks, err := ovfDisks(e, order, files, f)
	return disks, hints, err
}

// ovfDisks are those with a file, first those that the machine has, in its
// order.
func ovfDisks(e envelope, order []string, files map[string]section, f io.ReaderAt) ([]disk, error) {
	byID := map[string]string{} // the files
	for _, d := range e.Disks {
		byID[d.ID] = d.File
		order = append(order, d.ID)
	}
	var disks []disk
	seen := map[string]bool{}
	for _, id := range order {
		ref := byID[id]
		if ref == "" || seen[id] {
			continue // an empty disk, or a drive without one
		}
		seen[id] = true
		for _, file := range e.Files {
			if file.ID != ref {
				continue
			}
			s, ok := files[strings.TrimPrefix(file.Href, "./")]
			switch {
			case !ok:
				return nil, refuse("the OVA does not hold %.60q, which its description names", file.Href)
			case file.Compression != "" && file.Compression != "identity", file.Chunk != "":
				return nil, refuse("the OVA's %.60q is compressed or split: unpack it first", file.Href)
			case len(disks) == ovaDisks:
				return nil, refuse("the OVA holds more than %d disks", ovaDisks)
			}
			format, err := lookAt(io.NewSectionReader(f, s.off, s.size), s.size)
			if err != nil {
				return nil, fmt.Errorf("the OVA's %.60q: %w", file.Href, err)
			}
			if format == OVA {
				return nil, refuse("the OVA's %.60q is an archive, not a disk", file.Href)
			}
			disks = append(disks, disk{format: format, section: s})
		}
	}
	if len(disks) == 0 {
		return nil, refuse("the OVA holds no disk")
	}
	return disks, nil
}

func lookAt(r io.ReaderAt, size int64) (Format, error) {
	head := make([]byte, min(size, peekSize))
	if err := readAt(r, head, 0); err != nil {
		return "", fmt.Errorf("reading it: %w", err)
	}
	return look(head, "")
}

// ovfUnit is a unit such as "byte * 2^20" or "MegaBytes", in bytes.
func ovfUnit(s string) int64 {
	s = strings.ToLower(strings.ReplaceAll(s, " ", ""))
	if power, ok := strings.CutPrefix(s, "byte*2^"); ok {
		if n, err := strconv.Atoi(power); err == nil && n >= 0 && n <= 40 {
			return 1 << n
		}
	}
	switch {
	case strings.HasPrefix(s, "giga"), s == "gb":
		return 1 << 30
	case strings.HasPrefix(s, "kilo"), s == "kb":
		return 1 << 10
	case s == "byte", s == "bytes":
		return 1
	}
	return 1 << 20
}
