package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"golang.org/x/sys/unix"
)

// identitySchema is the layout of server.json that this program writes; it
// reads no newer one.
const identitySchema = 1

// identity is server.json: what a server must know before it reaches etcd.
type identity struct {
	Schema      int    `json:"schema"`
	ClusterID   string `json:"cluster_id"`
	ClusterName string `json:"cluster_name"`
	ServerID    string `json:"server_id"`
	ServerName  string `json:"server_name"`
	Address     string `json:"address"`
	Ports       Ports  `json:"ports"`
	// Endpoints of etcd, as last known: the voters first, then servers that
	// may have become voters since.
	Endpoints []string `json:"endpoints"`
	// Servers are those that the endpoints are of, and where they are.
	Servers []whereabouts `json:"servers,omitempty"`
}

// directory is what this package keeps on disk.
type directory string

func (d directory) path(name string) string { return filepath.Join(string(d), name) }
func (d directory) caFile() string          { return d.path("ca.pem") }
func (d directory) certFile() string        { return d.path("server.pem") }
func (d directory) keyFile() string         { return d.path("server.key") }
func (d directory) identityFile() string    { return d.path("server.json") }
func (d directory) etcd() string            { return d.path("etcd") }
func (d directory) unfinished() string      { return d.path("unfinished") }

// load reads who this server is; nil if it is not part of a cluster.
func (d directory) load() (*identity, *credentials, error) {
	b, err := os.ReadFile(d.identityFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, d.checkUnconfigured()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read who this server is: %w", err)
	}
	id := &identity{}
	if err := json.Unmarshal(b, id); err != nil {
		return nil, nil, fmt.Errorf("%s is damaged: %w", d.identityFile(), err)
	}
	if id.Schema != identitySchema {
		return nil, nil, fmt.Errorf("directory %s %w: its layout is %d, this program knows %d: install the version of argon that it was made with, or a newer one", d, ErrLayout, id.Schema, identitySchema)
	}
	creds, err := d.loadCredentials()
	if err != nil {
		return nil, nil, err
	}
	return id, creds, d.addSuccessions(creds)
}

// checkUnconfigured refuses a directory that has lost its identity: what it
// holds may be a cluster's only copy.
func (d directory) checkUnconfigured() error {
	if exists(d.etcd()) && !exists(d.unfinished()) {
		return fmt.Errorf("directory %s holds a cluster's records but no server.json: restore that file, or choose another directory with --dir", d)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (d directory) loadCredentials() (*credentials, error) {
	var files [3][]byte
	for i, name := range []string{d.caFile(), d.certFile(), d.keyFile()} {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read the server's certificates: %w", err)
		}
		files[i] = b
	}
	creds, err := newCredentials(files[0], files[1], files[2])
	if err != nil {
		return nil, fmt.Errorf("directory %s: %w", d, err)
	}
	return creds, nil
}

// begin prepares for init or join: it clears what an earlier one left.
func (d directory) begin() error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return fmt.Errorf("make the server's directory: %w", err)
	}
	if err := d.checkUnconfigured(); err != nil {
		return err
	}
	if err := d.clear(); err != nil {
		return err
	}
	if err := renameio.WriteFile(d.unfinished(), nil, 0o600); err != nil {
		return fmt.Errorf("write to the server's directory: %w", err)
	}
	return nil
}

// clear removes all that init and join write.
func (d directory) clear() error {
	for _, path := range []string{d.identityFile(), d.etcd(), d.caFile(), d.certFile(), d.keyFile(), d.path(successionFile), d.unfinished()} {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("clear the server's directory: %w", err)
		}
	}
	return nil
}

// saveCredentials writes the certificates and the key.
func (d directory) saveCredentials(caPEM, certPEM, keyPEM []byte) (*credentials, error) {
	creds, err := newCredentials(caPEM, certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		path string
		data []byte
		mode fs.FileMode
	}{{d.caFile(), caPEM, 0o644}, {d.certFile(), certPEM, 0o644}, {d.keyFile(), keyPEM, 0o600}} {
		if err := renameio.WriteFile(f.path, f.data, f.mode); err != nil {
			return nil, fmt.Errorf("write the server's certificates: %w", err)
		}
	}
	return creds, nil
}

// saveIdentity writes server.json, if it is another one, all or nothing. From then
// on the server is part of the cluster.
func (d directory) saveIdentity(id *identity) error {
	b, err := json.MarshalIndent(id, "", "\t")
	if err != nil {
		return fmt.Errorf("encode who this server is: %w", err)
	}
	b = append(b, '\n')
	if is, err := os.ReadFile(d.identityFile()); err == nil && bytes.Equal(is, b) {
		return nil // a start must not need room on the disk
	}
	if err := renameio.WriteFile(d.identityFile(), b, 0o644); err != nil {
		return fmt.Errorf("write who this server is: %w", err)
	}
	return d.sync()
}

// finish ends what begin began, once the identity is there.
func (d directory) finish() error {
	if err := os.Remove(d.unfinished()); err != nil {
		return fmt.Errorf("end the set-up of the server's directory: %w", err)
	}
	return d.sync()
}

// sync makes names in the directory durable.
func (d directory) sync() error {
	f, err := os.Open(string(d))
	if err != nil {
		return fmt.Errorf("open the server's directory: %w", err)
	}
	defer func() { _ = f.Close() }()
	if err := unix.Fsync(int(f.Fd())); err != nil {
		return fmt.Errorf("write the server's directory: %w", err)
	}
	return nil
}

// hasEtcd tells whether this server's etcd has data. What an etcd left that was
// to join others and never did is removed: started with that, it would make a
// cluster of its own.
func (d directory) hasEtcd() (bool, error) {
	if !exists(d.etcd()) {
		return false, nil
	}
	if wal.Exist(filepath.Join(d.etcd(), "member", "wal")) {
		return true, nil
	}
	return false, d.removeEtcd()
}

// removeEtcd removes etcd's data; at once, so that half of it is never taken
// for data.
func (d directory) removeEtcd() error {
	old := d.path("etcd.removed")
	if err := os.RemoveAll(old); err != nil {
		return fmt.Errorf("remove old etcd data: %w", err)
	}
	if err := os.Rename(d.etcd(), old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove etcd data: %w", err)
	}
	if err := os.RemoveAll(old); err != nil {
		return fmt.Errorf("remove old etcd data: %w", err)
	}
	return d.sync()
}
