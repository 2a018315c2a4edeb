package seed

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
)

const (
	sector = 2048
	// label is what cloud-init looks for.
	label = "cidata"
	// noDate is a date of ISO 9660 that says nothing; the descriptors have four
	// of them.
	noDate      = "0000000000000000\x00"
	dates       = 813
	datesNumber = 4
)

// Write makes the disk, ISO 9660, as a file that only its owner may read. The
// same files make the same bytes. It is whole or not there.
func Write(path string, files []File) error {
	if err := write(path, files); err != nil {
		return errors.Join(fmt.Errorf("making the disk for the first boot: %w", err), remove(path))
	}
	return nil
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func write(path string, files []File) (err error) {
	// The library gathers the files in a directory of its own.
	work, err := os.MkdirTemp(filepath.Dir(path), "seed-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := remove(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	disk, err := iso9660.Create(file.New(f, false), 0, 0, sector, work)
	if err != nil {
		return err
	}
	epoch := time.Unix(0, 0)
	for _, one := range files {
		if err := os.WriteFile(filepath.Join(disk.Workspace(), one.Name), one.Data, 0o600); err != nil {
			return err
		}
		// Not when it was made: that differs from server to server.
		if err := os.Chtimes(filepath.Join(disk.Workspace(), one.Name), epoch, epoch); err != nil {
			return err
		}
	}
	if err := os.Chtimes(disk.Workspace(), epoch, epoch); err != nil {
		return err
	}
	if err := disk.Finalize(iso9660.FinalizeOptions{Joliet: true, VolumeIdentifier: label}); err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return err
	}
	return clearDates(f)
}

// fill makes the last sector whole: the library ends with the last file.
func fill(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return f.Truncate((st.Size() + sector - 1) / sector * sector)
}

// clearDates takes the dates of the making out of the volume descriptors, which
// begin with the 16th sector; see ECMA-119, 8.4.26.
func clearDates(f *os.File) error {
	const first, last, most = 16, 255, 8
	for n := int64(first); n < first+most; n++ {
		kind := make([]byte, 1)
		if _, err := f.ReadAt(kind, n*sector); err != nil {
			return err
		}
		switch kind[0] {
		case last:
			return nil
		case 1, 2: // primary, Joliet
			if _, err := f.WriteAt(bytes.Repeat([]byte(noDate), datesNumber), n*sector+dates); err != nil {
				return err
			}
		}
	}
	return errors.New("the volume descriptors have no end")
}
