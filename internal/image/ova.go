package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
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
	// Networks is the number of network cards.
	Networks int
}

// section is a file in the archive: a part of the archive's own file, so that
// nothing needs to be unpacked, and no name ever becomes a path.
type section struct{ off, size int64 }

// readOVA finds the disks of an OVA, in the order in which its machine has
// them. See DMTF's DSP0243.
func readOVA(ctx context.Context, f io.ReaderAt, size int64) (*described, error) {
	files, err := readTar(f, size)
	if err != nil {
		return nil, err
	}
	var description, manifest string
	for name := range files {
		switch strings.ToLower(path.Ext(name)) {
		case ".ovf":
			if description != "" {
				return nil, refuse("the OVA holds several descriptions: %.60q and %.60q", description, name)
			}
			description = name
		case ".mf":
			manifest = name
		}
	}
	if description == "" {
		return nil, refuse("the tar archive is no OVA: it holds no .ovf file")
	}
	text, err := readSmall(f, files[description], description)
	if err != nil {
		return nil, err
	}
	if manifest != "" {
		if err := checkManifest(ctx, f, files, manifest); err != nil {
			return nil, err
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
		case h.Typeflag == tar.TypeDir && name == "":
			continue // "./", as tar writes it of a folder's content
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

// manifestHashes are the kinds of checksums that a manifest may have. SHA-1 finds
// damage, not malice.
var manifestHashes = map[string]func() hash.Hash{
	"SHA1": sha1.New, "SHA256": sha256.New, "SHA384": sha512.New384, "SHA512": sha512.New,
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
		if strings.TrimSpace(string(line)) == "" {
			continue
		}
		if !ok || !ok2 {
			return refuse("the OVA's manifest can't be read: %.60q", line)
		}
		known, ok := manifestHashes[strings.ReplaceAll(strings.ToUpper(strings.TrimSpace(kind)), "-", "")]
		if !ok {
			return refuse("the OVA's manifest has checksums of kind %.20q: those that can be checked are SHA1, SHA256, SHA384 and SHA512", strings.TrimSpace(kind))
		}
		h := known()
		file = strings.TrimPrefix(file, "./")
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
