package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/argon-cluster/argon/internal/catalog"
)

// This file: copies of the catalog in a file. A copy is a line that says what the
// file is, a line of JSON about the copy, a snapshot of etcd, and the SHA-256 of
// everything before it.

const (
	copyMagic = "argon catalog 1\n"
	// maxCopyHead bounds the line about a copy, maxCopy the whole, in bytes.
	maxCopyHead = 16 << 10
	maxCopy     = 4 << 30
)

// CopyHead says what a copy of the catalog is of.
type CopyHead struct {
	ClusterID   string    `json:"cluster_id"`
	ClusterName string    `json:"cluster_name"`
	Incarnation uint32    `json:"incarnation"`
	Revision    int64     `json:"revision"`
	Taken       time.Time `json:"taken"`
}

// writeCopy copies the catalog that a client sees into a file of the owner's, all
// or nothing.
func writeCopy(ctx context.Context, cli *clientv3.Client, path string, now time.Time) (CopyHead, error) {
	work, err := os.MkdirTemp(filepath.Dir(path), ".copying-")
	if err != nil {
		return CopyHead{}, fmt.Errorf("copy the catalog: %w", err)
	}
	defer func() { _ = os.RemoveAll(work) }()
	raw := filepath.Join(work, "snapshot")
	if err := saveSnapshot(ctx, cli, raw); err != nil {
		return CopyHead{}, err
	}
	st, _, err := catalog.ReadFile(raw)
	if err != nil {
		return CopyHead{}, err
	}
	head := CopyHead{
		ClusterID: st.Cluster.GetId(), ClusterName: st.Cluster.GetName(), Incarnation: st.Cluster.GetIncarnation(),
		Revision: st.Revision, Taken: now.UTC(),
	}
	if err := packCopy(head, raw, path); err != nil {
		return CopyHead{}, fmt.Errorf("copy the catalog to %s: %w", path, err)
	}
	return head, nil
}

func packCopy(head CopyHead, raw, path string) (err error) {
	in, err := os.Open(raw)
	if err != nil {
		return err
	}
	defer in.Close()
	line, err := json.Marshal(head)
	if err != nil {
		return err
	}
	out, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o600))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Cleanup()) }()
	sum := sha256.New()
	both := io.MultiWriter(out, sum)
	for _, r := range []io.Reader{bytes.NewReader([]byte(copyMagic)), bytes.NewReader(append(line, '\n')), in} {
		if _, err := io.Copy(both, r); err != nil {
			return err
		}
	}
	if _, err := out.Write(sum.Sum(nil)); err != nil {
		return err
	}
	if err := out.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return directory(filepath.Dir(path)).sync()
}

// readCopyHead reads what a copy says that it is, without checking it.
func readCopyHead(path string) (CopyHead, error) {
	f, err := os.Open(path)
	if err != nil {
		return CopyHead{}, err
	}
	defer f.Close()
	head, _, err := parseCopyHead(bufio.NewReader(io.LimitReader(f, maxCopyHead)))
	return head, err
}

var errNoCopy = errors.New("it is not a copy of a catalog, or not a whole one")

// parseCopyHead reads the two lines, and tells how long they are.
func parseCopyHead(r *bufio.Reader) (head CopyHead, length int64, err error) {
	magic := make([]byte, len(copyMagic))
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != copyMagic {
		return head, 0, errNoCopy
	}
	line, err := r.ReadBytes('\n')
	if err != nil || json.Unmarshal(line, &head) != nil {
		return head, 0, errNoCopy
	}
	return head, int64(len(magic) + len(line)), nil
}

// unpackCopy checks a copy as a whole and writes the snapshot in it to a new file.
func unpackCopy(path, raw string) (CopyHead, error) {
	fail := func(err error) (CopyHead, error) {
		return CopyHead{}, fmt.Errorf("copy of the catalog %s: %w", path, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return CopyHead{}, fmt.Errorf("open the copy of the catalog: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxCopy {
		return fail(errNoCopy)
	}
	head, length, err := parseCopyHead(bufio.NewReader(io.NewSectionReader(f, 0, maxCopyHead)))
	body := info.Size() - length - sha256.Size
	if err != nil || body <= 0 {
		return fail(errNoCopy)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, 0, length)); err != nil {
		return fail(err)
	}
	out, err := os.OpenFile(raw, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fail(err)
	}
	_, err = io.Copy(io.MultiWriter(out, sum), io.NewSectionReader(f, length, body))
	if err := errors.Join(err, out.Close()); err != nil {
		return fail(err)
	}
	var wanted [sha256.Size]byte
	if _, err := f.ReadAt(wanted[:], length+body); err != nil {
		return fail(err)
	}
	if !bytes.Equal(wanted[:], sum.Sum(nil)) {
		return fail(errors.New("it is damaged or cut: its checksum does not fit"))
	}
	return head, nil
}

// Backup copies the catalog and hands over the copy's bytes.
func (m *Member) Backup(ctx context.Context, send func([]byte) error) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(string(m.dir), ".backup-")
	if err != nil {
		return fmt.Errorf("copy the catalog: %w", err)
	}
	defer func() { _ = os.RemoveAll(work) }()
	path := filepath.Join(work, "copy")
	if _, err := writeCopy(ctx, p.client, path, m.opts.Now()); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read the copy of the catalog: %w", err)
	}
	defer f.Close()
	const part = 256 << 10
	buf := make([]byte, part)
	for {
		n, err := io.ReadFull(f, buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("read the copy of the catalog: %w", err)
		}
	}
}
